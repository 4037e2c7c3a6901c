"""Hybrid window-full attention: which keys are seen, exactly, and that the cache changes nothing."""

import logging
import math

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

import danlu
from danlu.attention.hybrid import hwfa_config, suggest_window


def base(layers: int = 4, kind=LlamaConfig, **kwargs):
    return kind(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=2,
        pad_token_id=0,
        **kwargs,
    )


def build(config, attention="sdpa", dtype=torch.float64) -> SmolLM3ForCausalLM:
    torch.manual_seed(0)
    config._attn_implementation = attention
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def tokens(length: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(1))


# sizes


def test_the_published_window():
    assert suggest_window(24, 512) == 17


@pytest.mark.parametrize("layers", [2, 3, 5, 24])
@pytest.mark.parametrize("length", [64, 256, 511])
@pytest.mark.parametrize("alpha", [0.5, 0.75, 1.0])
def test_suggested_window_is_the_widest(layers, length, alpha):
    window = suggest_window(layers, length, alpha)
    assert (window - 1) * (layers - 1) + 1 <= alpha * length < window * (layers - 1) + 1


def test_hwfa_layout():
    config = hwfa_config(base(6), 128)
    assert config.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    assert config.no_rope_layers == [1, 1, 1, 1, 1, 0]
    assert config.sliding_window == suggest_window(6, 128) == 20
    assert config.max_position_embeddings == 128
    model = build(config)
    assert [bool(layer.self_attn.use_rope) for layer in model.model.layers] == [True] * 5 + [False]
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == [20] * 5 + [None]


@pytest.mark.parametrize(
    ("layers", "count", "expected"), [(24, 1, [12]), (24, 2, [8, 16]), (6, 2, [2, 4]), (2, 1, [1])]
)
def test_hwfa2_layout(layers, count, expected):
    config = hwfa_config(base(layers), 512, full_layers=count, nope_last=False)
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == expected
    assert config.no_rope_layers == [1] * layers
    assert hwfa_config(base(24), 512, nope_last=False).sliding_window == 64


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, SmolLM3Config])
def test_sizes_and_weights_carry_over(kind):
    source = base(3, kind, head_dim=12, rms_norm_eps=1e-4, tie_word_embeddings=True)
    before = source.to_dict()
    config = hwfa_config(source, 64)
    assert source.to_dict() == before
    for key in ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(config, key) == getattr(source, key)
    assert config.rope_parameters == source.rope_parameters
    assert (config.pad_token_id, config.eos_token_id) == (0, 2)


def test_windows_as_long_as_the_text_are_plain_llama():
    torch.manual_seed(0)
    llama = LlamaForCausalLM(base(3, rope_theta=500.0)).double().eval()
    model = build(hwfa_config(llama.config, 24, window=24, nope_last=False))
    model.load_state_dict(llama.state_dict())
    assert torch.allclose(model(tokens(24)).logits, llama(tokens(24)).logits, atol=1e-10)
    assert not torch.allclose(model(tokens(40)).logits, llama(tokens(40)).logits, atol=1e-3)


def test_save_and_load(tmp_path):
    config = hwfa_config(base(3), 64)
    saved = build(config)
    saved.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    for key in ("layer_types", "no_rope_layers", "sliding_window", "use_sliding_window"):
        assert getattr(loaded, key) == getattr(config, key)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(model(tokens(50)).logits, saved(tokens(50)).logits)


# what is seen


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("layers", "window"), [(1, 2), (1, 5), (3, 2), (3, 4)])
def test_receptive_field_of_windows_is_exact(layers, window, attention):
    config = hwfa_config(base(layers + 1), 64, window=window)
    model = build(config, attention).model
    model.layers = model.layers[:-1]
    config.num_hidden_layers = layers
    length, changed, reach = 20, 5, (window - 1) * layers
    ids = tokens(length)
    other = ids.clone()
    other[0, changed] = (ids[0, changed] + 7) % 63 + 1
    same = (model(ids).last_hidden_state == model(other).last_hidden_state).all(-1)[0]
    distance = torch.arange(length) - changed
    assert torch.equal(same, (distance < 0) | (distance > reach))


def test_last_layer_ignores_the_order_of_keys():
    model = build(hwfa_config(base(4), 64)).model
    x = torch.randn(1, 30, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    order = torch.cat((torch.randperm(29, generator=torch.Generator().manual_seed(3)), torch.tensor([29])))
    positions = model.rotary_emb(x, torch.arange(30)[None])
    same = [
        torch.allclose(
            layer(x, position_embeddings=positions)[:, -1],
            layer(x[:, order], position_embeddings=positions)[:, -1],
            atol=1e-10,
        )
        for layer in model.layers
    ]
    assert same == [False, False, False, True]


@pytest.mark.parametrize("nope_last", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cached_decode_and_chunks_are_the_full_forward(nope_last, attention):
    # float64 and 4 times the trained length, so that every window has slid many times.
    model = build(hwfa_config(base(4), 16, window=4, nope_last=nope_last), attention)
    ids = tokens(64, rows=2)
    full = model(ids).logits
    for cuts in ([1] * 24 + [40], [10, 3, 30, 1, 1, 1, 18]):
        cache = DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in ids.split(cuts, dim=1)]
        # The host's eager softmax and rotary angles are float32.
        assert torch.allclose(torch.cat(parts, 1), full, atol=1e-4 if attention == "eager" else 1e-10)
        entries = [layer.keys.shape[2] for layer in cache.layers]
        assert sorted(entries) == [3, 3, 3, 64]


def test_generate_padding_and_bf16():
    model = build(hwfa_config(base(4), 32), dtype=torch.float32)
    ids = tokens(40)
    alone = model.generate(ids, min_new_tokens=12, max_new_tokens=12, do_sample=False, pad_token_id=0)
    padded = torch.cat((torch.zeros(1, 6, dtype=torch.long), ids), 1)
    batch = torch.cat((padded, tokens(46, 2)[1:]))
    mask = (torch.arange(46) >= torch.tensor([[6], [0]])).long()
    both = model.generate(
        batch, attention_mask=mask, min_new_tokens=12, max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert torch.equal(both[0, 46:], alone[0, 40:])
    low = model.bfloat16()(ids).logits
    assert low.dtype == torch.bfloat16 and torch.isfinite(low).all()


@pytest.mark.parametrize("nope_last", [True, False])
def test_log_n_ties_to_the_full_layer(nope_last):
    model = build(hwfa_config(base(4), 16, window=4, nope_last=nope_last), dtype=torch.float32)
    full = model.config.layer_types.index("full_attention")
    queries = model.model.layers[full].self_attn.q_proj
    factor = (torch.arange(1.0, 65.0).log() / math.log(16))[:, None]
    handle = queries.register_forward_hook(lambda module, args, output: output * factor)
    expected = model(tokens(64)).logits
    handle.remove()
    with danlu.extended(model, danlu.LogN(16, clip=False)):
        assert torch.allclose(model(tokens(64)).logits, expected, atol=1e-4)
        cache = DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in tokens(64).split([40] + [1] * 24, dim=1)]
        assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-4)
    assert not torch.allclose(model(tokens(64)).logits, expected, atol=1e-2)


def test_gradients_reach_every_parameter():
    model = build(hwfa_config(base(4), 32)).train()
    model(tokens(32), labels=tokens(32)).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 512), "layers must be >= 2, got 1"),
        ((4, 1), "trained_length must be >= 2, got 1"),
        ((4, 512, 1.1), r"alpha must be in \(0, 1\], got 1.1"),
        ((4, 512, 0.0), r"alpha must be in \(0, 1\], got 0.0"),
        ((4, 512, float("nan")), "alpha must be"),
        ((40, 32), "too deep for trained_length 32 .* train on 54 tokens or more"),
    ],
)
def test_suggest_window_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        suggest_window(*arguments)


def test_too_deep_names_a_length_that_works():
    assert suggest_window(40, 54) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(window=65), r"window must be in 2..64 \(the trained length\), got 65"),
        (dict(window=1), "window must be in 2..64"),
        (dict(full_layers=0), r"full_layers must be in 1..3, got 0"),
        (dict(full_layers=4, nope_last=False), r"full_layers must be in 1..3, got 4"),
        (dict(full_layers=2), "nope_last=False allows more"),
        (dict(trained_length=1, nope_last=False), "trained_length must be >= 2"),
    ],
)
def test_hwfa_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        hwfa_config(base(4), **({"trained_length": 64} | arguments))


def test_hwfa_bad_base():
    with pytest.raises(TypeError, match="families llama, mistral, smollm3, got qwen2"):
        hwfa_config(base(4, Qwen2Config), 64)
    with pytest.raises(TypeError, match="got dict"):
        hwfa_config({}, 64)
    with pytest.raises(ValueError, match="has 1 layer"):
        hwfa_config(base(1), 64)
    scaled = base(4, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ValueError, match="rope_type 'linear'"):
        hwfa_config(scaled, 64)


def test_warns_when_windows_see_too_far(caplog):
    with caplog.at_level(logging.WARNING, "danlu"):
        hwfa_config(base(4), 64, window=17)
        assert "see" not in caplog.text
        hwfa_config(base(4), 64, window=32)
    assert "windows of 32 in 3 layers see 94 tokens, more than the 64 trained" in caplog.text
