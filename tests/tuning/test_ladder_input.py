import copy
import json

import pytest
import torch
import transformers as hosts

from danlu.hosts.architecture import UnsupportedArchitecture
from danlu.tuning.ladder.model import LadderConfig, LadderModel
from tuning.ladder_hosts import VOCABULARY, llama, tokens, unset


def ladder(backbone, **options):
    options = {"reduction": 4, "init": "magnitude", **options}
    return unset(LadderModel(backbone, LadderConfig(**options))).eval()


def test_only_the_side_is_saved_and_it_comes_back(tmp_path):
    backbone = llama(torch.float32)
    model = ladder(backbone, layers=[1, 3], head="lm", merge_last=True)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ladder_config.json", "model.safetensors"]
    trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert (tmp_path / "model.safetensors").stat().st_size < trained + 4096
    again = LadderModel.from_pretrained(tmp_path, copy.deepcopy(backbone))
    assert again.ladder_config == model.ladder_config and not again.training
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_a_backbone_of_another_shape_is_refused_and_other_weights_are_reported(tmp_path, caplog):
    ladder(llama()).save_pretrained(tmp_path)
    LadderModel.from_pretrained(tmp_path, llama())
    assert not caplog.records
    other = llama()
    other.model.layers[1].mlp.up_proj.weight.data.mul_(1.01)
    LadderModel.from_pretrained(tmp_path, other)
    assert "weights are not those" in caplog.text
    with pytest.raises(ValueError, match="backbone must be of the shape"):
        LadderModel.from_pretrained(tmp_path, llama(num_hidden_layers=3))
    (tmp_path / "ladder_config.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match="format must be 1, got 2"):
        LadderModel.from_pretrained(tmp_path, llama())
    with pytest.raises(FileNotFoundError, match="holds no ladder"):
        LadderModel.from_pretrained(tmp_path / "none", llama())


def test_a_configuration_survives_json_and_knows_its_options():
    config = LadderConfig(layers=[0, 2], gate="constant", gate_value=0.25, head="tokens", num_labels=4)
    assert LadderConfig.from_json(config.to_json()) == config and config.layers == (0, 2)
    with pytest.raises(ValueError, match="'reducton' is no option of LadderConfig; the nearest is 'reduction'"):
        LadderConfig.from_json(json.dumps({"reducton": 4}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": 0}, "reduction must be at least 1"),
        ({"layers": "some"}, "layers must be 'all', 'every:N' or a list"),
        ({"layers": "every:0"}, "layers must be 'all', 'every:N' or a list"),
        ({"layers": (2, 1)}, "layers must rise"),
        ({"layers": (1, 1)}, "layers must rise"),
        ({"layers": ()}, "layers must be"),
        ({"gate": "soft"}, "gate must be one of sigmoid, constant, none"),
        ({"gate_value": 1.5}, r"gate_value must be in 0\.\.1"),
        ({"temperature": 0.0}, "temperature must be finite and above 0"),
        ({"mix": "beside"}, "mix must be one of"),
        ({"init": "zero"}, "init must be one of"),
        ({"links": "select", "init": "random"}, "links='select' needs channels"),
        ({"head": "classification"}, "num_labels must be at least 2"),
        ({"num_labels": 3}, "num_labels must be left out"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LadderConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (0, 4)}, r"layers must be in 0\.\.3"),
        ({"layers": "every:5"}, "at least one of 4 layers"),
        ({"reduction": 3}, "reduction must divide the backbone's hidden_size of 32"),
        ({"reduction": 32}, "reduction must leave whole heads"),
        ({"init": "fisher"}, "init='fisher' needs samples="),
    ],
)
def test_ladders_that_do_not_fit_the_backbone_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LadderModel(llama(), LadderConfig(**{"reduction": 4, "init": "random", **options}))


SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": VOCABULARY}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: hosts.T5ForConditionalGeneration(hosts.T5Config(d_model=32, num_layers=2, vocab_size=61, d_kv=8,
         num_heads=4, d_ff=32)), "one stack of blocks, T5ForConditionalGeneration has two"),
        (lambda: hosts.MambaForCausalLM(hosts.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=61)),
         "MambaConfig must have num_attention_heads"),
        (lambda: hosts.MixtralForCausalLM(hosts.MixtralConfig(**SMALL, num_key_value_heads=2, intermediate_size=32,
         num_local_experts=2)), r"mlp.gate.weight must shrink by 4 on all sides .* MixtralModel is not supported"),
        (lambda: hosts.AlbertForMaskedLM(hosts.AlbertConfig(**SMALL, embedding_size=16, intermediate_size=32)),
         "as many blocks as its configuration says"),
        (lambda: hosts.ElectraForMaskedLM(hosts.ElectraConfig(**SMALL, embedding_size=16, intermediate_size=32)),
         "embeddings_project.weight outside its blocks"),
    ],
)  # fmt: skip
def test_a_ladder_over_an_unsupported_block_is_refused_with_the_reason(build, message):
    with pytest.raises(UnsupportedArchitecture, match=message):
        LadderModel(build(), LadderConfig(reduction=4, init="random"))


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="needs a backbone with a language-model head, got LlamaModel"):
        LadderModel(llama().model, LadderConfig(reduction=4, init="random"))
    model = ladder(llama())
    with pytest.raises(TypeError, match="past_key_values must be a LadderCache, got DynamicCache"):
        model(tokens(), past_key_values=hosts.DynamicCache())
    with pytest.raises(ValueError, match=r"features must be \(batch, 5, length, 32\), got \(2, 3, 9, 32\)"):
        model(features=torch.zeros(2, 3, 9, 32).double())
    with pytest.raises(ValueError, match="returns no hidden states"):
        model(tokens(), output_hidden_states=True)
    model.train()
    model.backbone.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="the backbone of a ladder must be frozen"):
        model(tokens(), labels=tokens())


def test_making_a_ladder_leaves_the_configuration_and_the_global_randomness_alone():
    backbone = llama()
    before, state_before = copy.deepcopy(backbone.config.to_dict()), torch.get_rng_state()
    LadderModel(backbone, LadderConfig(reduction=4, init="random"))
    assert backbone.config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state_before)
