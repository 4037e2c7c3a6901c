"""Linear attention: chunked, recurrent and quadratic forms agree, nothing leaks from the future, states are exact."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from danlu.attention.linear.engine import linear_attention, linear_attention_weights
from danlu.attention.linear.feature_maps import EluFeatures, ExpFeatures, FavorFeatures, FeatureMap, HardVQ, SoftVQ
from danlu.attention.linear.layer import LinearAttention
from reference import linear as dense

D, M = 4, 6


def data(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64)


def maps() -> dict[str, tuple[FeatureMap, object]]:
    favor, codebook = FavorFeatures(D, M), data(2, M, D)
    rows, root = favor.projection.double(), D**-0.25
    return {
        "favor": (favor, lambda q, k, h: dense.favor_weight(root * q, root * k, rows)),
        "exp": (ExpFeatures(D), lambda q, k, h: dense.exp_weight(q, k)),
        "elu": (EluFeatures(D), lambda q, k, h: dense.elu_weight(q, k)),
        "soft": (
            SoftVQ(codebook, tau=0.5),
            lambda q, k, h: dense.soft_vq_weight(root * q, root * k, codebook[h], 0.5),
        ),
        "hard": (HardVQ(codebook), lambda q, k, h: dense.hard_vq_weight(root * q, root * k, codebook[h])),
    }


NAMES = ("favor", "exp", "elu", "soft", "hard")


@pytest.mark.parametrize("name", NAMES)
def test_chunked_and_recurrent_and_quadratic_forms_are_the_reference(name):
    feature_map, weight = maps()[name]
    q, k, v = data(2, 4, 11, D), data(2, 2, 11, D), data(2, 2, 11, 3)
    expected = dense.weighted_attention(q, k, v, weight)
    for chunk in (1, 4, 11, 100):
        out, _ = linear_attention(q, k, v, feature_map, chunk=chunk)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weights = linear_attention_weights(q, k, feature_map)
    torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), expected, rtol=1e-12, atol=1e-12)
    both = linear_attention(q, k, v, feature_map, causal=False, chunk=4)[0]
    torch.testing.assert_close(both, dense.weighted_attention(q, k, v, weight, causal=False), rtol=1e-12, atol=1e-12)


def test_float32_stays_within_1e_5_of_float64():
    q, k, v = data(1, 2, 70, 16), data(1, 2, 70, 16), data(1, 2, 70, 16)
    feature_map = FavorFeatures(16, 64)
    wide = linear_attention(q, k, v, feature_map)[0]
    for chunk in (1, 16, 64):
        narrow = linear_attention(q.float(), k.float(), v.float(), feature_map, chunk=chunk)[0]
        assert (narrow - wide).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cuts", [(5,), (1, 2, 3), (10,)])
def test_a_state_goes_on_exactly(name, cuts):
    feature_map, _ = maps()[name]
    q, k, v = data(2, 4, 11, D), data(2, 2, 11, D), data(2, 2, 11, 3)
    whole, last = linear_attention(q, k, v, feature_map, chunk=3)
    state, outs = None, []
    for start, stop in zip((0, *cuts), (*cuts, 11), strict=True):
        part = (x[:, :, start:stop] for x in (q, k, v))
        out, state = linear_attention(*part, feature_map, chunk=3, state=state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), whole, rtol=1e-12, atol=1e-12)
    for a, b in zip(state, last, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_packed_documents_are_separate_runs(name):
    feature_map, weight = maps()[name]
    q, k, v = data(2, 2, 12, D), data(2, 2, 12, D), data(2, 2, 12, 3)
    # an id that comes back is another document
    segments = torch.tensor([[7] * 5 + [8] * 2 + [7] * 5, [3] * 9 + [1] * 3])
    out, state = linear_attention(q, k, v, feature_map, chunk=4, segment_ids=segments)
    torch.testing.assert_close(
        out, dense.weighted_attention(q, k, v, weight, segments=segments), rtol=1e-12, atol=1e-12
    )
    alone, last = linear_attention(q[1:, :, 9:], k[1:, :, 9:], v[1:, :, 9:], feature_map)
    torch.testing.assert_close(out[1:, :, 9:], alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.total[1:], last.total, rtol=1e-12, atol=1e-12)


def test_a_loud_document_does_not_drown_the_next():
    q, k, v = torch.randn(1, 1, 8, D), torch.randn(1, 1, 8, D), torch.randn(1, 1, 8, 3)
    k[:, :, :4] += 300
    segments = torch.tensor([[0] * 4 + [1] * 4])
    out = linear_attention(q, k, v, ExpFeatures(D), segment_ids=segments)[0]
    torch.testing.assert_close(
        out[:, :, 4:], linear_attention(q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], ExpFeatures(D))[0]
    )


@pytest.mark.parametrize("name", NAMES)
def test_padding_on_either_side_and_in_the_middle_changes_nothing(name):
    feature_map, weight = maps()[name]
    q, k, v = data(3, 2, 9, D), data(3, 2, 9, D), data(3, 2, 9, 3)
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0, 1, 1], [0] * 9]).bool()
    out, _ = linear_attention(q, k, v, feature_map, chunk=3, mask=mask)
    expected = dense.weighted_attention(q, k, v, weight, mask=mask)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    changed = torch.where(mask[:, None, :, None], k, k * 50 + 20)
    other, _ = linear_attention(q, changed, v, feature_map, chunk=3, mask=mask)
    torch.testing.assert_close(other, out, rtol=1e-12, atol=1e-12)
    both = linear_attention(q, k, v, feature_map, chunk=4, mask=mask, causal=False)[0]
    torch.testing.assert_close(
        both, dense.weighted_attention(q, k, v, weight, mask=mask, causal=False), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_jacobian_is_lower_triangular(name):
    feature_map, _ = maps()[name]
    q, v = data(1, 2, 7, D), data(1, 2, 7, 3)

    def by_position(k, v):
        return linear_attention(q, k, v, feature_map, chunk=3)[0].sum((0, 1, 3))

    for jacobian in torch.autograd.functional.jacobian(by_position, (data(1, 2, 7, D), v)):
        size = jacobian.abs().sum((1, 2, 4))
        assert size.triu(1).max() == 0
        if name != "hard":
            assert size.diagonal()[1:].min() > 0


@pytest.mark.parametrize("shout", [3.0, 40.0, 1e4])
def test_a_later_key_moves_no_earlier_output_through_the_stabiliser(shout):
    """Performer in PyTorch takes the maximum over all keys: its earlier outputs move."""
    feature_map = FavorFeatures(D, 16)
    q, k, v = (torch.randn(1, 2, 40, D) for _ in range(3))
    louder = k.clone()
    louder[:, :, 25:] *= shout
    for kind in (feature_map, ExpFeatures(D)):
        before, after = (linear_attention(q, keys, v, kind, chunk=32)[0] for keys in (k, louder))
        if shout <= 3:
            assert torch.equal(before[:, :, :25], after[:, :, :25])
        else:  # chunks may be cut elsewhere: other rounding, same numbers
            torch.testing.assert_close(before[:, :, :25], after[:, :, :25], rtol=1e-4, atol=1e-5)
        assert after.isfinite().all()


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_logits_beyond_the_range_of_exp_are_exact(chunk):
    """|q.k| above 88 overflows float32 when it is not shifted; it may rise and fall inside a chunk."""
    ramp = torch.linspace(-500, 500, 60).roll(17)[None, None, :, None]
    q, k, v = 3 * torch.randn(1, 1, 60, D), torch.randn(1, 1, 60, D) + ramp, torch.randn(1, 1, 60, 3)
    out = linear_attention(q, k, v, ExpFeatures(D), chunk=chunk)[0]
    logits = (q.double()[:, :, :, None] + k.double()[:, :, None]).logsumexp(-1)
    logits.masked_fill_(torch.ones(60, 60, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(out.double(), logits.softmax(-1) @ v.double(), rtol=1e-3, atol=2e-4)


def test_codes_that_appear_late_and_queries_that_want_them_early():
    codebook = torch.tensor([[10.0, 0.0], [0.0, 10.0]])
    k = codebook[torch.tensor([0, 0, 0, 1, 0])][None, None]
    q = torch.tensor([0.0, 100.0]).expand(1, 1, 5, 2)
    v = torch.arange(5.0)[None, None, :, None]
    out = linear_attention(q, k, v, HardVQ(codebook), scale=1.0)[0]
    torch.testing.assert_close(out.flatten(), torch.tensor([0.0, 0.5, 1.0, 3.0, 3.0]))


@pytest.mark.parametrize("name", ["favor", "exp", "elu", "soft"])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_exact(name, causal):
    feature_map, _ = maps()[name]
    inputs = [x.requires_grad_() for x in (data(1, 2, 5, D), data(1, 1, 5, D), data(1, 1, 5, 2))]
    if name == "soft":
        feature_map = SoftVQ(data(M, D), tau=0.5)
    mask = torch.tensor([[True, False, True, True, True]])

    def run(q, k, v):
        out, state = linear_attention(q, k, v, feature_map, chunk=2, causal=causal, mask=mask)
        # sums are relative to the peak, which has no gradient of its own
        level = state.peak.exp()
        return (out, state.mass * level, state.total * level[..., None]) if causal else out

    assert torch.autograd.gradcheck(run, inputs)


def test_gradients_flow_through_a_given_state_and_reach_parameters():
    feature_map = SoftVQ(data(M, D), tau=0.5)
    q, k, v = data(1, 1, 6, D), data(1, 1, 6, D).requires_grad_(), data(1, 1, 6, 2)
    whole = linear_attention(q, k, v, feature_map)[0]
    expected = torch.autograd.grad(whole.square().sum(), (k, feature_map.codebook))
    first, state = linear_attention(q[:, :, :4], k[:, :, :4], v[:, :, :4], feature_map)
    second, _ = linear_attention(q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], feature_map, state=state)
    found = torch.autograd.grad(first.square().sum() + second.square().sum(), (k, feature_map.codebook))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_state_is_float32_for_bfloat16_inputs_and_output_follows_the_values():
    q, k, v = (torch.randn(1, 2, 600, 8).bfloat16() for _ in range(3))
    feature_map = ExpFeatures(8)
    out, state = linear_attention(q, k, v, feature_map, chunk=50)
    exact = linear_attention(q.double(), k.double(), v.double(), feature_map)[0]
    assert out.dtype == torch.bfloat16 and {x.dtype for x in state} == {torch.float32}
    assert (out - exact).abs().max() < 0.02


def test_sums_go_on_beyond_256_equal_keys_in_bfloat16():
    k = torch.zeros(1, 1, 1000, 2, dtype=torch.bfloat16)
    _, state = linear_attention(k, k, k, ExpFeatures(2), chunk=1)
    assert torch.equal(state.mass, torch.full((1, 1, 2), 1000.0))


def test_empty_and_single_token_inputs():
    feature_map = FavorFeatures(D, M)
    none = torch.zeros(1, 2, 0, D)
    out, state = linear_attention(none, none, none, feature_map)
    assert out.shape == (1, 2, 0, D) and (state.mass == 0).all()
    none.requires_grad_()
    assert linear_attention(none, none, none, feature_map)[0].shape == (1, 2, 0, D)
    v = torch.randn(1, 2, 1, D)
    torch.testing.assert_close(linear_attention(v, v, v, feature_map)[0], v)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"scale": 0.0}, "scale must be > 0"),
        ({"mask": torch.ones(1, 3).bool()}, r"mask must be \(batch, length\) = \(1, 4\)"),
        ({"segment_ids": torch.ones(2, 4)}, r"segment_ids must be \(batch, length\)"),
        ({"q": torch.zeros(1, 3, 4, D)}, "kv_heads must divide heads"),
        ({"k": torch.zeros(1, 2, 5, D)}, "q, k and v must be"),
        ({"causal": False, "segment_ids": torch.ones(1, 4)}, "call once per document"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"q": torch.zeros(1, 2, 4, D), "k": torch.zeros(1, 2, 4, D), "v": torch.zeros(1, 2, 4, D)}
    with pytest.raises(ValueError, match=message):
        linear_attention(**(arguments | change), feature_map=ExpFeatures(D))


def test_maps_that_normalise_over_the_length_are_not_causal():
    from danlu.attention.linear.feature_maps import EfficientFeatures

    x = torch.zeros(1, 2, 4, D)
    with pytest.raises(ValueError, match="causal must be False with EfficientFeatures"):
        linear_attention(x, x, x, EfficientFeatures(D))


# the layer


def layer(name: str = "favor", **words) -> LinearAttention:
    return LinearAttention(hidden_size=12, heads=4, kv_heads=2, head_dim=4, feature_map=name, chunk=3, **words).double()


@pytest.mark.parametrize("name", ["favor", "exp", "elu", "soft_vq"])
def test_a_cached_layer_is_the_uncached_layer(name):
    mixer, x = layer(name), data(2, 10, 12)
    places = torch.arange(10)
    whole = mixer(x, places)
    for sizes in ((10,), (4, 3, 1, 1, 1), (1,) * 10):
        cache, outs, start = mixer.make_cache(), [], 0
        for size in sizes:
            outs.append(mixer(x[:, start : start + size], places[start : start + size], cache=cache))
            start += size
        torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-11, atol=1e-11)
    assert cache.get_seq_length() == 10 and cache.get_mask_sizes(2) == (12, 0) and cache.get_max_length() == -1


def test_left_and_right_padding_do_not_move_real_tokens_of_a_layer():
    mixer, x = layer(), data(1, 6, 12)
    alone = mixer(x, torch.arange(6))
    for left in (True, False):
        pad = data(1, 4, 12) * 9
        padded = torch.cat((pad, x) if left else (x, pad), 1)
        real = torch.tensor([[False] * 4 + [True] * 6 if left else [True] * 6 + [False] * 4])
        places = (real.cumsum(1) - 1).clamp_min(0)
        out = mixer(padded, places, real)
        torch.testing.assert_close(out[real][None], alone, rtol=1e-11, atol=1e-11)
        assert out.isfinite().all()


def test_a_left_padded_prompt_decodes_like_the_bare_one():
    mixer, x = layer(), data(1, 8, 12)
    whole = mixer(x, torch.arange(8))
    cache = mixer.make_cache()
    mask = torch.tensor([[False, False] + [True] * 8])
    places = (mask.cumsum(1) - 1).clamp_min(0)
    padded = torch.cat((data(1, 2, 12), x), 1)
    mixer(padded[:, :7], places[:, :7], mask[:, :7], cache)
    outs = [mixer(padded[:, i : i + 1], places[:, i : i + 1], mask[:, : i + 1], cache) for i in range(7, 10)]
    torch.testing.assert_close(torch.cat(outs, 1), whole[:, 5:], rtol=1e-11, atol=1e-11)


def test_cache_rows_can_be_chosen_repeated_and_reordered_but_tokens_not_taken_back():
    mixer, x = layer(), data(3, 6, 12)
    places = torch.arange(6)
    whole = mixer(x[[2, 0, 0]], places)
    cache = mixer.make_cache()
    mixer(x[:, :5], places[:5], cache=cache)
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.offload()
    cache.prefetch()
    out = mixer(x[[2, 0, 0], 5:], places[5:], cache=cache)
    torch.testing.assert_close(out, whole[:, 5:], rtol=1e-11, atol=1e-11)
    assert not cache.is_croppable
    cache.crop(0)
    with pytest.raises(ValueError, match="LinearCache cannot take tokens back"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="keeps a state and no keys"):
        cache.update(x, x)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.state is None


def test_scores_of_favor_depend_on_the_distance_only():
    mixer, x = layer(), data(1, 6, 12)
    # shifting all positions turns queries and keys alike: exp(q.k) stays, the random features see another pair
    exact = layer(features=20_000)
    exact.load_state_dict(mixer.state_dict() | {"feature_map.projection": exact.feature_map.projection})
    a, b = exact(x, torch.arange(6)), exact(x, torch.arange(6) + 50)
    assert (a - b).abs().max() < 0.05 * a.abs().max()
    assert layer("exp").rotary is None and layer(rotary=False).rotary is None


def test_layers_work_under_gradient_checkpointing_compile_and_bfloat16():
    from torch.utils.checkpoint import checkpoint

    mixer, x = layer(), data(1, 7, 12).requires_grad_()
    places = torch.arange(7)
    expected = torch.autograd.grad(mixer(x, places).sum(), (x, mixer.k_proj.weight))
    found = torch.autograd.grad(checkpoint(mixer, x, places, use_reentrant=False).sum(), (x, mixer.k_proj.weight))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    narrow = layer().bfloat16()
    assert narrow(x.bfloat16(), places).dtype == torch.bfloat16


def test_layers_start_from_their_seed_and_keep_global_randomness():
    one, two, other = layer("soft_vq"), layer("soft_vq"), layer("soft_vq", seed=1)
    assert torch.equal(one.feature_map.codebook, two.feature_map.codebook)
    assert not torch.equal(one.feature_map.codebook, other.feature_map.codebook)
    before = torch.get_rng_state()
    one.reset_parameters()
    mixer = layer()
    torch.set_rng_state(before)
    mixer.reset_parameters()
    mixer.redraw(5)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="redraw needs feature_map 'favor'"):
        one.redraw(1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"feature_map": "relu"}, "feature_map must be one of favor, exp, elu, soft_vq, got 'relu'"),
        ({"feature_map": "exp", "rotary": True}, "rotary must be False"),
        ({"heads": 5}, "heads must divide hidden_size"),
        ({"kv_heads": 3}, "kv_heads must divide heads = 4, got 3"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
    ],
)
def test_wrong_sizes_of_a_layer_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        LinearAttention(**({"hidden_size": 12, "heads": 4} | words))


def test_a_mask_of_four_dimensions_is_refused():
    with pytest.raises(ValueError, match="for attention with a state"):
        layer()(data(1, 3, 12), torch.arange(3), torch.ones(1, 1, 3, 3, dtype=torch.bool))


def test_a_trained_layer_learns():
    mixer = layer("soft_vq")
    x = data(4, 12, 12)
    target = x.cumsum(1) / torch.arange(1, 13)[:, None]
    descent = torch.optim.Adam(mixer.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        loss = nn.functional.mse_loss(mixer(x, torch.arange(12)), target)
        descent.zero_grad()
        loss.backward()
        descent.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
