"""DeepNorm on host models: the converted function, cache, checkpointing, saving, folding, refusals."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import transformers
from torch import nn

from danlu.hosts.architecture import UnsupportedArchitecture, read_architecture
from danlu.models.deepnorm import apply_deepnorm, fold_alpha, load_deepnorm, restore_deepnorm, vector_rate_groups
from reference.deepnorm_hosts import BUILD, DENSE, bert, gpt2, llama, shake, tokens

AUTO = {
    "llama": transformers.AutoModelForCausalLM,
    "gpt2": transformers.AutoModelForCausalLM,
    "bert": transformers.AutoModelForMaskedLM,
}


def converted(kind: str, **changes):
    model = BUILD[kind](**changes)
    apply_deepnorm(model)
    return shake(model)


@pytest.mark.parametrize("alpha", [None, 1.0, 5.0])
@pytest.mark.parametrize("kind", DENSE)
def test_a_converted_model_is_the_dense_formula(kind, alpha):
    model = BUILD[kind]()
    done = apply_deepnorm(model, alpha=alpha)
    assert done.alpha == (alpha or pytest.approx(6**0.25))
    model = shake(model).double()
    # The hosts' eager attention takes its softmax in float32, and Llama's norm too; sdpa stays in float64.
    model.set_attn_implementation("sdpa")
    output = model(tokens(), output_hidden_states=True)
    got = output.hidden_states[-1] if kind == "bert" else output.logits
    tolerance = 1e-5 if kind == "llama" else 1e-10
    assert torch.allclose(got, DENSE[kind](model, tokens(), done.alpha), atol=tolerance, rtol=tolerance)
    assert len(output.hidden_states) == 4


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma", "Glm", "SmolLM3", "Nemotron"])
def test_other_decoders_normalise_every_sublayer(kind):
    options = (
        {"no_rope_layers": [1, 0, 1]} if kind == "SmolLM3" else {"head_dim": 8} if kind in ("Gemma", "Glm") else {}
    )
    model = llama(kind, **options)
    before = [name for name, _ in model.named_parameters()]
    apply_deepnorm(model)
    assert [name for name, _ in model.named_parameters()] == before
    states = model(tokens(), output_hidden_states=True).hidden_states
    assert len(states) == 4
    for state in states[1:]:  # norms at rest: every block ends with mean square 1
        assert torch.allclose(state.square().mean(-1), torch.ones(2, 12), atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_decoding_with_a_cache_is_the_full_forward(kind):
    model = converted(kind)
    full = model(tokens(1, 20)).logits
    cache = transformers.DynamicCache(config=model.config)
    steps = [model(tokens(1, 20)[:, :7], past_key_values=cache).logits]
    steps += [model(tokens(1, 20)[:, i : i + 1], past_key_values=cache).logits for i in range(7, 20)]
    assert torch.allclose(torch.cat(steps, 1), full, atol=1e-5)
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    with_cache = model.generate(tokens(), attention_mask=torch.ones_like(tokens()), **options)
    without = model.generate(tokens(), attention_mask=torch.ones_like(tokens()), use_cache=False, **options)
    assert torch.equal(with_cache, without)
    assert with_cache.shape == (2, 24)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", BUILD)
def test_gradient_checkpointing_changes_no_gradient(kind, reentrant):
    model = converted(kind, **({"attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0} if kind == "bert" else {}))
    if kind == "gpt2":
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    model.train()
    model(tokens(), labels=tokens()).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert all(g.abs().sum() > 0 for g in plain.values())
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    blocks = [block.module for block in read_architecture(model).blocks]
    assert all(block.gradient_checkpointing for block in blocks)
    model(tokens(), labels=tokens()).loss.backward()
    assert plain.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in plain:
            assert torch.allclose(parameter.grad, plain[name], atol=1e-6), name


def test_half_precision_runs_and_stays_near():
    model = converted("llama")
    exact = model(tokens()).logits
    half = copy.deepcopy(model).to(torch.bfloat16)
    logits = half(tokens()).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("kind", BUILD)
def test_a_saved_model_loads_to_equal_logits(kind, tmp_path, caplog):
    model = converted(kind)
    expected = model(tokens()).logits
    model.save_pretrained(tmp_path)
    stock = AUTO[kind].from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert stock.config.deepnorm_alpha == pytest.approx(6**0.25)
    assert stock.config.deepnorm_norm == "post"
    assert (stock(tokens()).logits - expected).abs().max() > 1e-2  # the stock host knows nothing of alpha
    loaded = load_deepnorm(tmp_path, AUTO[kind], attn_implementation="eager")
    assert not loaded.training
    assert torch.equal(loaded(tokens()).logits, expected)
    restore_deepnorm(stock)
    assert torch.equal(stock(tokens()).logits, expected)
    with pytest.raises(ValueError, match="must not have DeepNorm already"):
        restore_deepnorm(stock)
    assert torch.equal(copy.deepcopy(loaded)(tokens()).logits, expected)


def test_the_last_norm_of_a_decoder_is_idle_and_frozen():
    model = converted("llama")
    expected = model(tokens()).logits
    assert not model.model.norm.weight.requires_grad
    with torch.no_grad():
        model.model.norm.weight.fill_(7)
    assert torch.equal(model(tokens()).logits, expected)


def test_hooks_and_recorded_outputs_survive_the_conversion():
    model = llama()
    model(tokens(), output_hidden_states=True)  # installs the host's recorders on the blocks
    seen = []
    handle = model.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output))
    apply_deepnorm(model)
    output = model(tokens(), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4
    assert len(output.attentions) == 3
    assert torch.equal(seen[0], output.hidden_states[2])
    handle.remove()
    model(tokens())
    assert len(seen) == 1


def test_pre_norm_only_draws_the_weights_anew():
    model, plain = llama(), llama()
    done = apply_deepnorm(model, "adam", "pre")
    assert done == (3, 1.0, pytest.approx(1 / 6), "pre")
    assert model.config.deepnorm_alpha == 1.0
    assert {type(module) for module in model.modules()} == {type(module) for module in plain.modules()}
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(tokens()).logits, model(tokens()).logits)
    restore_deepnorm(model)  # nothing to do
    assert {type(module) for module in model.modules()} == {type(module) for module in plain.modules()}


def test_alpha_one_and_gain_one_is_vanilla_post_norm():
    model = bert()
    stock = bert()
    apply_deepnorm(model, alpha=1, gain=1)
    shake(model)
    stock.load_state_dict(model.state_dict())
    assert torch.equal(stock(tokens()).logits, model(tokens()).logits)


# folding


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertModel", "BertForSequenceClassification", "BertLMHeadModel"])
def test_a_folded_encoder_is_a_stock_model_of_the_same_function(name, tmp_path):
    model = bert(name, layer_norm_eps=1e-3, is_decoder=name == "BertLMHeadModel")
    apply_deepnorm(model)
    model = shake(model).double()
    model.set_attn_implementation("sdpa")
    expected = model(tokens())[0]
    folded = copy.deepcopy(model)
    fold_alpha(folded)
    assert torch.allclose(folded(tokens())[0], expected, atol=1e-11, rtol=0)
    assert {type(module) for module in folded.modules()} == {type(module) for module in bert(name).modules()}
    assert not any(key.startswith("deepnorm") for key in folded.config.to_dict())
    folded.save_pretrained(tmp_path)
    stock = getattr(transformers, name).from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.allclose(stock(tokens())[0], expected, atol=1e-11, rtol=0)
    moved = [n for n, p in folded.named_parameters() if not torch.equal(p, dict(model.named_parameters())[n])]
    assert not any("pooler" in n or "cls" in n or "word_embeddings" in n or n.endswith("dense.bias") for n in moved)


def test_a_folded_encoder_keeps_its_function_under_dropout():
    model = converted("bert").double().train()
    folded = copy.deepcopy(model)
    fold_alpha(folded)
    torch.manual_seed(1)
    expected = model(tokens()).logits
    torch.manual_seed(1)
    assert torch.allclose(folded(tokens()).logits, expected, atol=1e-6)
    assert (expected - model(tokens()).logits).abs().max() > 1e-2  # dropout is on


def test_roberta_folds_too():
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=40, pad_token_id=0,
    )  # fmt: skip
    model = transformers.RobertaForMaskedLM(config).eval()
    apply_deepnorm(model, "adam")
    model = shake(model).double()
    expected = model(tokens()).logits
    fold_alpha(model)
    assert torch.allclose(model(tokens()).logits, expected, atol=1e-10)


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(ValueError, match="must have a post-norm DeepNorm residual, got none"):
        fold_alpha(bert())
    with pytest.raises(ValueError, match="LlamaForCausalLM, whose host has no post-norm block"):
        fold_alpha(converted("llama"))
    torch.manual_seed(0)
    electra = transformers.ElectraModel(
        transformers.ElectraConfig(
            vocab_size=64, embedding_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4,
        )
    ).eval()  # fmt: skip
    apply_deepnorm(electra)
    with pytest.raises(ValueError, match="got a projection between them"):
        fold_alpha(electra)


# with the host's libraries


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_trainer_trains_saves_and_resumes(kind, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in tokens(16)]
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, save_steps=2, learning_rate=1e-2,
        report_to=[], logging_steps=1, use_cpu=True, gradient_checkpointing=True, seed=0,
    )  # fmt: skip
    model = BUILD[kind]()
    apply_deepnorm(model)
    twin = copy.deepcopy(model)
    trainer = transformers.Trainer(model, options, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    model.eval()
    loaded = load_deepnorm(tmp_path / "checkpoint-4", AUTO[kind])
    assert torch.allclose(loaded(tokens()).logits, model(tokens()).logits, atol=1e-6)
    again = transformers.Trainer(twin, options, train_dataset=rows)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.allclose(twin.eval()(tokens()).logits, model(tokens()).logits, atol=1e-5)


def test_an_adapter_goes_on_a_converted_model():
    peft = pytest.importorskip("peft")
    model = converted("gpt2")
    expected = model(tokens()).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)).eval()
    assert torch.allclose(adapted(tokens()).logits, expected, atol=1e-6)
    adapted(tokens(), labels=tokens()).loss.backward()
    merged = adapted.merge_and_unload()
    assert torch.allclose(merged(tokens()).logits, expected, atol=1e-5)


# parameter groups


@pytest.mark.parametrize(("optimizer", "factor"), [("sgd", 6**-0.5), ("adam", 1 / 6)])
def test_vectors_get_the_smaller_rate(optimizer, factor):
    model = converted("gpt2")
    wide, narrow = vector_rate_groups(model, 0.1, optimizer)
    assert wide["lr"] == 0.1
    assert narrow["lr"] == pytest.approx(0.1 * factor, abs=1e-15)
    assert all(parameter.ndim == 2 for parameter in wide["params"])
    assert all(parameter.ndim == 1 for parameter in narrow["params"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in wide["params"] + narrow["params"]}
    assert len(trained) == len(list(model.parameters())) - 2  # less the idle norm
    before = model.transformer.h[0].ln_1.weight.clone()
    model(tokens(), labels=tokens()).loss.backward()
    torch.optim.SGD(vector_rate_groups(model, 0.1, factor=0.0)).step()
    assert torch.equal(model.transformer.h[0].ln_1.weight, before)


def test_vector_rate_groups_refuse_bad_values():
    with pytest.raises(ValueError, match="optimizer must be one of sgd, adam or factor given, got 'lamb'"):
        vector_rate_groups(llama(), 0.1, "lamb")
    with pytest.raises(ValueError, match="factor must be in 0..1, got 2"):
        vector_rate_groups(llama(), 0.1, factor=2)
    with pytest.raises(ValueError, match="learning_rate must be a finite number > 0"):
        vector_rate_groups(llama(), 0)


# refusals


def test_trained_weights_are_kept_unless_forced(tmp_path):
    llama().save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    before = {name: p.clone() for name, p in loaded.named_parameters()}
    with pytest.raises(ValueError, match=r"seems to be trained \(its weights were loaded from .*force=True"):
        apply_deepnorm(loaded)
    assert all(torch.equal(p, before[name]) for name, p in loaded.named_parameters())
    fresh = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    apply_deepnorm(fresh)  # a config from a checkpoint is no trained weight
    apply_deepnorm(loaded, force=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(dict(loaded.named_parameters())[name], before[name])


@pytest.mark.parametrize("kind", BUILD)
def test_forced_on_a_trained_model_the_blocks_are_those_of_a_fresh_one(kind):
    fresh, trained = BUILD[kind](), shake(BUILD[kind]())
    apply_deepnorm(fresh)
    apply_deepnorm(trained, force=True)
    blocks = [read_architecture(model).blocks for model in (fresh, trained)]
    for one, two in zip(*blocks, strict=True):
        assert all(map(torch.equal, one.module.parameters(), two.module.parameters()))
    table = trained.get_input_embeddings().weight
    assert not torch.equal(table, fresh.get_input_embeddings().weight)


def test_a_model_trained_here_is_told_by_its_vectors():
    moved = llama()
    with torch.no_grad():
        moved.model.layers[1].input_layernorm.weight[3] += 1e-3
    with pytest.raises(ValueError, match=r"model.layers.1.input_layernorm.weight has moved"):
        apply_deepnorm(moved)
    moved = gpt2()
    with torch.no_grad():
        moved.transformer.h[2].mlp.c_fc.bias[0] = 1e-3
    with pytest.raises(ValueError, match=r"transformer.h.2.mlp.c_fc.bias has moved"):
        apply_deepnorm(moved)


@pytest.mark.parametrize(
    ("kind", "options", "part"),
    [
        ("Granite", {"residual_multiplier": 0.8}, "got another residual path in GraniteDecoderLayer"),
        ("Cohere", {}, "must have two norms"),
        ("Olmo2", {}, "got another residual path in Olmo2DecoderLayer"),
        ("Gemma2", {"head_dim": 8}, "must have two norms, one before each sublayer, got"),
        ("Phi3", {"resid_pdrop": 0.1}, "must have no dropout of its own"),
    ],
)
def test_other_residual_paths_are_refused_and_left_as_they_were(kind, options, part):
    model = llama(kind, **options)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UnsupportedArchitecture, match=part):
        apply_deepnorm(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not hasattr(model.config, "deepnorm_alpha")


def test_a_residual_multiplier_of_one_is_the_plain_path():
    apply_deepnorm(llama("Granite", residual_multiplier=1.0))


def test_pre_norm_encoders_of_the_bert_layout_are_refused():
    config = transformers.RobertaPreLayerNormConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    with pytest.raises(UnsupportedArchitecture, match="must end its sublayers with dense, dropout and LayerNorm"):
        apply_deepnorm(transformers.RobertaPreLayerNormModel(config))


def test_wrong_requests_are_refused():
    with pytest.raises(ValueError, match="alpha must be 1 with norm='pre', got 2"):
        apply_deepnorm(llama(), "adam", "pre", alpha=2.0)
    with pytest.raises(ValueError, match="norm must be post for BertForMaskedLM"):
        apply_deepnorm(bert(), "adam", "pre")
    with pytest.raises(ValueError, match="norm must be post or pre, got 'both'"):
        apply_deepnorm(llama(), norm="both", alpha=2, gain=1)
    with pytest.raises(ValueError, match="gain must be a finite number > 0, got 0"):
        apply_deepnorm(llama(), gain=0)
    with pytest.raises(ValueError, match="it has post-norm alone"):
        apply_deepnorm(llama(), norm="pre")
    with pytest.raises(ValueError, match="has DeepNorm already"):
        apply_deepnorm(converted("llama"))
    with pytest.raises(ValueError, match="must hold deepnorm_alpha"):
        restore_deepnorm(llama())
    with torch.device("meta"), pytest.raises(ValueError, match="on the meta device"):
        apply_deepnorm(transformers.LlamaForCausalLM(llama().config))
    dispatched = llama()
    dispatched.model.layers[0].forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="convert the model first, then dispatch it"):
        apply_deepnorm(dispatched)
    with pytest.raises(ValueError, match="encoder_hidden_states must be None"):
        converted("gpt2")(tokens(), encoder_hidden_states=torch.zeros(2, 3, 32))


def test_shared_blocks_are_counted_by_application_with_a_warning(caplog):
    model = llama()
    model.model.layers = nn.ModuleList([model.model.layers[0]] * 3)
    with caplog.at_level(logging.WARNING, "danlu"):
        done = apply_deepnorm(model)
    assert "N = 3 counts applications" in caplog.text
    assert done.layers == 3
    assert model.model.layers[0] is model.model.layers[2]
    states = model(tokens(), output_hidden_states=True, use_cache=False).hidden_states
    assert torch.allclose(states[1].square().mean(-1), torch.ones(2, 12), atol=1e-3)
