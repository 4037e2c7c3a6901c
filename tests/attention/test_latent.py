from __future__ import annotations

import copy

import pytest
import torch

from danlu.attention.latent.absorbed import absorbed_attention, prefers_absorbed
from danlu.attention.latent.cache import LatentLayer
from danlu.attention.latent.layer import MultiheadLatentAttention
from reference.latent import attention, grouped_attention, latent_attention

SIZES = {"hidden_size": 24, "heads": 3, "kv_rank": 10, "nope_dim": 6, "rope_dim": 4, "value_dim": 5}


def layer(dtype: torch.dtype = torch.float64, **changes) -> MultiheadLatentAttention:
    made = MultiheadLatentAttention(**{**SIZES, **changes}).to(dtype)
    for norm in (made.kv_a_layernorm, getattr(made, "q_a_layernorm", None)):
        if norm is not None:
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return made


def operands(batch=2, heads=3, queries=4, keys=9, dtype=torch.float64):
    nope, rope, value, rank = 6, 4, 5, 10
    return [
        torch.randn(batch, heads, queries, nope, dtype=dtype),
        torch.randn(batch, heads, queries, rope, dtype=dtype),
        torch.randn(batch, keys, rank, dtype=dtype),
        torch.randn(batch, keys, rope, dtype=dtype),
        torch.randn(heads, nope, rank, dtype=dtype),
        torch.randn(heads, value, rank, dtype=dtype),
    ]


def expanded(q_nope, q_rope, latent, k_rope, w_key, w_value, scale, visible=None):
    """The definition: make each head's keys and values, attend in float64."""
    rows = []
    for b in range(len(latent)):
        k = torch.stack([torch.cat([latent[b] @ w.T, k_rope[b]], -1) for w in w_key.double()])
        v = torch.stack([latent[b] @ w.T for w in w_value.double()])
        q = torch.cat([q_nope[b], q_rope[b]], -1)
        seen = None if visible is None else visible[b].expand(-1, q.shape[1], k.shape[1])
        rows.append(attention(q, k, v, scale, seen))
    return torch.stack(rows).unflatten(-1, (w_key.shape[0], -1)).transpose(1, 2)


# the absorbed core


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (4, 9), (9, 9)])
def test_absorbed_attention_is_attention_over_the_expanded_keys_and_values(queries, keys):
    parts = operands(queries=queries, keys=keys)
    torch.testing.assert_close(absorbed_attention(*parts, 0.3), expanded(*parts, 0.3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("step", [1, 2, 4, 5])
def test_reading_the_cache_in_stretches_changes_nothing(step, monkeypatch):
    parts = operands()
    whole = absorbed_attention(*parts, 0.3)
    monkeypatch.setattr("danlu.attention.latent.absorbed._SCORES", step * 2 * 3 * 4)
    torch.testing.assert_close(absorbed_attention(*parts, 0.3), whole, rtol=1e-12, atol=1e-12)


def test_masks_of_every_shape_hide_what_they_say(monkeypatch):
    parts = operands()
    for shape in [(2, 1, 4, 9), (2, 3, 4, 9), (1, 1, 1, 9), (2, 1, 1, 9)]:
        visible = torch.rand(shape) < 0.6
        full = visible.expand(2, shape[1], 4, 9)
        expected = expanded(*parts, 0.3, full)
        for step in (1 << 22, 60):
            monkeypatch.setattr("danlu.attention.latent.absorbed._SCORES", step)
            got = absorbed_attention(*parts, 0.3, mask=visible, causal=False)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
            additive = torch.zeros(shape, dtype=torch.float64).masked_fill(~visible, -torch.inf)
            got = absorbed_attention(*parts, 0.3, mask=additive, causal=False)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_mask_and_causality_hold_together():
    parts = operands()
    padding = torch.tensor([[False] * 3 + [True] * 6, [True] * 9])[:, None, None]
    causal = torch.ones(4, 9, dtype=torch.bool).tril(5)
    got = absorbed_attention(*parts, 0.3, mask=padding)
    torch.testing.assert_close(got, expanded(*parts, 0.3, padding & causal), rtol=1e-12, atol=1e-12)


def test_a_row_that_sees_nothing_is_zero_and_its_gradient_too(monkeypatch):
    for step in (1 << 22, 60):
        monkeypatch.setattr("danlu.attention.latent.absorbed._SCORES", step)
        parts = [x.requires_grad_() for x in operands()]
        mask = torch.ones(2, 1, 4, 9, dtype=torch.bool)
        mask[0, 0, 1] = False
        out = absorbed_attention(*parts, 0.3, mask=mask)
        assert (out[0, :, 1] == 0).all()
        (out**2).sum().backward()
        assert all(torch.isfinite(x.grad).all() for x in parts)
        assert (parts[0].grad[0, :, 1] == 0).all()


def test_a_sink_is_one_more_key_without_a_value():
    parts, sinks = operands(), torch.randn(3, dtype=torch.float64)
    plain = absorbed_attention(*parts, 0.3)
    k = torch.einsum("blc,hnc->bhln", parts[2], parts[4])
    scores = 0.3 * (torch.einsum("bhtn,bhln->bhtl", parts[0], k) + torch.einsum("bhtr,blr->bhtl", parts[1], parts[3]))
    scores = scores.masked_fill(~torch.ones(4, 9, dtype=torch.bool).tril(5), -torch.inf)
    mass = scores.exp().sum(-1)
    expected = plain * (mass / (mass + sinks.exp()[:, None]))[..., None]
    torch.testing.assert_close(absorbed_attention(*parts, 0.3, sinks=sinks), expected, rtol=1e-12, atol=1e-12)


def test_absorbed_attention_has_the_right_gradient():
    parts = [x.requires_grad_() for x in operands(batch=1, queries=2, keys=4)]
    assert torch.autograd.gradcheck(lambda *p: absorbed_attention(*p, 0.3), parts)


def test_no_tensor_of_heads_times_keys_times_width_is_made():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                    self.size = max(self.size, x.numel())
            return out

    heads, keys, nope, rope, value, rank = 8, 512, 16, 8, 16, 64
    parts = [
        torch.randn(1, heads, 1, nope),
        torch.randn(1, heads, 1, rope),
        torch.randn(1, keys, rank),
        torch.randn(1, keys, rope),
        torch.randn(heads, nope, rank),
        torch.randn(heads, value, rank),
    ]
    given = {x.untyped_storage().data_ptr() for x in parts}
    with Largest() as seen:
        absorbed_attention(*parts, 0.2)
    # the scores and nothing else grow with the cache: no copy of the latents either
    assert seen.size == heads * keys


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.randn(2, 3, 4)}, "q_nope and q_rope must be"),
        ({1: torch.randn(2, 3, 3, 4)}, "equal first three sizes"),
        ({2: torch.randn(1, 9, 10)}, "latent must be"),
        ({3: torch.randn(2, 9, 2)}, r"k_rope \(2, keys, 4\)"),
        ({4: torch.randn(3, 5, 10)}, r"w_key must be \(3, 6, 10\)"),
        ({5: torch.randn(2, 5, 10)}, "w_value"),
    ],
)
def test_wrong_shapes_are_refused(change, message):
    parts = operands(dtype=torch.float32)
    for index, x in change.items():
        parts[index] = x
    with pytest.raises(ValueError, match=message):
        absorbed_attention(*parts, 1.0)


def test_more_queries_than_keys_and_a_mask_of_another_size_are_refused():
    with pytest.raises(ValueError, match="at least as many keys as queries"):
        absorbed_attention(*operands(queries=5, keys=4), 1.0)
    with pytest.raises(ValueError, match="mask must be broadcastable"):
        absorbed_attention(*operands(), 1.0, mask=torch.ones(2, 1, 4, 8, dtype=torch.bool))


def test_no_key_at_all_gives_zero():
    assert (absorbed_attention(*operands(keys=0), 1.0, causal=False) == 0).all()


# the choice of form


def test_the_crossover_of_deepseek_v3_is_at_170_new_tokens():
    sizes = {"kv_rank": 512, "nope_dim": 128, "rope_dim": 64, "value_dim": 128}
    assert prefers_absorbed(170, 10**7, **sizes)
    assert not prefers_absorbed(171, 10**7, **sizes)
    assert prefers_absorbed(1, 4096, **sizes)
    assert not prefers_absorbed(4096, 4096, **sizes)
    assert not prefers_absorbed(1, 1, **sizes)


def test_the_choice_is_the_count_of_multiplications():
    for queries, keys in [(1, 2), (3, 3), (5, 40), (40, 41), (300, 5000), (120, 700)]:
        absorbed = queries * keys * (2 * 512 + 64) + queries * 512 * 256
        naive = queries * keys * (128 + 64 + 128) + keys * 512 * 256
        assert prefers_absorbed(queries, keys, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128) == (
            absorbed < naive
        )


def test_auto_takes_the_form_that_the_choice_says(monkeypatch):
    mla, calls = layer(), []
    real = absorbed_attention
    monkeypatch.setattr(
        "danlu.attention.latent.layer.absorbed_attention", lambda *a, **k: calls.append(a[0].shape[2]) or real(*a, **k)
    )
    cache = mla.make_cache()
    x = torch.randn(1, 30, 24, dtype=torch.float64)
    mla(x[:, :20], torch.arange(20), cache=cache)
    mla(x[:, 20:21], torch.arange(20, 21), cache=cache)
    mla(x[:, 21:], torch.arange(21, 30), cache=cache)
    expected = [n for n, total in ((20, 20), (1, 21), (9, 30)) if mla.prefers_absorbed(n, total)]
    assert calls == expected and 1 in calls and 20 not in calls


# the layer


@pytest.mark.parametrize("impl", ["mha", "absorbed"])
@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize(("q_rank", "bias"), [(None, False), (7, True)])
def test_the_layer_is_the_definition_in_both_forms(impl, layout, q_rank, bias):
    mla = layer(impl=impl, rope_layout=layout, q_rank=q_rank, bias=bias, rope_base=500.0)
    x, positions = torch.randn(2, 7, 24, dtype=torch.float64), [3, 4, 5, 9, 10, 11, 30]
    for norm_bias in (p for n, p in mla.named_parameters() if n.endswith("bias")):
        torch.nn.init.normal_(norm_bias)
    sizes = {key: SIZES[key] for key in ("heads", "nope_dim", "rope_dim", "value_dim")}
    expected = torch.stack(
        [latent_attention(row, positions, mla.state_dict(), base=500.0, layout=layout, **sizes) for row in x]
    )
    torch.testing.assert_close(mla(x, torch.tensor(positions)), expected, rtol=1e-11, atol=1e-11)


def test_layer_without_content_heads_shares_one_rotary_key():
    mla = layer(nope_dim=0)
    absorbed = copy.deepcopy(mla)
    absorbed.impl = "absorbed"
    x = torch.randn(1, 6, 24, dtype=torch.float64)
    torch.testing.assert_close(mla(x, torch.arange(6)), absorbed(x, torch.arange(6)), rtol=1e-12, atol=1e-12)


def test_with_identity_projections_it_is_grouped_query_attention():
    """GQA is latent attention whose latent is [k_1..k_g, v_1..v_g] and whose up-projections select and copy."""
    heads, groups, dim = 6, 2, 4
    q, k, v = (torch.randn(n, 5, dim, dtype=torch.float64) for n in (heads, groups, groups))
    latent = torch.cat([*k, *v], -1)[None]
    select_key = torch.zeros(heads, dim, 2 * groups * dim, dtype=torch.float64)
    select_value = select_key.clone()
    for s in range(heads):
        group = s * groups // heads
        select_key[s, :, group * dim : (group + 1) * dim] = torch.eye(dim, dtype=torch.float64)
        select_value[s, :, (groups + group) * dim : (groups + group + 1) * dim] = torch.eye(dim, dtype=torch.float64)
    none = torch.zeros(1, heads, 5, 0, dtype=torch.float64)
    got = absorbed_attention(q[None], none, latent, none[:, 0], select_key, select_value, 0.5)
    torch.testing.assert_close(got[0].transpose(0, 1).flatten(1), grouped_attention(q, k, v, 0.5))


@pytest.mark.parametrize("length", [1, 2, 7, 50, 170, 171, 200])
def test_both_forms_agree_on_chunks_around_the_crossover(length):
    mha, absorbed = layer(impl="mha"), layer(impl="absorbed")
    absorbed.load_state_dict(mha.state_dict())
    x = torch.randn(2, 30 + length, 24, dtype=torch.float64)
    outs = []
    for mla in (mha, absorbed):
        cache = mla.make_cache()
        with torch.no_grad():
            mla(x[:, :30], torch.arange(30), cache=cache)
            outs.append(mla(x[:, 30:], torch.arange(30, 30 + length), cache=cache))
    torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["auto", "mha", "absorbed"])
@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 1, 4, 1], [3, 0, 9]])
def test_cached_is_uncached_in_any_chunks(impl, chunks):
    mla = layer(impl=impl)
    x = torch.randn(2, 12, 24, dtype=torch.float64)
    whole, cache, outs, start = mla(x, torch.arange(12)), mla.make_cache(), [], 0
    for size in chunks:
        outs.append(mla(x[:, start : start + size], torch.arange(start, start + size), cache=cache))
        start += size
    assert cache.get_seq_length() == 12
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["mha", "absorbed"])
def test_padding_changes_no_real_token(impl):
    mla = layer(impl=impl)
    x = torch.randn(2, 8, 24, dtype=torch.float64)
    alone = mla(x[:1, 3:], torch.arange(5))
    mask = torch.tensor([[False] * 3 + [True] * 5, [True] * 8])
    positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
    x[0, :3] = 1e3
    left = mla(x, positions, mask=mask)
    torch.testing.assert_close(left[:1, 3:], alone, rtol=1e-11, atol=1e-11)
    assert torch.isfinite(left).all()
    # right padding in a prefill, then a step behind the gap
    cache = mla.make_cache()
    right = torch.cat([x[:1, 3:7], torch.full((1, 2, 24), 1e3, dtype=torch.float64)], 1)
    real = torch.tensor([[True] * 4 + [False] * 2])
    mla(right, torch.arange(6), mask=real, cache=cache)
    step = mla(x[:1, 7:], torch.tensor([4]), mask=torch.cat([real, torch.ones(1, 1, dtype=torch.bool)], 1), cache=cache)
    torch.testing.assert_close(step, alone[:, 4:], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", ["mha", "absorbed"])
def test_a_row_of_padding_alone_is_finite_with_finite_gradients(impl):
    mla = layer(impl=impl)
    x = torch.randn(2, 4, 24, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[False] * 4, [True] * 4])
    out = mla(x, torch.arange(4), mask=mask)
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("heads", [1, 3])
def test_a_four_dimensional_mask_replaces_causality(heads):
    visible = (torch.rand(2, heads, 5, 5) < 0.5) | torch.eye(5, dtype=torch.bool)
    mla = layer(impl="mha")
    absorbed = layer(impl="absorbed")
    absorbed.load_state_dict(mla.state_dict())
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    sizes = {key: SIZES[key] for key in ("heads", "nope_dim", "rope_dim", "value_dim")}
    expected = torch.stack(
        [
            latent_attention(row, list(range(5)), mla.state_dict(), base=1e4, visible=seen, **sizes)
            for row, seen in zip(x, visible, strict=True)
        ]
    )
    for module in (mla, absorbed):
        torch.testing.assert_close(module(x, torch.arange(5), mask=visible), expected, rtol=1e-11, atol=1e-11)


def test_shifting_all_positions_changes_nothing():
    for impl in ("mha", "absorbed"):
        mla = layer(impl=impl)
        x = torch.randn(1, 9, 24, dtype=torch.float64)
        torch.testing.assert_close(mla(x, torch.arange(9)), mla(x, torch.arange(9) + 1000), rtol=1e-6, atol=1e-9)
        moved = mla(x, torch.arange(9) * 2)
        assert (moved - mla(x, torch.arange(9))).abs().max() > 1e-3


def test_gradients_of_both_forms_agree():
    mha, absorbed = layer(impl="mha"), layer(impl="absorbed")
    absorbed.load_state_dict(mha.state_dict())
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    for mla in (mha, absorbed):
        (mla(x, torch.arange(6)) ** 2).sum().backward()
    for (name, a), (_, b) in zip(mha.named_parameters(), absorbed.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10, msg=name)


def test_gradients_reach_through_a_cache():
    mla = layer(impl="absorbed")
    x = torch.randn(1, 6, 24, dtype=torch.float64)
    (mla(x, torch.arange(6)) ** 2).sum().backward()
    whole = {name: p.grad.clone() for name, p in mla.named_parameters()}
    mla.zero_grad()
    cache = mla.make_cache()
    outs = [mla(x[:, t : t + 1], torch.tensor([t]), cache=cache) for t in range(6)]
    (torch.cat(outs, 1) ** 2).sum().backward()
    for name, p in mla.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", ["mha", "absorbed"])
def test_bfloat16_is_as_close_to_float64_in_both_forms(impl):
    exact = layer(hidden_size=256, heads=4, kv_rank=64, nope_dim=32, rope_dim=16, value_dim=32, impl="mha")
    half = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict({name: p.double() for name, p in half.state_dict().items()})
    half.impl = impl
    x = torch.randn(1, 160, 256).bfloat16()
    expected, got = exact(x.double(), torch.arange(160)), half(x, torch.arange(160))
    assert got.dtype == torch.bfloat16
    assert (got.double() - expected).norm() / expected.norm() < 0.012


def test_checkpointing_leaves_output_and_gradient():
    mla = layer()
    x = torch.randn(1, 6, 24, dtype=torch.float64, requires_grad=True)
    out = mla(x, torch.arange(6))
    again = torch.utils.checkpoint.checkpoint(mla, x, torch.arange(6), use_reentrant=False)
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (again, out)))


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["mha", "absorbed"])
def test_a_compiled_layer_gives_the_same(impl):
    mla = layer(impl=impl)
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    mask = torch.tensor([[False, True, True, True, True, True], [True] * 6])
    compiled = torch.compile(mla, backend="aot_eager")
    for real in (None, mask):
        expected = mla(x, torch.arange(6), mask=real)
        torch.testing.assert_close(compiled(x, torch.arange(6), mask=real), expected, rtol=1e-12, atol=1e-12)
    caches = mla.make_cache(), mla.make_cache()
    for t in range(6):
        outs = [m(x[:, t : t + 1], torch.tensor([t]), cache=c) for m, c in zip((mla, compiled), caches, strict=True)]
        torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"rope_dim": 3}, "rope_dim must be even"),
        ({"nope_dim": -1}, "nope_dim must be 0 or more"),
        ({"q_rank": 0}, "q_rank must be at least 1"),
        ({"impl": "fast"}, "impl must be one of"),
        ({"eps": 0.0}, "eps must be > 0"),
    ],
)
def test_wrong_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        layer(**change)


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 5), torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 2, 5, 5, dtype=torch.bool)]
)
def test_wrong_masks_are_refused(mask):
    with pytest.raises(ValueError, match="mask must be bool of shape"):
        layer(torch.float32)(torch.randn(2, 5, 24), torch.arange(5), mask=mask)


# the host's layer


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("q_rank", [None, 12])
def test_weights_of_the_host_layer_give_the_host_output(interleave, q_rank):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    config = DeepseekV3Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=q_rank,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        attention_bias=True,
        rope_interleave=interleave,
        attn_implementation="eager",
    )
    host = DeepseekV3Attention(config, 0)
    for p in host.parameters():
        torch.nn.init.normal_(p, std=0.3)
    for impl in ("mha", "absorbed"):
        ours = MultiheadLatentAttention(
            hidden_size=32,
            heads=4,
            kv_rank=16,
            q_rank=q_rank,
            nope_dim=8,
            rope_dim=4,
            value_dim=8,
            bias=True,
            rope_layout="interleaved" if interleave else "half",
            impl=impl,
        )
        ours.load_state_dict(host.state_dict())
        x, positions = torch.randn(2, 11, 32), torch.arange(11)[None]
        angles = DeepseekV3RotaryEmbedding(config)(x, positions)
        causal = torch.full((11, 11), torch.finfo(torch.float32).min).triu(1)[None, None]
        expected = host(x, position_embeddings=angles, attention_mask=causal)[0]
        torch.testing.assert_close(ours(x, positions[0]), expected, rtol=1e-5, atol=1e-5)


# the cache layer


def filled(tokens: int = 5, batch: int = 2) -> LatentLayer:
    cache = LatentLayer()
    cache.update(torch.randn(batch, 1, tokens, 8), torch.randn(batch, 1, tokens, 4))
    return cache


def test_the_cache_holds_rank_plus_rope_numbers_per_token():
    cache = LatentLayer()
    for _ in range(300):
        keys, values = cache.update(torch.randn(1, 1, 1, 512), torch.randn(1, 1, 1, 64))
    assert keys.numel() + values.numel() == 300 * 576
    held = keys.untyped_storage().nbytes() + values.untyped_storage().nbytes()
    assert held <= 576 * 4 * (300 * 9 // 8 + 64)


def test_appending_does_not_move_the_cache_at_each_token():
    cache = filled(5, 1)
    places = set()
    for _ in range(60):
        keys, _ = cache.update(torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 4))
        places.add(keys.data_ptr())
    assert len(places) == 1


def test_the_cache_appends_in_order_and_earlier_views_stay():
    cache, keys = LatentLayer(), torch.randn(2, 1, 200, 8)
    first, _ = cache.update(keys[:, :, :3], keys[:, :, :3, :4])
    before = first.clone()
    for t in range(3, 200):
        got, values = cache.update(keys[:, :, t : t + 1], keys[:, :, t : t + 1, :4])
    assert torch.equal(got, keys) and torch.equal(values, keys[..., :4]) and torch.equal(first, before)
    assert cache.get_mask_sizes(4) == (204, 0) and cache.get_max_length() == -1


def test_crop_takes_back_the_last_tokens():
    cache = filled(5)
    old = cache.keys.clone()
    cache.crop(-2)
    assert torch.equal(cache.keys, old[:, :, :3]) and cache.values.shape[2] == 3
    new = torch.randn(2, 1, 1, 8)
    keys, _ = cache.update(new, torch.randn(2, 1, 1, 4))
    assert torch.equal(keys, torch.cat([old[:, :, :3], new], 2))
    cache.crop(0)
    assert cache.get_seq_length() == 4
    with pytest.raises(ValueError, match="must be negative"):
        cache.crop(2)


def test_rows_of_the_cache_are_reordered_repeated_and_selected():
    cache = filled(5)
    old = cache.keys.clone()
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.keys, old[[0, 0, 1, 1]])
    cache.reorder_cache(torch.tensor([3, 0, 0, 2]))
    assert torch.equal(cache.keys, old[[1, 0, 0, 1]])
    cache.batch_select_indices(torch.tensor([3]))
    assert torch.equal(cache.keys, old[[1]]) and cache.values.shape == (1, 1, 5, 4)
    cache.update(torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 4))
    with pytest.raises(ValueError, match="batch size of the cache, 1, got 2"):
        cache.update(torch.randn(2, 1, 1, 8), torch.randn(2, 1, 1, 4))


def test_an_offloaded_and_a_reset_cache_go_on():
    cache = filled(5)
    cache.offload()
    cache.prefetch()
    assert cache.get_seq_length() == 5
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.keys is None
    cache.crop(-1)
    cache.reorder_cache(torch.tensor([0]))
    assert filled(1).get_seq_length() == 1
