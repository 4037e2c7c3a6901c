"""Conversion to latent attention: exact where it says so, and what it loses is what it reports."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from rich.console import Console
from transformers import AutoModelForCausalLM, DynamicCache

from context.families import COMMON, PLAIN_ROPE, VOCABULARY, YARN_ROPE, generate, left_padded, tokens, widen
from danlu.hosts.loading import load_causal_lm
from danlu.tuning.latent.conversion import freeze_silent, to_mla
from danlu.tuning.latent.moments import token_loss
from reference.conversion import default_frequencies, grouped_attention, latent_attention
from reference.latent_hosts import needs_latents

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
HOSTS = {
    "llama": ("LlamaConfig", {}),
    "llama-mha": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama-mqa": ("LlamaConfig", {"num_key_value_heads": 1}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "tie_word_embeddings": True}),
    "llama-yarn": ("LlamaConfig", {"rope_parameters": YARN_ROPE}),
    "llama-llama3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 24}),
}


def host(name: str = "llama", dtype: torch.dtype = torch.float64, **options):
    config, settings = HOSTS[name]
    config = getattr(transformers, config)(**{**COMMON, **settings, **options})
    return widen(AutoModelForCausalLM.from_config(config, attn_implementation="eager")).to(dtype).eval()


def target_frequencies(model) -> torch.Tensor:
    """The shared rotary key's frequencies, from the configuration alone."""
    parameters = model.config.rope_parameters
    table = default_frequencies(model.config.qk_rope_head_dim, parameters["rope_theta"])
    if parameters["rope_type"] == "default":
        return table
    assert parameters["rope_type"] == "longrope" and parameters["attention_factor"] == 1
    return table / torch.tensor(parameters["long_factor"], dtype=torch.float64)


def attention_inputs(module, hidden: int, length: int = 21) -> torch.Tensor:
    """What a layer can read at all: normed vectors times the gain of its norm."""
    x = torch.randn(length, hidden, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return module.weight.double() * x / x.pow(2).mean(-1, keepdim=True).sqrt()


def host_frequencies(model) -> tuple[torch.Tensor, float]:
    rotary = model.model.rotary_emb
    return rotary.inv_freq.double(), rotary.attention_scaling


def largest_gap(model, result) -> float:
    """Between both models' attention layers in float64, relative to the largest output."""
    frequencies, factor = host_frequencies(model)
    gaps = []
    for old, new in zip(model.model.layers, result.model.model.layers, strict=True):
        x = attention_inputs(old.input_layernorm, model.config.hidden_size)
        exact = grouped_attention(x, old.self_attn, frequencies, old.self_attn.scaling * factor**2)
        found = latent_attention(x, new.self_attn, target_frequencies(result.model))
        gaps.append(((found - exact).abs().max() / exact.abs().max()).item())
    return max(gaps)


@pytest.mark.parametrize("name", HOSTS)
def test_exact_conversion_gives_the_attention_of_the_host_in_float64(name):
    model = host(name)
    # Tables of plain frequencies are made in float64 here; the host's other types come from float32.
    limit = 1e-6 if name in ("llama-yarn", "llama-llama3") else 1e-12
    if limit == 1e-12:
        dim = model.config.hidden_size // 4 if name != "mistral" else 24
        model.model.rotary_emb.inv_freq = default_frequencies(dim, 100.0)
    assert largest_gap(model, to_mla(model, method="exact")) < limit


@pytest.mark.parametrize("name", HOSTS)
def test_stock_model_of_an_exact_conversion_gives_equal_logits(name):
    model, ids = host(name, torch.float32), tokens(3)
    result = to_mla(model, method="exact")
    before, after = model(ids).logits, result.model(ids).logits
    assert (before - after).abs().max() < 2e-5 * before.abs().max()
    assert type(result.model) is transformers.DeepseekV3ForCausalLM
    assert not result.model.training and result.model.dtype == torch.float32
    assert (result.model.lm_head.weight is result.model.model.embed_tokens.weight) == (name == "llama-biases")


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_checkpoint_loads_in_the_host_library_alone(name, tmp_path):
    model, ids = host(name, torch.float32), tokens(2)
    result = to_mla(model, 24, 16, calibration=tokens(4))
    result.model.save_pretrained(tmp_path)
    assert "danlu" not in (tmp_path / "config.json").read_text()
    loaded, details = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(details.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(ids).logits, result.model(ids).logits)


def test_generation_padding_and_cache_of_an_exact_conversion():
    model = host("qwen2", torch.float32)
    result = to_mla(model, method="exact")
    ids, mask = left_padded([tokens(1, 12)[0], tokens(1, 9, seed=2)[0]])
    assert torch.equal(generate(model, ids, mask), generate(result.model, ids, mask))
    whole = result.model(ids[:1]).logits
    cache = DynamicCache(config=result.model.config)
    steps = [
        result.model(ids[:1, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(ids.shape[1])
    ]
    assert (torch.cat(steps, 1) - whole).abs().max() < 1e-4 * whole.abs().max()


@pytest.mark.parametrize(("rank", "rope"), [(24, 16), (8, 4), (32, 32), (None, None)])
def test_cache_holds_as_many_numbers_as_reported(rank, rope):
    model = host("llama", torch.float32)
    result = to_mla(model, rank, rope, method="pca" if rank else "exact", calibration=tokens(2))
    needs_latents(result.model)
    cache = result.model(tokens(1, 10), use_cache=True).past_key_values
    held = sum(x.numel() for layer in cache.layers for x in (layer.keys, layer.values))
    assert held == 10 * 2 * result.report.elements_after
    assert result.report.bytes_after == 2 * 4 * result.report.elements_after
    before = model(tokens(1, 10), use_cache=True).past_key_values
    assert sum(x.numel() for layer in before.layers for x in (layer.keys, layer.values)) == (
        10 * 2 * result.report.elements_before
    )


@pytest.mark.parametrize("name", ["llama", "llama-mha", "qwen2"])
def test_mixing_heads_with_all_rotations_kept_is_exact(name):
    model = host(name)
    model.model.rotary_emb.inv_freq = default_frequencies(16, 100.0)
    keys = model.config.num_key_value_heads * 16
    result = to_mla(model, keys, keys, calibration=tokens(4))
    assert result.model.config.qk_nope_head_dim == 0
    assert largest_gap(model, result) < 1e-11


@pytest.mark.parametrize("balance", [True, False])
def test_balancing_is_undone_at_full_rank(balance):
    model = host("qwen2")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight *= 30
    result = to_mla(model, 48, 16, calibration=tokens(4), balance=balance)
    other = to_mla(model, 48, 16, calibration=tokens(4), balance=not balance)
    for row in result.report.layers:
        assert row.key_error < 1e-12 and row.value_error < 1e-10
        assert (row.balance > 5) == balance
    frequencies = target_frequencies(result.model)
    for old, one, two in zip(model.model.layers, result.model.model.layers, other.model.model.layers, strict=True):
        x = attention_inputs(old.input_layernorm, 64)
        first, second = (latent_attention(x, layer.self_attn, frequencies) for layer in (one, two))
        assert (first - second).abs().max() < 1e-10 * first.abs().max()


def test_balancing_spares_the_values():
    model = host("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight *= 30
    balanced, plain = (to_mla(model, 24, 16, calibration=tokens(8), balance=on).report for on in (True, False))
    for one, two in zip(balanced.layers, plain.layers, strict=True):
        assert one.value_error < 0.8 * two.value_error


def test_endless_damping_is_the_decomposition_of_the_weights():
    model = host("llama")
    damped = to_mla(model, 20, 16, calibration=tokens(4), damping=1e12)
    plain = to_mla(model, 20, 16, method="weight-svd", calibration=tokens(4))
    for one, two in zip(damped.report.layers, plain.report.layers, strict=True):
        assert one.value_error == pytest.approx(two.value_error, rel=1e-4)
        assert one.key_error == pytest.approx(two.key_error, rel=1e-4)


def test_the_trained_model_keeps_its_loss_and_text_beats_weights():
    model, tokenizer = load_causal_lm("danlu-nano")
    from danlu.context.text import held_out_text

    ids = torch.tensor(tokenizer(held_out_text()[300000:360000], verbose=False)["input_ids"][: 20 * 256]).view(20, 256)
    few, test = ids[:16], ids[16:]
    before = token_loss(model, test)
    light = to_mla(model, 192, 64, calibration=few)
    assert light.report.elements_after == light.report.elements_before == 256
    assert token_loss(light.model, test) - before < 0.02
    pca = to_mla(model, 96, 32, calibration=few)
    svd = to_mla(model, 96, 32, method="weight-svd", calibration=few)
    apart = to_mla(model, 96, 32, calibration=few, concentrate=False)
    losses = [token_loss(one.model, test) - before for one in (pca, apart, svd)]
    assert losses == sorted(losses) and losses[0] < 0.5 * losses[2]
    assert pca.report.loss_after - pca.report.loss_before < 0.4
    errors = [row.output_error for row in light.report.layers]
    assert max(errors) < 0.15 and all(a < b.output_error for a, b in zip(errors, pca.report.layers, strict=True))


def test_calibrated_norm_is_near_and_every_weight_trains():
    model, tokenizer = load_causal_lm("danlu-nano")
    from danlu.context.text import held_out_text

    ids = torch.tensor(tokenizer(held_out_text()[300000:320000], verbose=False)["input_ids"][: 6 * 256]).view(6, 256)
    result = to_mla(model, 192, 64, calibration=ids, norm="calibrated")
    assert 0 < result.report.loss_after - result.report.loss_before < 0.5
    assert all(parameter.requires_grad for parameter in result.model.parameters())
    assert freeze_silent(result.model) == []
    # The gain is the mean size of the latent, so the norm gives back latents of their own mean size.
    layer = result.model.model.layers[1].self_attn
    gain = layer.kv_a_layernorm.weight.detach()
    assert torch.equal(gain, gain[:1].expand_as(gain))
    sizes = []
    handle = layer.kv_a_layernorm.register_forward_pre_hook(lambda _, args: sizes.append(args[0].pow(2).mean(-1)))
    result.model(ids[:2])
    handle.remove()
    assert sizes[0].sqrt().mean().item() == pytest.approx(gain[0].item(), rel=0.1)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_healing_trains_around_the_silent_norms(name, tmp_path):
    model = host(name, torch.float32)
    to_mla(model, 16, 8, calibration=tokens(4)).model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    frozen = freeze_silent(loaded)
    latents = {"kv_a_layernorm.weight", "kv_a_proj_with_mqa.weight"}
    biased = {"kv_a_proj_with_mqa.bias", "q_a_layernorm.weight", "q_a_proj.weight", "q_a_proj.bias"}
    assert {name.split("self_attn.")[1] for name in frozen} == latents | (biased if name == "qwen2" else set())
    parameters = dict(loaded.named_parameters())
    assert not any(parameters[name].requires_grad for name in frozen)
    before = {name: parameters[name].detach().clone() for name in frozen}
    ids = tokens(4)
    optimiser = torch.optim.AdamW([p for p in loaded.parameters() if p.requires_grad], 1e-3)
    losses = []
    for _ in range(12):
        loss = loaded(ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(parameters[name], before[name]) for name in frozen)


def test_bfloat16_keeps_what_bfloat16_can():
    model, ids = host("llama", torch.float32), tokens(2)
    exact = model(ids).logits
    short = copy.deepcopy(model).to(torch.bfloat16)
    converted = to_mla(short, method="exact").model
    assert converted.dtype == torch.bfloat16
    gaps = [(one(ids).logits.float() - exact).norm() / exact.norm() for one in (short, converted)]
    assert gaps[1] < 2 * gaps[0]
    small = to_mla(short, 24, 16, calibration=tokens(4))
    assert small.report.element_bytes == 2 and torch.isfinite(small.model(ids).logits).all()
    with pytest.raises(ValueError, match="float16"):
        to_mla(copy.deepcopy(model).to(torch.float16), method="exact")


def test_the_host_model_is_left_as_it_was():
    model = host("llama", torch.float32).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = to_mla(model, 24, 16, calibration=tokens(2))
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    theirs = {parameter.data_ptr() for parameter in model.parameters()}
    assert not any(parameter.data_ptr() in theirs for parameter in result.model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_two_conversions_are_equal():
    model = host("llama", torch.float32)
    one, two = (to_mla(model, 24, 16, calibration=tokens(3), freq_fold="auto").model for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_report_prints_and_writes(tmp_path, capsys):
    result = to_mla(host("llama", torch.float32), 24, 16, calibration=tokens(3))
    Console(width=160).print(result.report)
    shown = capsys.readouterr().out
    assert "output error" in shown and "Cache" in shown
    data = json.loads(result.report.save(tmp_path / "report.json").read_text())
    assert data["elements_after"] == 40 and data["elements_before"] == 64 and data["bytes_before"] == 512
    assert len(data["layers"]) == 2 and data["layers"][0]["output_error"] > 0
    assert len(result.report.figure().axes) == 2
    assert "%" in result.report.summary() and "loss" in result.report.summary()
    plain = to_mla(host("llama", torch.float32), method="exact").report
    assert plain.loss_after is None and plain.layers[0].output_error is None and plain.table().row_count == 2


def test_output_error_is_measured_against_the_host_layer():
    model = host("llama", torch.float32)
    ids = tokens(1)
    result = to_mla(model, 16, 8, calibration=ids)
    frequencies, _ = host_frequencies(model)
    inputs = []
    handle = model.model.layers[1].register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    model(ids)
    handle.remove()
    layer = model.model.layers[1]
    x = layer.input_layernorm(inputs[0])[0].detach().double()
    exact = grouped_attention(x, layer.self_attn, frequencies, 0.25)
    found = latent_attention(x, result.model.model.layers[1].self_attn, target_frequencies(result.model))
    expected = ((found - exact).norm() / exact.norm()).item()
    assert result.report.layers[1].output_error == pytest.approx(expected, rel=1e-4)


REFUSED = [
    ("Qwen3Config", {"head_dim": 16}, "qwen3"),
    ("GPT2Config", {"vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 2}, "gpt2"),
    ("MistralConfig", {"sliding_window": 24}, "sliding-window attention of 24 tokens in every layer"),
    ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, r"in layers \[1\]"),
    ("LlamaConfig", {"mlp_bias": True}, "feed-forward"),
    ("LlamaConfig", {"rope_parameters": PLAIN_ROPE | {"partial_rotary_factor": 0.5}}, "rotates 0.5 of each head"),
    ("LlamaConfig", {"rope_parameters": PLAIN_ROPE | {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
]


@pytest.mark.parametrize(("config", "options", "message"), REFUSED)
def test_models_that_cannot_be_converted_are_refused(config, options, message):
    common = {} if config == "GPT2Config" else COMMON
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**{**common, **options}))
    with pytest.raises(ValueError, match=message):
        to_mla(model, method="exact")


def test_norms_of_queries_and_keys_adapters_and_quantised_weights_are_refused():
    model = host("llama")
    model.model.layers[1].self_attn.k_norm = torch.nn.RMSNorm(16)
    with pytest.raises(ValueError, match="layers.1.self_attn normalises queries or keys per head"):
        to_mla(model, method="exact")
    model = host("llama")
    model.config.quantization_config = {"bits": 4}
    with pytest.raises(ValueError, match="quantised"):
        to_mla(model, method="exact")
    model = host("llama")
    model.peft_config = {"default": None}
    with pytest.raises(ValueError, match="merge"):
        to_mla(model, method="exact")
    from danlu.context.extend import extended
    from danlu.context.methods import LogN

    model = host("llama")
    with extended(model, LogN(16)), pytest.raises(ValueError, match="restore"):
        to_mla(model, method="exact")
    with pytest.raises(ValueError, match="causal language model"):
        to_mla(host("llama").model, method="exact")


ARGUMENTS = [
    ({"method": "svd"}, ValueError, "method must be one of"),
    ({"norm": "off"}, ValueError, "norm must be one of"),
    ({}, ValueError, r"kv_rank must be given .* 1..48"),
    ({"kv_rank": 49, "rope_dim": 16}, ValueError, r"1..48 \(keys and values have 64 channels, 16"),
    ({"kv_rank": 0}, ValueError, "got 0"),
    ({"kv_rank": 16.0}, TypeError, "kv_rank must be an integer"),
    ({"kv_rank": 16, "rope_dim": 7}, ValueError, "even number in 2..32"),
    ({"kv_rank": 16, "rope_dim": 34}, ValueError, "even number in 2..32"),
    ({"kv_rank": 16, "method": "exact"}, ValueError, "kv_rank must be 32"),
    ({"kv_rank": 16, "calibration": None}, ValueError, "needs calibration"),
    ({"kv_rank": 16, "calibration": None, "method": "weight-svd", "norm": "calibrated"}, ValueError, "needs calibr"),
    ({"kv_rank": 16, "calibration": None, "method": "weight-svd", "freq_fold": "auto"}, ValueError, "pass calibration"),
    ({"kv_rank": 16, "calibration": [1, 2]}, TypeError, "list"),
    ({"kv_rank": 16, "calibration": torch.ones(40).long()}, TypeError, r"\(40,\)"),
    ({"kv_rank": 16, "calibration": torch.ones(3, 5).long()}, ValueError, "at least kv_rank = 16 tokens.* got 15"),
    ({"kv_rank": 16, "calibration": torch.ones(40, 1).long()}, ValueError, "length 1"),
    ({"kv_rank": 16, "calibration": torch.full((4, 9), VOCABULARY)}, ValueError, "0..96, got up to 97"),
    ({"kv_rank": 16, "freq_fold": 3}, ValueError, "divisor of 8"),
    ({"kv_rank": 16, "freq_fold": True}, ValueError, "divisor of 8"),
    ({"kv_rank": 16, "damping": -1.0}, ValueError, "damping"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), ARGUMENTS)
def test_bad_arguments_are_refused_before_any_work(arguments, kind, message, monkeypatch):
    monkeypatch.setattr("danlu.tuning.latent.conversion.collect", None)
    with pytest.raises(kind, match=message):
        to_mla(host("llama", torch.float32), **{"calibration": tokens(2), **arguments})
