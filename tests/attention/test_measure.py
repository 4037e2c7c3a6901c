"""Streaming statistics of attention rows against a dense matrix in float64 that shares no code with them."""

import math

import pytest
import torch
from torch import Tensor

from danlu.attention.measure import attention_stats
from danlu.lab.measuring import peak_bytes

F64 = torch.float64
NAMES = ("keys", "sparsity", "effective_tokens", "entropy", "max_probability", "distance", "sink_mass", "local_mass")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense(weights: Tensor, visible: Tensor, first: Tensor, sinks: int = 4, local: int = 32) -> dict[str, Tensor]:
    """Statistics of non-negative weights (batch, heads, Lq, Lk), by their definitions."""
    n_rows, n_keys = weights.shape[-2:]
    total = weights.sum(-1)
    p = weights / torch.where(total > 0, total, math.nan)[..., None]
    gap = (torch.arange(n_rows)[:, None] + n_keys - n_rows - torch.arange(n_keys)).abs()
    slot = torch.arange(n_keys)
    sunk = (slot >= first[:, None]) & (slot < first[:, None] + sinks)
    n = visible.expand_as(weights).sum(-1)
    effective = 1 / p.square().sum(-1)
    return {
        "keys": n,
        "sparsity": (p.sum(-1) / n) / (p.square().sum(-1) / n).sqrt(),
        "effective_tokens": effective,
        "entropy": -torch.special.xlogy(p, p).sum(-1),
        "max_probability": p.amax(-1),
        "distance": (p * gap).sum(-1),
        "sink_mass": (p * sunk[:, None, None]).sum(-1),
        "local_mass": (p * (gap < local)).sum(-1),
        "p": p,
    }


def softmax_weights(q: Tensor, k: Tensor, visible: Tensor, scale: float | None = None, cap=None, bias=None) -> Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if cap:
        scores = cap * (scores / cap).tanh()
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~visible, -math.inf)
    top = scores.amax(-1, keepdim=True)
    return (scores - top.masked_fill(top == -math.inf, 0)).exp()


def causal(n_rows: int, n_keys: int, window: int | None = None) -> Tensor:
    gap = torch.arange(n_rows)[:, None] + n_keys - n_rows - torch.arange(n_keys)
    return (gap >= 0) & (gap < (window or n_keys + 1))


def compare(stats, expected: dict[str, Tensor], tolerance: float) -> None:
    for name in NAMES:
        found, wanted = getattr(stats, name), expected[name]
        assert torch.equal(found.isnan(), wanted.isnan()), name
        assert torch.allclose(found.double(), wanted.double(), rtol=tolerance, atol=tolerance, equal_nan=True), name


ZERO = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize("block", [None, (1, 1), (7, 5), (64, 3), (100, 100)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_streaming_equals_dense_for_any_block(block, is_causal):
    q, k = 2 * draw(2, 4, 53, 8), 2 * draw(2, 2, 53, 8, seed=1)
    visible = causal(53, 53) if is_causal else torch.ones(53, 53, dtype=torch.bool)
    stats = attention_stats(q, k, causal=is_causal, block=block, sinks=3, local=6)
    compare(stats, dense(softmax_weights(q, k, visible), visible, ZERO, 3, 6), 1e-10)
    scores = (q @ k.repeat_interleave(2, 1).mT / 8**0.5).masked_fill(~visible, -math.inf)
    assert torch.allclose(stats.lse, scores.logsumexp(-1), atol=1e-12) and stats.target_mass is None


@pytest.mark.parametrize(
    ("n_rows", "n_keys", "window"), [(1, 40, None), (9, 40, 6), (40, 40, 1), (40, 40, 11), (3, 3, 9)]
)
def test_decode_rows_and_windows(n_rows, n_keys, window):
    q, k = draw(2, 4, n_rows, 8), draw(2, 4, n_keys, 8, seed=1)
    visible = causal(n_rows, n_keys, window)
    stats = attention_stats(q, k, causal=True, window=window, block=(4, 7), local=5)
    compare(stats, dense(softmax_weights(q, k, visible), visible, ZERO, 4, 5), 1e-10)


def test_masks_of_every_form_and_rows_that_see_nothing():
    q, k = draw(2, 4, 20, 8), draw(2, 2, 20, 8, seed=1)
    padding = torch.ones(2, 20, dtype=torch.bool)
    padding[0, :6] = padding[1, 15:] = False
    visible = causal(20, 20) & padding[:, None, None]
    first = torch.tensor([6, 0])
    expected = dense(softmax_weights(q, k, visible), visible, first)
    assert expected["entropy"][0, 0, :6].isnan().all() and not expected["entropy"][:, :, 6:].isnan().any()
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    infinite = torch.zeros(visible.shape, dtype=torch.bfloat16).masked_fill(~visible, -math.inf)
    options = {"block": (7, 6)}
    compare(attention_stats(q, k, causal=True, mask=padding, **options), expected, 1e-10)
    for mask in (visible, additive, infinite):
        compare(attention_stats(q, k, mask=mask, **options), expected, 1e-10)
    blank = attention_stats(q, k, causal=True, mask=padding)
    assert torch.equal(blank.lse[0, :, :6], torch.full((4, 6), -math.inf, dtype=F64))


def test_per_head_masks_biases_and_caps():
    q, k = 3 * draw(2, 4, 12, 8), draw(2, 2, 12, 8, seed=1)
    visible = torch.stack((causal(12, 12), causal(12, 12).T.clone(), causal(12, 12, 3), torch.ones(12, 12).bool()))[
        None
    ]
    bias = draw(1, 4, 12, 12, seed=4)
    expected = dense(softmax_weights(q, k, visible, 0.7, 1.5, bias), visible, ZERO)
    mask = bias.masked_fill(~visible, torch.finfo(F64).min)
    compare(attention_stats(q, k, mask=mask, scale=0.7, softcap=1.5, block=(5, 4)), expected, 1e-10)


@pytest.mark.parametrize("size", [1e4, 1e-6])
def test_huge_and_tiny_scores(size):
    q, k = draw(1, 2, 30, 4), draw(1, 2, 30, 4, seed=1)
    visible = causal(30, 30)
    stats = attention_stats(q, k, causal=True, scale=size, block=(30, 4))
    expected = dense(softmax_weights(q, k, visible, size), visible, ZERO[:1])
    compare(stats, expected, 1e-10)
    assert all(torch.isfinite(getattr(stats, name)).all() for name in NAMES)


def test_single_and_half_precision():
    q, k = draw(1, 2, 300, 16), draw(1, 2, 300, 16, seed=1)
    visible = causal(300, 300)
    exact = dense(softmax_weights(q.float().double(), k.float().double(), visible), visible, ZERO[:1])
    compare(attention_stats(q.float(), k.float(), causal=True, block=(64, 48)), exact, 1e-5)
    q, k = q.bfloat16(), k.bfloat16()
    exact = dense(softmax_weights(q.double(), k.double(), visible), visible, ZERO[:1])
    half = attention_stats(q, k, causal=True)
    assert half.entropy.dtype == torch.float32
    compare(half, exact, 1e-5)


@pytest.mark.parametrize("name", ["relu2", "linear", "signed"])
def test_other_kernels_are_measured_by_absolute_weight(name):
    q, k = draw(2, 2, 25, 8), draw(2, 2, 25, 8, seed=1)
    visible = causal(25, 25)
    scores = q @ k.mT
    if name == "relu2":
        kernel, scale = (lambda s: (s - 1.0).relu().square()), 0.35
    elif name == "linear":
        q, k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
        kernel, scale = (lambda s: s), 1.0
    else:
        kernel, scale = (lambda s: s), 0.35
    scores = scale * (q @ k.mT)
    weights = kernel(scores).abs().masked_fill(~visible, 0)
    stats = attention_stats(q, k, causal=True, kernel=kernel, scale=scale, block=(6, 9))
    compare(stats, dense(weights, visible, ZERO), 1e-10)
    if name == "relu2":
        assert stats.sparsity.isnan().any() and not stats.keys.eq(0).any()


def test_target_mass():
    q, k = draw(2, 3, 18, 8), draw(2, 3, 18, 8, seed=1)
    visible = causal(18, 18)
    p = dense(softmax_weights(q, k, visible), visible, ZERO)["p"]
    targets = torch.randint(-2, 20, (2, 3, 18), generator=torch.Generator().manual_seed(2))
    inside = (targets >= 0) & (targets < 18)
    expected = p.gather(-1, targets.clamp(0, 17)[..., None])[..., 0].where(inside, 0.0)
    stats = attention_stats(q, k, causal=True, targets=targets, block=(5, 4))
    assert torch.allclose(stats.target_mass, expected, atol=1e-12)
    one = attention_stats(q, k, causal=True, targets=torch.arange(18)[None, None])
    assert torch.allclose(one.target_mass, p.diagonal(dim1=-2, dim2=-1), atol=1e-12)


def test_a_learnt_sink_is_one_more_candidate():
    q, k, sink = draw(1, 2, 14, 8), draw(1, 2, 14, 8, seed=1), draw(2, seed=3)
    visible = causal(14, 14)
    scores = (q @ k.mT / 8**0.5).masked_fill(~visible, -math.inf)
    p = torch.cat((sink[None, :, None, None].expand(1, 2, 14, 1), scores), -1).softmax(-1)
    stats = attention_stats(q, k, causal=True, sink_logits=sink, sinks=0, block=(3, 5))
    assert torch.equal(stats.keys, (torch.arange(14) + 2).expand(1, 2, 14))
    assert torch.allclose(stats.effective_tokens, 1 / p.square().sum(-1), atol=1e-12)
    assert torch.allclose(stats.entropy, torch.special.entr(p).sum(-1), atol=1e-12)
    assert torch.allclose(stats.max_probability, p.amax(-1), atol=1e-12)
    assert torch.allclose(stats.sink_mass, p[..., 0], atol=1e-12)
    gap = (torch.arange(14)[:, None] - torch.arange(14)).abs()
    real = p[..., 1:] / p[..., 1:].sum(-1, keepdim=True)
    assert torch.allclose(stats.distance, (real * gap).sum(-1), atol=1e-12)


def test_first_token_may_have_left_the_cache():
    q, k = draw(2, 1, 1, 8), draw(2, 1, 10, 8, seed=1)
    p = (q @ k.mT / 8**0.5).softmax(-1)
    stats = attention_stats(q, k, causal=True, first=torch.tensor([-2, -9]))
    assert torch.allclose(stats.sink_mass[0], p[0, ..., :2].sum(-1)) and torch.equal(stats.sink_mass[1], ZERO[:1, None])


def test_memory_grows_with_length_and_not_with_its_square():
    def peak(length: int) -> int:
        q, k = (draw(1, 2, length, 16, seed=seed, dtype=torch.float32) for seed in (0, 1))
        return peak_bytes(lambda: attention_stats(q, k, causal=True, block=(64, 128)))

    assert peak(2048) < 3 * peak(1024) and peak(2048) < 0.05 * 2 * 2048 * 2048 * 4


def test_empty_query_and_single_key():
    k = draw(1, 2, 1, 4)
    assert attention_stats(k[:, :, :0], k).entropy.shape == (1, 2, 0)
    one = attention_stats(k, k, causal=True)
    assert one.entropy.abs().max() == 0 and torch.equal(one.effective_tokens, torch.ones(1, 2, 1, dtype=F64))


def test_bad_input():
    q, k = draw(2, 4, 5, 8), draw(2, 2, 5, 8)
    for arguments, message in (
        ((q, k[..., :4]), "must be"),
        ((q[:, :3], k), "kv_heads must divide heads = 3, got 2"),
        ((q, k[:, :, :0]), "at least one key"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_stats(*arguments)
    for options, message in (
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, "mask must be bool of shape"),
        ({"mask": torch.ones(2, 5)}, "mask must be bool of shape"),
        ({"mask": torch.ones(2, 3, 5, 5, dtype=torch.bool)}, "broadcast to"),
        ({"window": 0}, "window must be >= 1"),
        ({"sinks": -1}, "must be >= 0, got -1 and 32"),
        ({"block": (0, 4)}, "block must be"),
        ({"sink_logits": torch.zeros(3)}, "sink_logits must be"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_stats(q, k, **options)
