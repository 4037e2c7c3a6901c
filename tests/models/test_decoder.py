from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import danlu
from danlu.attention.masks import make_mask
from danlu.attention.scale import log_n_factor, optimal_scale
from danlu.models.decoder.heads import (
    DanluConfig,
    DanluForCausalLM,
    DanluForMaskedLM,
    DanluForSequenceClassification,
)
from danlu.models.residual import deepnorm_constants

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
OWN = {
    "latent": {"kv_rank": 12, "rope_head_dim": 4},
    "linear": {"feature_map": "favor", "block_size": 4},
    "vq": {"num_codes": 6, "block_size": 4},
    "recurrent": {"state_size": 16},
}
KINDS = {
    "full": {},
    "grouped": {"num_key_value_heads": 2},
    "window": {"sliding_window": 4},
    "nope": {},
    "hybrid": {"sliding_window": 4, "log_n": 16},
    **OWN,
    "mixture": {"num_hidden_layers": 5, "sliding_window": 4, **{k: v for o in OWN.values() for k, v in o.items()}},
}
MIXTURE = ["recurrent", "vq", "latent", "linear", "window"]


def build(kind: str, seed: int = 0, cls: type = DanluForCausalLM, **options):
    mixer = MIXTURE if kind == "mixture" else kind
    torch.manual_seed(seed)
    return cls(DanluConfig(**{**SIZES, "mixer": mixer, **KINDS[kind], **options})).double().eval()


def tokens(batch: int = 2, length: int = 21, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-10) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


# --- it is a Llama until told otherwise ---


def test_the_default_decoder_is_the_hosts_llama_with_its_weights():
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval()
    ours = build("full", seed=1, num_key_value_heads=2).float()
    ours.load_state_dict(llama.state_dict())
    ids = tokens()
    assert torch.equal(ours(ids).logits, llama(ids).logits)
    assert torch.equal(
        ours.generate(ids, max_new_tokens=5, do_sample=False), llama.generate(ids, max_new_tokens=5, do_sample=False)
    )


def test_a_llama_checkpoint_loads_into_another_mixer(tmp_path):
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES))
    llama.save_pretrained(tmp_path)
    config = DanluConfig(**SIZES, mixer="window", sliding_window=4)
    window = DanluForCausalLM.from_pretrained(tmp_path, config=config).eval()
    assert torch.equal(window.model.layers[0].mlp.up_proj.weight, llama.model.layers[0].mlp.up_proj.weight)
    close(window(tokens(length=4)).logits, llama.eval()(tokens(length=4)).logits, 1e-5)  # shorter than the window


# --- every mixer ---


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_with_a_cache_in_any_chunks_is_the_full_call(kind):
    model, ids = build(kind), tokens()
    whole = model(ids).logits
    for chunks in ([21], [7, 1, 1, 5, 7], [1] * 21):
        cache, parts = DynamicCache(config=model.config), []
        for part in ids.split(chunks, 1):
            parts.append(model(part, past_key_values=cache, use_cache=True).logits)
        assert cache.get_seq_length() == 21
        close(torch.cat(parts, 1), whole, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_sees_a_later_one(kind):
    model, ids = build(kind), tokens(1)
    other = ids.clone()
    other[:, 13] = 50 - other[:, 13]
    before, after = model(ids).logits, model(other).logits
    close(after[:, :13], before[:, :13], 1e-12)
    assert (after[:, 13:] - before[:, 13:]).abs().max() > 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(kind, side):
    model, ids = build(kind), tokens(1, 9)
    pad = torch.zeros(1, 4, dtype=torch.long)
    padded = torch.cat((pad, ids) if side == "left" else (ids, pad), 1)
    mask = (padded > 0).long()
    where = slice(4, None) if side == "left" else slice(0, 9)
    both = torch.cat((padded, tokens(1, 13, seed=2)))
    mask = torch.cat((mask, torch.ones(1, 13, dtype=torch.long)))
    out = model(both, attention_mask=mask).logits
    assert out.isfinite().all()
    close(out[:1, where], model(ids).logits, 1e-6)
    close(out[1:], model(both[1:]).logits, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_generate_is_the_same_with_and_without_a_cache_and_by_beams(kind):
    model, ids = build(kind), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))
    beams = {**options, "num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_is_the_same_model(kind, tmp_path):
    model, ids = build(kind), tokens()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert isinstance(again, DanluForCausalLM)
    assert again.config.mixers == model.config.mixers
    close(again(ids).logits, model(ids).logits, 1e-6)  # the host builds rotation tables in another dtype


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(kind):
    model, ids = build(kind).train(), tokens()
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable()  # the name that every supported host version has
    for one in (model, twin):
        one(ids, labels=ids).loss.backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            close(a.grad, b.grad, 1e-9)
    for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_in_the_hosts_trainer(kind, tmp_path):
    model = build(kind).float()
    rows = [{"input_ids": row, "labels": row} for row in (torch.arange(33) % 7 + 1).unfold(0, 16, 1)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=6,
        learning_rate=1e-2,
        report_to=[],
        logging_steps=1,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_close_to_float32(kind):
    model, ids = build(kind), tokens()
    low = copy.deepcopy(model).bfloat16()
    out = low(ids).logits
    assert out.dtype == torch.bfloat16
    assert (out.double() - model(ids).logits).abs().mean() < 0.02 * model(ids).logits.abs().mean() + 0.01


def test_half_precision_checkpoints_keep_rates_and_codebooks_in_float32(tmp_path):
    build("mixture").float().save_pretrained(tmp_path)
    model = DanluForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wide = {
        name.split(".")[-1]
        for name, t in (*model.named_parameters(), *model.named_buffers())
        if t.dtype != torch.bfloat16
    }
    assert {"nu_log", "theta_log", "gamma_log"} <= wide
    assert model.model.layers[1].self_attn.codebook.codebook.dtype == torch.float32
    assert model.model.layers[0].self_attn.state_dict()["nu_log"].dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.eval().generate(tokens(2, 6), max_new_tokens=4, do_sample=False).shape == (2, 10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_is_eager(kind):
    model, ids = build(kind).float(), tokens()
    close(torch.compile(model)(ids).logits, model(ids).logits, 1e-4)


@pytest.mark.parametrize("mixer", [["full", "recurrent"], ["recurrent", "window"]])
def test_packed_texts_do_not_see_each_other(mixer):
    model, ids = build("full", mixer=mixer, sliding_window=4), tokens(1)
    packed = torch.cat((torch.arange(10), torch.arange(11)))[None]
    whole = model(ids, position_ids=packed, use_cache=False).logits
    close(whole[:, :10], model(ids[:, :10]).logits, 1e-6)
    close(whole[:, 10:], model(ids[:, 10:]).logits, 1e-6)


# --- mixers against their definition ---


def attention(model, ids, mask=None, heads=None):
    """One layer of attention by hand, from the module's parameters."""
    layer = model.model.layers[0]
    x = layer.input_layernorm(model.model.embed_tokens(ids))
    a, (batch, length) = layer.self_attn, ids.shape
    split = lambda y: y.view(batch, length, -1, a.head_dim).transpose(1, 2)  # noqa: E731
    return layer, x, split(a.q_proj(x)), split(a.k_proj(x)), split(a.v_proj(x))


def test_nope_with_log_n_and_key_norm_is_its_formula():
    model, ids = build("nope", log_n=8, key_norm=True, num_hidden_layers=1), tokens(1)
    layer, x, q, k, v = attention(model, ids)
    k = k / (k.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    q = q * log_n_factor(torch.arange(21), 8, clip=False).double()[:, None]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    positions = torch.arange(21)[None]
    rotary = model.model.rotary_emb(x, positions)
    close(layer.self_attn(x, rotary, None, positions)[0], layer.self_attn.o_proj(out), 1e-6)


def test_optimal_scale_is_that_of_half_the_training_length():
    model = build("full", attention_scale="optimal")
    assert model.model.layers[0].self_attn.scaling == pytest.approx(optimal_scale(32) / 8**0.5)
    assert build("full", attention_scale=0.3).model.layers[0].self_attn.scaling == 0.3


def test_hybrid_is_windows_with_a_last_layer_without_positions():
    config = DanluConfig(**SIZES, mixer="hybrid", sliding_window=4)
    assert config.mixers == ["window", "nope"]
    assert config.layer_types == ["sliding_attention", "full_attention"]
    cache = build("hybrid")(tokens(), use_cache=True).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [3, 21]


# --- masks ---


@pytest.mark.parametrize("mixer", ["full", "latent"])
@pytest.mark.parametrize("kind", ["bidirectional", "mixed_heads", "mixed_layers"])
def test_encoder_masks_are_their_dense_masks(mixer, kind):
    model = build(mixer, cls=DanluForMaskedLM, mask=kind)
    ids = tokens()
    padding = torch.ones_like(ids)
    padding[0, -3:] = 0
    out = model(ids, attention_mask=padding).logits
    reference = build(mixer, cls=DanluForMaskedLM, mask="bidirectional")
    reference.load_state_dict(model.state_dict())

    def dense(layer: int) -> torch.Tensor:
        name = {"mixed_layers": "anticausal" if layer % 2 else "causal"}.get(kind, kind)
        return make_mask(name, 21, padding=padding, heads=4).expand(2, 4, -1, -1)

    hooks = []
    for i, layer in enumerate(reference.model.layers):

        def put(module, args, kwargs, i=i):
            kwargs = {**kwargs, "attention_mask": dense(i)} if "attention_mask" in kwargs else kwargs
            args = (args[0], args[1], dense(i), *args[3:]) if len(args) > 2 else args
            return args, kwargs

        hooks.append(layer.self_attn.register_forward_pre_hook(put, with_kwargs=True))
    keep = padding.bool()
    close(out[keep], reference(ids, attention_mask=padding).logits[keep], 1e-9)


@pytest.mark.parametrize("mixer", ["full", "grouped", "nope", "latent"])
def test_a_prefix_sees_itself_and_the_rest_is_causal(mixer):
    model, ids = build(mixer, mask="prefix"), tokens()
    lengths = torch.tensor([5, 9])
    base = model(ids, prefix_lengths=lengths).logits
    for changed, first in ((3, 0), (12, 12)):
        other = ids.clone()
        other[:, changed] = 50 - other[:, changed]
        moved = (model(other, prefix_lengths=lengths).logits - base).abs().amax(-1) > 1e-9
        assert moved[:, first:].all()
        assert not moved[:, :first].any()
    causal = build(mixer, mask="causal")
    causal.load_state_dict(model.state_dict())
    close(model(ids, prefix_lengths=lengths * 0).logits, causal(ids).logits)


@pytest.mark.parametrize("mixer", ["full", "latent"])
def test_prefix_generation_takes_the_prompt_as_prefix_padded_or_not(mixer):
    model, ids = build(mixer, mask="prefix"), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    out = model.generate(ids, **options)
    assert torch.equal(out, model.generate(ids, use_cache=False, **options))
    alone = model.generate(ids[:1, 2:], max_new_tokens=5, do_sample=False)
    assert torch.equal(out[0, 6:], alone[0, 4:])
    beams = model.generate(ids, num_beams=2, **options)
    assert torch.equal(beams, model.generate(ids, num_beams=2, use_cache=False, **options))


def test_mixed_directions_work_with_eager_attention():
    model, ids = build("full", cls=DanluForMaskedLM, mask="mixed_heads"), tokens()
    sdpa = model(ids).logits
    model.set_attn_implementation("eager")
    close(model(ids).logits, sdpa, 1e-6)


# --- residual paths and initialisation ---


@pytest.mark.parametrize("residual", ["post", "deepnorm", "none"])
def test_residual_paths_are_their_formulas(residual):
    model, ids = build("full", residual=residual, num_hidden_layers=1), tokens()
    layer, x = model.model.layers[0], model.model.embed_tokens(ids)
    positions = torch.arange(21)[None]
    rotary = model.model.rotary_emb(x, positions)
    mix = lambda y: layer.self_attn(y, rotary, None, positions)[0]  # noqa: E731
    alpha = deepnorm_constants(n_decoder=1).decoder_alpha if residual == "deepnorm" else 1.0
    if residual == "none":
        y = layer.mlp(layer.post_attention_layernorm(mix(layer.input_layernorm(x))))
        y = model.model.norm(y)
    else:
        y = layer.input_layernorm(alpha * x + mix(x))
        y = layer.post_attention_layernorm(alpha * y + layer.mlp(y))
    close(model(ids).logits, model.lm_head(y))


@pytest.mark.parametrize("mixer", ["full", "latent"])
def test_deepnorm_starts_with_its_gains(mixer):
    torch.manual_seed(0)
    config = DanluConfig(
        vocab_size=8, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, mixer=mixer, residual="deepnorm"
    )
    model = DanluForCausalLM(config)
    beta = deepnorm_constants(n_decoder=6).decoder_beta
    layer = model.model.layers[3]
    scaled = [layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj]
    plain = [layer.self_attn.q_proj]
    if mixer == "full":
        scaled.append(layer.self_attn.v_proj)
        plain.append(layer.self_attn.k_proj)
    for gain, parts in ((beta, scaled), (1.0, plain)):
        for part in parts:
            assert part.weight.std().item() == pytest.approx(gain * (2 / sum(part.weight.shape)) ** 0.5, rel=0.02)


# --- with the rest of the library, and the host ---


def test_extend_works_on_it():
    model, ids = build("full"), tokens()
    before = model(ids).logits
    danlu.extend(model, danlu.ReRoPE(window=8))
    assert (model(ids).logits - before).abs().max() > 1e-6
    danlu.restore(model)
    assert torch.equal(model(ids).logits, before)


def test_auto_classes_know_it():
    config = AutoConfig.for_model("danlu", **SIZES)
    assert isinstance(AutoModelForCausalLM.from_config(config), DanluForCausalLM)
    assert isinstance(AutoModelForMaskedLM.from_config(config), DanluForMaskedLM)
    scores = DanluForSequenceClassification(DanluConfig(**SIZES, num_labels=3))(tokens()).logits
    assert scores.shape == (2, 3)


def test_static_caches_serve_plain_mixers_and_are_refused_by_others():
    model, ids = build("hybrid"), tokens(2, 6)
    options = {"max_new_tokens": 5, "do_sample": False}
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, model.generate(ids, **options))
    with pytest.raises(ValueError, match="cache_implementation='static' must not be used"):
        build("recurrent").generate(ids, cache_implementation="static", **options)


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mixer": "ful"}, "mixer must be one of .*did you mean 'full'"),
        ({"mixer": ["full"]}, "mixer must name one mixer for each of the 2 layers, got 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"residual": "plain"}, "residual must be one of"),
        ({"mask": "mixed"}, "mask must be one of"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"sliding_window": 0}, "sliding_window must be at least 1"),
        ({"mixer": "recurrent", "mask": "prefix"}, "needs mixers that take any mask"),
        ({"mixer": "latent", "key_norm": True}, "key_norm is for mixers with whole keys"),
        ({"mixer": "linear", "attention_scale": 0.1}, "attention_scale is for softmax mixers"),
        ({"attention_scale": -1.0}, "attention_scale must be a number > 0"),
        ({"log_n": 1}, "log_n must be a trained length"),
        ({"mask": "mixed_heads", "num_key_value_heads": 1}, "needs an even number of heads"),
    ],
)
def test_bad_configurations_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        DanluConfig(**{**SIZES, **options})


def test_bad_calls_are_named():
    ids = tokens()
    with pytest.raises(ValueError, match="take DanluForMaskedLM"):
        build("full", mask="mixed_heads")
    with pytest.raises(ValueError, match="prefix_lengths must be given"):
        build("full", mask="prefix")(ids)
    with pytest.raises(ValueError, match="prefix_lengths is for mask 'prefix'"):
        build("full")(ids, prefix_lengths=torch.tensor([1, 1]))
    model = build("full", mask="prefix")
    lengths = torch.tensor([8, 8])
    cache = model(ids[:, :5], prefix_lengths=lengths.clamp(max=5), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="must end within the first call"):
        model(ids[:, 5:], past_key_values=cache, prefix_lengths=lengths)
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        build("full")()
    packed = torch.cat((torch.arange(10), torch.arange(11)))[None]
    with pytest.raises(ValueError, match="position_ids pack several texts"):
        build("vq")(ids[:1], position_ids=packed)
    cache = build("full")(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="start from an empty"):
        build("recurrent")(ids[:, :1], past_key_values=cache)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grouped", "mixture"])
def test_two_processes_share_the_matrices(kind, tmp_path):
    build(kind).float().save_pretrained(tmp_path)
    script = Path(__file__).with_name("tensor_parallel_script.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.split("error")[-1]) < 1e-5
