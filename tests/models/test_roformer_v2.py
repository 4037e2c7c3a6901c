"""RoFormerV2: the formula, the host's machinery, published checkpoints, initialisation and residual warm-up."""

from __future__ import annotations

import copy
import json
import logging
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from danlu.hosts.architecture import read_architecture
from danlu.models.roformer_v2 import heads as v2
from danlu.models.roformer_v2.initialise import roformer_v2_init_, truncated_normal_
from danlu.models.roformer_v2.norm import rms_normalise
from danlu.models.roformer_v2.training import ResidualWarmupCallback, set_residual_alpha
from danlu.models.roformer_v2.weights import convert_paddle, convert_tensorflow
from danlu.positions.rotary import Rotary, interleaved_to_half
from reference import roformer_v2 as dense

SIZES = {"small": (6, 384, 6, 15_225_600), "base": (12, 768, 12, 94_152_192), "large": (24, 1024, 16, 314_279_936)}
HEADS = {
    "AutoModel": v2.RoFormerV2Model,
    "AutoModelForMaskedLM": v2.RoFormerV2ForMaskedLM,
    "AutoModelForSequenceClassification": v2.RoFormerV2ForSequenceClassification,
    "AutoModelForTokenClassification": v2.RoFormerV2ForTokenClassification,
    "AutoModelForQuestionAnswering": v2.RoFormerV2ForQuestionAnswering,
    "AutoModelForMultipleChoice": v2.RoFormerV2ForMultipleChoice,
}


def config(**changes):
    sizes = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    return v2.RoFormerV2Config(**sizes | {"intermediate_size": 48, "max_position_embeddings": 16} | changes)


def tiny(kind=v2.RoFormerV2Model, attention="sdpa", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = kind._from_config(config(**changes), attn_implementation=attention, dtype=dtype).eval()
    with torch.no_grad():  # larger than the initialisation, so that attention is far from uniform
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def tokens(rows=2, length=9, seed=1):
    return torch.randint(1, 40, (rows, length), generator=torch.Generator().manual_seed(seed))


# --- the formula


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", ["plain", "types", "positions", "padded", "alpha", "projected"])
def test_the_encoder_is_the_dense_formula(attention, case):
    changes = {"embedding_size": 10} if case == "projected" else {}
    model = tiny(attention=attention, dtype=torch.float64, layer_norm_eps=1e-3, **changes)
    ids = tokens()
    settings, wanted = {}, {}
    if case == "types":
        settings["token_type_ids"] = torch.tensor([[0] * 5 + [1] * 4] * 2)
        wanted["types"] = [0] * 5 + [1] * 4
    if case == "positions":
        settings["position_ids"] = torch.tensor([0, 3, 4, 9, 2, 20, 300, 7, 8])
        wanted["positions"] = [0.0, 3, 4, 9, 2, 20, 300, 7, 8]
    if case == "padded":
        settings["attention_mask"] = torch.tensor([[0, 0] + [1] * 7] * 2)
        wanted["real"] = [False, False] + [True] * 7
    if case == "alpha":
        model.residual_alpha = 0.25
        wanted["alpha"] = 0.25
    got = model(ids, **settings).last_hidden_state
    for row in range(2):
        expected = dense.encode(model.state_dict(), ids[row].tolist(), 3, 1e-3, **wanted)
        assert torch.allclose(got[row], expected, atol=1e-12)


def test_the_norm_has_mean_square_one_and_ignores_the_scale():
    x = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 7 + 3
    assert torch.allclose(rms_normalise(x, 1e-12).square().mean(-1), torch.ones(5, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(rms_normalise(9 * x, 1e-12), rms_normalise(x, 1e-12), atol=1e-9)
    inside = x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt()
    assert torch.allclose(rms_normalise(x, 0.5), inside, atol=1e-12)
    assert torch.allclose(rms_normalise(x.requires_grad_(), 0.5), inside, atol=1e-12)
    assert not rms_normalise(torch.zeros(3, 8, requires_grad=True), 1e-12).any()


def test_derivatives_of_the_norm():
    x = torch.randn(3, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: rms_normalise(t, 1e-3), (x,))
    assert torch.autograd.gradgradcheck(lambda t: rms_normalise(t, 1e-3), (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_of_half_precision_is_taken_in_float32(dtype):
    x = (torch.randn(4, 4096, generator=torch.Generator().manual_seed(0)) * 300).to(dtype)
    exact = rms_normalise(x.double(), 1e-12)
    for got in (rms_normalise(x, 1e-12), rms_normalise(x.clone().requires_grad_(), 1e-12)):
        assert got.dtype == dtype
        assert torch.allclose(got.double(), exact, rtol=1.01 * torch.finfo(dtype).eps, atol=0)
    ours, plain = x.clone().requires_grad_(), x.double().requires_grad_()
    rms_normalise(ours, 1e-12)[:, :9].sum().backward()
    rms_normalise(plain, 1e-12)[:, :9].sum().backward()
    assert torch.allclose(ours.grad.double(), plain.grad, rtol=0.02, atol=1e-2 * float(plain.grad.abs().max()))


def test_only_differences_of_positions_matter():
    model, ids = tiny(), tokens()
    first = model(ids).last_hidden_state
    shifted = model(ids, position_ids=torch.arange(9) + 1000).last_hidden_state
    assert torch.allclose(first, shifted, atol=1e-5)
    spread = model(ids, position_ids=3 * torch.arange(9)).last_hidden_state
    assert (first - spread).abs().max() > 1e-2


def test_a_text_may_be_longer_than_the_trained_length():
    model, ids = tiny(dtype=torch.float64), tokens(1, 30)
    expected = dense.encode(model.state_dict(), ids[0].tolist(), 3, 1e-12)
    assert torch.allclose(model(ids).last_hidden_state[0], expected, atol=1e-11)
    assert torch.allclose(model(ids[:, :9]).last_hidden_state[0], model(ids[:, :9]).last_hidden_state[0])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_other_token(attention, side):
    model, ids = tiny(attention=attention), tokens(1, 7)
    pad, none = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 7, dtype=torch.long)
    parts = [(pad, torch.zeros_like(pad)), (ids, none)]
    parts = parts if side == "left" else parts[::-1]
    padded, mask = (torch.cat([part[i] for part in parts], 1) for i in range(2))
    got = model(padded, attention_mask=mask).last_hidden_state
    got = got[:, 4:] if side == "left" else got[:, :7]
    assert torch.allclose(got, model(ids).last_hidden_state, atol=1e-6)


def test_sdpa_is_eager():
    eager, sdpa = tiny(attention="eager"), tiny(attention="sdpa")
    ids, mask = tokens(), torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    real = mask.bool()
    a, b = (model(ids, attention_mask=mask).last_hidden_state for model in (eager, sdpa))
    assert torch.allclose(a[real], b[real], atol=1e-5)
    weights = eager(ids, attention_mask=mask, output_attentions=True).attentions
    assert len(weights) == 2 and not weights[0][1, :, :, 5:].any()
    assert eager.config._attn_implementation == "eager" and sdpa.config._attn_implementation == "sdpa"


def test_rotating_halves_of_permuted_rows_is_the_same():
    model = tiny(dtype=torch.float64)
    halves = copy.deepcopy(model)
    with torch.no_grad():
        for layer in halves.encoder.layer:
            attention = layer.attention.self
            for part in (attention.query, attention.key):
                rows = part.weight.unflatten(0, (3, 8))
                part.weight.copy_(interleaved_to_half(rows.mT).mT.flatten(0, 1))
            attention.rotary = Rotary(attention.rotary.inv_freq, layout="half")
    a, b = model(tokens()).last_hidden_state, halves(tokens()).last_hidden_state
    assert torch.allclose(a, b, atol=1e-10)
    halves.load_state_dict(model.state_dict())
    assert (halves(tokens()).last_hidden_state - a).abs().max() > 1e-2


def test_without_branches_the_encoder_is_its_embedding():
    model = tiny()
    model.residual_alpha = 0.0
    states = model(tokens(), output_hidden_states=True)
    assert len(states.hidden_states) == 3
    assert torch.allclose(states.last_hidden_state, states.hidden_states[0], atol=1e-5)
    with pytest.raises(ValueError, match=r"residual_alpha must be in 0..1, got 1.5"):
        model.residual_alpha = 1.5


def test_logits_are_hidden_states_times_the_table():
    model = tiny(v2.RoFormerV2ForMaskedLM)
    output = model(tokens(), output_hidden_states=True, labels=tokens())
    table = model.roformer.embeddings.word_embeddings.weight
    assert torch.allclose(output.logits, output.hidden_states[-1] @ table.T, atol=1e-5)
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), tokens().flatten())
    assert torch.allclose(output.loss, expected)
    assert torch.allclose(model(tokens(), labels=tokens(), num_items_in_batch=36).loss, expected / 2)
    with pytest.raises(ValueError, match="embedding_size must be hidden_size"):
        v2.RoFormerV2ForMaskedLM(config(embedding_size=10))
    assert v2.RoFormerV2ForMaskedLM(config(embedding_size=10, tie_word_embeddings=False))


def test_bfloat16_is_close_and_pads_are_finite():
    model, ids = tiny(), tokens(1)
    half = copy.deepcopy(model).bfloat16()
    got = half(ids, attention_mask=torch.zeros(1, 9, dtype=torch.long)).last_hidden_state
    assert got.dtype == torch.bfloat16 and got.isfinite().all()
    error = (half(ids).last_hidden_state.float() - model(ids).last_hidden_state).pow(2).mean().sqrt()
    assert error < 0.05


# --- sizes and names


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_the_published_ones(size):
    layers, width, heads, count = SIZES[size]
    sizes = config(
        vocab_size=12000, num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads,
        intermediate_size=4 * width,
    )  # fmt: skip
    with torch.device("meta"):
        model = v2.RoFormerV2ForMaskedLM(sizes)
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == count == 12002 * width + layers * 12 * width**2


def test_names_are_the_published_ones_without_biases_and_norms():
    names = {name for name, _ in tiny(v2.RoFormerV2ForMaskedLM).named_parameters(remove_duplicate=False)}
    layer = [
        *(f"attention.self.{part}" for part in ("query", "key", "value")),
        "attention.output.dense", "intermediate.dense", "output.dense",
    ]  # fmt: skip
    assert names == {
        "roformer.embeddings.word_embeddings.weight",
        "roformer.embeddings.token_type_embeddings.weight",
        "cls.predictions.decoder.weight",
        *(f"roformer.encoder.layer.{i}.{part}.weight" for i in range(2) for part in layer),
    }


def test_the_shared_reading_of_architectures_understands_it():
    read = read_architecture(tiny(v2.RoFormerV2ForMaskedLM))
    assert read.family == "bert" and read.tied and len(read.blocks) == 2
    assert read.blocks[0].attention.head_dim == 8


# --- the host's machinery


@pytest.mark.parametrize("auto", HEADS)
def test_auto_classes_save_and_load_every_head(auto, tmp_path):
    model = tiny(HEADS[auto], **({} if auto == "AutoModelForMaskedLM" else {"num_labels": 2}))
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, auto).from_pretrained(tmp_path)
    assert type(loaded) is HEADS[auto] and not loaded.training
    ids = tokens()[:, None].expand(2, 3, 9) if auto == "AutoModelForMultipleChoice" else tokens()
    assert torch.equal(loaded(ids)[0], model(ids)[0])
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict()) - {
        "cls.predictions.decoder.weight"
    }


def test_heads_compute_what_they_say():
    ids = tokens()
    classes = tiny(HEADS["AutoModelForSequenceClassification"], num_labels=4)
    hidden = classes.roformer(ids).last_hidden_state
    output = classes(ids, labels=torch.tensor([1, 3]))
    assert torch.allclose(output.logits, classes.classifier(hidden[:, 0]), atol=1e-6)
    assert torch.allclose(output.loss, torch.nn.functional.cross_entropy(output.logits, torch.tensor([1, 3])))
    number = tiny(HEADS["AutoModelForSequenceClassification"], num_labels=1)
    output = number(ids, labels=torch.tensor([0.5, 2.0]))
    assert torch.allclose(output.loss, (output.logits[:, 0] - torch.tensor([0.5, 2.0])).square().mean())
    tags = tiny(HEADS["AutoModelForTokenClassification"], num_labels=4)
    labels = torch.where(torch.arange(9) < 3, -100, ids % 4)
    output = tags(ids, labels=labels)
    assert torch.allclose(output.loss, torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten()))
    answers = tiny(HEADS["AutoModelForQuestionAnswering"])
    output = answers(ids, start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([4, 99]))
    start = torch.nn.functional.cross_entropy(output.start_logits, torch.tensor([1, 2]))
    end = torch.nn.functional.cross_entropy(output.end_logits[:1], torch.tensor([4]))
    assert torch.allclose(output.loss, (start + end) / 2)
    choices = tiny(HEADS["AutoModelForMultipleChoice"])
    several = torch.stack([ids, tokens(seed=2), tokens(seed=3)], 1)
    output = choices(several, labels=torch.tensor([2, 0]))
    assert output.logits.shape == (2, 3)
    alone = choices(tokens(seed=2)[1:, None]).logits
    assert torch.allclose(output.logits[1, 1], alone[0, 0], atol=1e-5)
    embedded = choices(inputs_embeds=choices.roformer.embeddings.word_embeddings(several)).logits
    assert torch.allclose(embedded, output.logits, atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient():
    model = tiny(v2.RoFormerV2ForMaskedLM, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    model.residual_alpha = 0.5
    model(tokens(), labels=tokens()).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    for reentrant in (True, False):
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(tokens(), labels=tokens()).loss.backward()
        for name, parameter in model.named_parameters():
            assert torch.allclose(parameter.grad, plain[name], atol=1e-6), name


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_compiles_without_a_graph_break(alpha):
    model = tiny(v2.RoFormerV2ForMaskedLM)
    model.residual_alpha = alpha
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    inputs = {"input_ids": tokens(), "attention_mask": mask, "labels": tokens()}
    assert torch.allclose(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5)
    compiled(**inputs).loss.backward()
    traced = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(**inputs).loss.backward()
    assert all(torch.allclose(a, p.grad, atol=1e-5) for a, p in zip(traced, model.parameters(), strict=True))
    model.residual_alpha = 0.0  # the compiled model reads the buffer and not a constant
    assert torch.allclose(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5)


def test_adapters_find_its_modules():
    peft = pytest.importorskip("peft")
    model = tiny(v2.RoFormerV2ForSequenceClassification, num_labels=2)
    names = ["query", "key", "value", "dense"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names, task_type="SEQ_CLS"))
    changed = [name for name, _ in adapted.named_modules() if name.endswith("lora_A")]
    assert len(changed) == 2 * 6
    adapted(tokens(), labels=torch.tensor([0, 1])).loss.backward()


def test_bad_input():
    model = tiny()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="hidden_size must be a multiple of twice num_attention_heads"):
        config(hidden_size=27)
    with pytest.raises(ValueError, match="layer_norm_eps must be > 0"):
        config(layer_norm_eps=0.0)


# --- published checkpoints


PUBLISHED = {
    "architectures": ["RoFormerForMaskedLM"], "attention_probs_dropout_prob": 0.1, "embedding_size": 24,
    "gradient_checkpointing": False, "hidden_act": "relu", "hidden_dropout_prob": 0.1, "hidden_size": 24,
    "initializer_range": 0.02, "intermediate_size": 48, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
    "model_type": "roformer", "norm_type": "rms_norm", "num_attention_heads": 3, "num_hidden_layers": 2,
    "pad_token_id": 0, "rotary_value": False, "type_vocab_size": 2, "use_bias": False, "use_cache": True,
    "vocab_size": 40,
}  # fmt: skip


def published(folder, state, **changes):
    (folder / "config.json").write_text(json.dumps({**PUBLISHED, **changes}))
    save_file({name: value.clone() for name, value in state.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def state_of(model):
    return {name: value for name, value in model.state_dict().items() if "alpha" not in name and "decoder" not in name}


def test_a_published_checkpoint_loads_under_its_own_names(tmp_path, caplog):
    model = tiny(v2.RoFormerV2ForMaskedLM)
    extra = {"roformer.encoder.embed_positions.weight": torch.zeros(512, 8)}
    folder = published(tmp_path, state_of(model) | extra)
    loaded, info = v2.RoFormerV2ForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.residual_alpha == 1.0 and loaded.config.model_type == "roformer_v2"
    assert not hasattr(loaded.config, "norm_type")
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    base = v2.RoFormerV2Model.from_pretrained(folder)
    assert torch.equal(base(tokens())[0], model.roformer(tokens())[0])
    loaded.save_pretrained(tmp_path / "again")
    assert type(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "again")) is type(model)
    assert v2.RoFormerV2Config.from_dict(PUBLISHED).hidden_act == "relu"


def test_first_version_checkpoints_are_refused_by_configuration_and_by_keys(tmp_path):
    old = transformers.RoFormerForMaskedLM(
        transformers.RoFormerConfig(
            vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48
        )
    )
    old.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="norm_type must be 'rms_norm'.*V1"):
        v2.RoFormerV2ForMaskedLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    with pytest.raises(ValueError, match=r"no biases and no LayerNorm weights, got \d+ of them \(.*bias.*V1"):
        v2.RoFormerV2ForMaskedLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LayerNorm"):
        v2.RoFormerV2Model.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, "rotary_value": True}))
    with pytest.raises(ValueError, match="rotary_value must be False"):
        v2.RoFormerV2Model.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, "model_type": "bert"}))
    with pytest.raises(ValueError, match="model_type must be"):
        v2.RoFormerV2Config.from_pretrained(tmp_path)


def tensorflow_names(state):
    for name, value in state.items():
        name = name.removeprefix("roformer.").replace(".", "/").replace("layer/", "layer_")
        table = name.startswith("embeddings")
        yield f"bert/{name.removesuffix('/weight')}{'' if table else '/kernel'}", (value if table else value.T).numpy()


def paddle_names(state):
    short = {"attention.self.query": "self_attn.q_proj", "attention.self.key": "self_attn.k_proj",
             "attention.self.value": "self_attn.v_proj", "attention.output.dense": "self_attn.out_proj",
             "intermediate.dense": "linear1", "output.dense": "linear2"}  # fmt: skip
    for name, value in state.items():
        table = "embeddings" in name
        name = name.replace("roformer.", "roformerv2.").replace("encoder.layer.", "encoder.layers.")
        for long, new in short.items():
            name = name.replace(long, new)
        yield name, (value if table else value.T).numpy()


@pytest.mark.parametrize("names, convert", [(tensorflow_names, convert_tensorflow), (paddle_names, convert_paddle)])
def test_other_frameworks_weights_are_renamed_and_transposed(names, convert):
    model = tiny(v2.RoFormerV2ForMaskedLM)
    foreign = dict(names(state_of(model)))
    if convert is convert_tensorflow:
        assert "bert/encoder/layer_1/attention/self/query/kernel" in foreign
        foreign = {f"{name}:0": value for name, value in foreign.items()} | {"global_step": torch.tensor(7)}
        foreign["bert/encoder/layer_0/output/dense/kernel/adam_m"] = torch.zeros(2)
    else:
        assert "roformerv2.encoder.layers.1.self_attn.out_proj.weight" in foreign
        foreign["roformerv2.encoder.layers.0.self_attn.rotary.sin"] = torch.zeros(2)
    fresh = v2.RoFormerV2ForMaskedLM(config()).eval()
    result = fresh.load_state_dict(convert(foreign), strict=False)
    assert set(result.missing_keys) == {"roformer.encoder.residual_alpha", "cls.predictions.decoder.weight"}
    assert not result.unexpected_keys
    assert torch.equal(fresh(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize(
    ("convert", "name", "message"),
    [
        (convert_tensorflow, "bert/encoder/layer_0/attention/self/query/bias", "no biases.*query/bias.*V1"),
        (convert_tensorflow, "bert/embeddings/LayerNorm/gamma", "LayerNorm/gamma"),
        (convert_tensorflow, "bert/pooler/dense/kernel", "names must be those of a RoFormerV2"),
        (convert_paddle, "roformerv2.encoder.layers.0.norm1.weight", "norm1.weight.*V1"),
        (convert_paddle, "roformer.encoder.layers.0.linear1.weight", "names must be those"),
    ],
)
def test_unknown_foreign_names_are_refused(convert, name, message):
    with pytest.raises(ValueError, match=message):
        convert({name: torch.zeros(2, 2)})


# --- initialisation


def check_drawn(weight, fan_in, layers):
    std = 1 / math.sqrt(fan_in * layers)
    noise = 0.9 / math.sqrt(weight.numel())  # relative standard error of a standard deviation, kurtosis 2.6
    assert weight.std().item() / std == pytest.approx(1, abs=max(0.02, 4 * noise))
    assert weight.abs().max() <= 2 * 1.1369 * std
    assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel())


def test_every_matrix_has_its_own_deviation():
    torch.manual_seed(0)
    model = v2.RoFormerV2ForMaskedLM(config(vocab_size=900, hidden_size=96, intermediate_size=384, num_hidden_layers=3))
    for name, parameter in model.named_parameters():
        fan_in = 384 if name.endswith("output.dense.weight") and "attention" not in name else 96
        check_drawn(parameter.detach(), fan_in, 3)


def test_the_function_for_any_model_sees_layouts_biases_norms_and_ties():
    sizes = {"vocab_size": 800, "n_embd": 96, "n_layer": 3, "n_head": 4, "n_positions": 200}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9.0)
    assert roformer_v2_init_(model, generator=torch.Generator().manual_seed(3)) is model
    first = {name: p.clone() for name, p in model.named_parameters()}
    for name, parameter in first.items():
        if "ln_" in name or name.endswith("bias"):
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all(), name
        else:
            check_drawn(parameter, 384 if "mlp.c_proj" in name else 96, 3)
    state = torch.random.get_rng_state()
    roformer_v2_init_(model, generator=torch.Generator().manual_seed(3))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(first[name], p) for name, p in model.named_parameters())
    assert model.lm_head.weight is model.transformer.wte.weight
    conv = torch.nn.Sequential(torch.nn.Conv2d(8, 64, 3), torch.nn.BatchNorm2d(64), torch.nn.Linear(64, 512))
    roformer_v2_init_(conv, layers=2)
    check_drawn(conv[0].weight.detach(), 72, 2)
    check_drawn(conv[2].weight.detach(), 64, 2)
    with pytest.raises(ValueError, match="layers must be a whole number >= 1"):
        roformer_v2_init_(conv)
    with pytest.raises(ValueError, match="weight must belong to a linear map.*Bilinear"):
        roformer_v2_init_(torch.nn.Bilinear(2, 3, 4), layers=1)


def test_truncation_draws_again_and_does_not_clip():
    drawn = truncated_normal_(torch.empty(200_000), 1.0, torch.Generator().manual_seed(0))
    assert drawn.abs().max() <= 2
    assert (drawn.abs() > 1.999).float().mean() < 1e-3  # clipping would leave 4.6 % there
    assert drawn.std().item() == pytest.approx(0.87962566, abs=2e-3)
    half = truncated_normal_(torch.empty(10, dtype=torch.bfloat16), 1.0, torch.Generator().manual_seed(0))
    whole = truncated_normal_(torch.empty(10), 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(half, whole.bfloat16())


# --- residual warm-up


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, i):
        row = tokens(1, 6, seed=i)[0]
        return {"input_ids": row, "labels": row}


def train(model, folder, steps, callbacks=(), **settings):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, report_to=[], save_strategy="steps",
        save_steps=2, use_cpu=True, disable_tqdm=True, learning_rate=1e-3, **settings,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Rows(), callbacks=list(callbacks))
    return trainer


class Watch(transformers.TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(model.residual_alpha)

    on_step_end = on_substep_end


def test_the_trainer_warms_up_saves_and_resumes(tmp_path, caplog):
    model, watch = tiny(v2.RoFormerV2ForMaskedLM), Watch()
    with caplog.at_level(logging.WARNING, "danlu.models"):
        train(model, tmp_path, 6, (ResidualWarmupCallback(4), watch), gradient_accumulation_steps=2).train()
    assert watch.seen == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1, 1, 1, 1]
    assert model.residual_alpha == 1.0
    assert "residual_alpha = 0.25" in caplog.text  # the checkpoint of step 2
    half_way = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "checkpoint-2")
    assert half_way.residual_alpha == 0.25
    again, watch = tiny(v2.RoFormerV2ForMaskedLM), Watch()
    resumed = train(again, tmp_path / "b", 6, (ResidualWarmupCallback(4), watch), gradient_accumulation_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert watch.seen == [0.5, 0.5, 0.75, 0.75, 1, 1, 1, 1]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    for (name, a), b in zip(model.named_parameters(), half_way.parameters(), strict=True):
        assert not torch.equal(a, b), name


def test_an_unfinished_warm_up_is_said(tmp_path, caplog):
    model = tiny(v2.RoFormerV2ForMaskedLM)
    with caplog.at_level(logging.WARNING, "danlu.models"):
        train(model, tmp_path, 2, (ResidualWarmupCallback(8),)).train()
    assert "ended at step 2 of the residual warm-up's 8" in caplog.text
    assert model.residual_alpha == 0.25
    caplog.clear()
    set_residual_alpha(model, 1.0)
    model.save_pretrained(tmp_path / "done")
    assert "residual_alpha" not in caplog.text


def test_any_module_with_the_buffer_can_be_warmed_up():
    block = torch.nn.Linear(2, 2)
    block.register_buffer("residual_alpha", torch.ones(()))
    assert set_residual_alpha(torch.nn.Sequential(block, copy.deepcopy(block)), 0.5) == 2
    assert block.residual_alpha == 0.5
    with pytest.raises(ValueError, match="must have a buffer residual_alpha.*Linear"):
        set_residual_alpha(torch.nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match=r"value must be in 0..1, got -1"):
        set_residual_alpha(block, -1)
    with pytest.raises(ValueError, match="steps must be a whole number >= 1, got 0"):
        ResidualWarmupCallback(0)
