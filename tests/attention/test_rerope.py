"""ReRoPE in its region form against the dense definition, and the identities that tie its settings together."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from danlu.attention.rerope import far_shift, near_shift, piecewise_attention, rerope_attention
from danlu.positions.rotary import Rotary, half_to_interleaved, interleaved_to_half, inverse_frequencies
from reference import dense

DIM = 8
FREQ = inverse_frequencies(DIM, 100.0)
ROTARY = Rotary(FREQ)
EXACT = {"atol": 1e-12, "rtol": 0}
STRIDES = [math.inf, 16.0, 3.0, 1.0, 0.5]


def draw(length, batch=2, heads=4, kv_heads=2, dtype=torch.float64, head_dim=DIM, value_dim=DIM, n_queries=None):
    # twice the usual spread: a flat softmax would hide a wrong rotation
    q = 2 * torch.randn(batch, heads, n_queries or length, head_dim, dtype=torch.float64)
    k = 2 * torch.randn(batch, kv_heads, length, head_dim, dtype=torch.float64)
    v = torch.randn(batch, kv_heads, length, value_dim, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def run(q, k, v, window, stride=math.inf, rotary=ROTARY, **options):
    return rerope_attention(q, k, v, rotary=rotary, window=window, stride=stride, return_lse=True, **options)


def close(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), **(tolerance or EXACT))


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("window", [1, 4, 7])
def test_equals_the_dense_definition(window, stride):
    for length in {1, window - 1, window, window + 1, 2 * window, 2 * window + 1, 23} - {0}:
        q, k, v = draw(length)
        expected = dense.rerope(q, k, v, FREQ, window, stride=stride)
        close(run(q, k, v, window, stride), expected)
        close(run(q.float(), k.float(), v.float(), window, stride), expected, atol=4e-6, rtol=0)


@pytest.mark.parametrize("stride", [math.inf, 5.0])
def test_many_tiles_and_a_remainder(stride):
    q, k, v = draw(317, batch=1)
    close(run(q, k, v, 90, stride), dense.rerope(q, k, v, FREQ, 90, stride=stride))
    close(run(q[:, :, -200:], k, v, 40, stride), dense.rerope(q[:, :, -200:], k, v, FREQ, 40, stride=stride))


@pytest.mark.parametrize("stride", [math.inf, 3.0, 0.5])
def test_gradients_equal_those_of_the_dense_definition(stride):
    q, k, v = (x.requires_grad_() for x in draw(150))
    ours, theirs = run(q, k, v, 33, stride), dense.rerope(q, k, v, FREQ, 33, stride=stride)
    weights = [torch.randn_like(x) for x in ours]
    grads = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(pair, weights, strict=True)), (q, k, v))
        for pair in (ours, theirs)
    ]
    close(*grads)


@pytest.mark.parametrize("stride", [math.inf, 3.0, 0.5])
def test_gradcheck(stride):
    inputs = [x.requires_grad_() for x in draw(9, batch=1, heads=2, kv_heads=1)]
    assert torch.autograd.gradcheck(lambda q, k, v: run(q, k, v, 4, stride), inputs)


@pytest.mark.parametrize("stride", STRIDES)
def test_a_window_that_covers_everything_is_plain_rotary_attention(stride):
    q, k, v = draw(12)
    turned = dense.rotate(q, torch.arange(12), FREQ), dense.rotate(k, torch.arange(12), FREQ)
    plain = dense.masked_attention(*turned, v, dense.distances(12, 12) >= 0)
    for window in (12, 13, 10**6):
        close(run(q, k, v, window, stride), plain)


def test_stride_one_is_plain_and_a_huge_stride_is_rerope():
    q, k, v = draw(21)
    for window in (1, 2, 5, 20, 21):
        close(run(q, k, v, window, 1.0), run(q, k, v, 21))
        close(run(q, k, v, window, 1e9), run(q, k, v, window), atol=1e-6, rtol=0)


@pytest.mark.parametrize("stride", [math.inf, 3.0])
def test_a_constant_shift_of_positions_changes_nothing(stride):
    q, k, v = draw(14)
    slots, window = torch.arange(14).double(), 4

    def at(shift):
        near, far = slots + shift, slots / stride + shift
        return piecewise_attention(
            ROTARY.rotate(q, near),
            ROTARY.rotate(k, near),
            ROTARY.rotate(q, far + window - window / stride),
            ROTARY.rotate(k, far),
            v,
            window=window,
            return_lse=True,
        )

    close(at(1000.5), at(0))
    close(at(-7), run(q, k, v, window, stride))


@pytest.mark.parametrize("stride", [math.inf, 2.5])
def test_shifts_from_far_form(stride):
    q, k, v = draw(14)
    slots, window = torch.arange(14), 4
    q_host, k_host = ROTARY.rotate(q, slots / stride), ROTARY.rotate(k, slots / stride)
    ours = piecewise_attention(
        ROTARY.rotate(q_host, near_shift(slots, stride)),
        ROTARY.rotate(k_host, near_shift(slots, stride)),
        ROTARY.rotate(q_host, far_shift(window, stride)),
        k_host,
        v,
        window=window,
        return_lse=True,
    )
    close(ours, run(q, k, v, window, stride), atol=1e-6, rtol=0)  # slots / stride is float32 here


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 12), st.sampled_from([math.inf, 4.0]), st.data()
)
def test_any_chunking_and_step_by_step_decoding(chunks, window, stride, data):
    length = sum(chunks)
    torch.manual_seed(data.draw(st.integers(0, 9)))
    q, k, v = draw(length)
    whole = run(q, k, v, window, stride)
    for sizes in (chunks, [1] * length):
        stop = 0
        for size in sizes:
            start, stop = stop, stop + size
            piece = run(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], window, stride)
            close(piece, [x[:, :, start:stop] for x in whole])


@pytest.mark.parametrize("stride", [math.inf, 3.0])
@pytest.mark.parametrize("n_queries", [20, 6, 1])
def test_padding_on_either_side_equals_single_sequences(stride, n_queries):
    q, k, v = draw(20, batch=5, n_queries=n_queries)
    spans = [(0, 20), (7, 20), (0, 17), (3, 16), (5, 5)]
    out, lse = run(q, k, v, 4, stride, spans=spans)
    offset = 20 - n_queries
    for b, (start, end) in enumerate(spans):
        first, last = max(start, offset), max(end, offset)
        inside = slice(first - offset, last - offset)
        if last > first:
            alone = run(q[b : b + 1, :, inside], k[b : b + 1, :, start:end], v[b : b + 1, :, start:end], 4, stride)
            close([out[b : b + 1, :, inside], lse[b : b + 1, :, inside]], alone)
        outside = torch.ones(n_queries, dtype=torch.bool)
        outside[inside] = False
        assert (out[b, :, outside] == 0).all()
        assert (lse[b, :, outside] == -math.inf).all()


def test_padding_passes_gradients_to_valid_slots_only():
    q, k, v = (x.requires_grad_() for x in draw(10))
    run(q, k, v, 3, spans=[(4, 10), (0, 7)])[0].square().sum().backward()
    for x in (q, k, v):
        assert torch.isfinite(x.grad).all()
        assert (x.grad[0, :, :4] == 0).all() and (x.grad[1, :, 7:] == 0).all()
        assert (x.grad[0, :, 4:9] != 0).any() and (x.grad[1, :, :6] != 0).any()


def test_grouped_heads_equal_repeated_ones():
    q, k, v = draw(17, heads=6)
    for n_queries in (17, 5, 1):
        rows = q[:, :, -n_queries:]
        close(run(rows, k, v, 5), run(rows, dense.expand_groups(k, 6), dense.expand_groups(v, 6), 5))


def test_layouts_agree_after_permuting_dims():
    q, k, v = draw(17)
    ours = run(half_to_interleaved(q), half_to_interleaved(k), v, 5, rotary=Rotary(FREQ, "interleaved"))
    close(ours, run(q, k, v, 5))
    assert torch.equal(interleaved_to_half(half_to_interleaved(q)), q)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_partial_rotary_and_wider_values(layout):
    freq = inverse_frequencies(4)
    q, k, v = draw(19, value_dim=5, head_dim=10)
    ours = run(q, k, v, 5, 4.0, Rotary(freq, layout, start=2))
    close(ours, dense.rerope(q, k, v, freq, 5, stride=4.0, layout=layout, start=2))
    ours = run(q, k, v[..., :1].expand(2, 2, 19, 14), 5, rotary=Rotary(freq, layout), scale=0.3)
    close(ours, dense.rerope(q, k, v[..., :1].expand(2, 2, 19, 14), freq, 5, layout=layout, scale=0.3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    q, k, v = (x / 2 for x in draw(70, dtype=dtype))
    ours = run(q, k, v, 20)
    expected = dense.rerope(q.double(), k.double(), v.double(), FREQ, 20)
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32
    bound = 4e-2 if dtype == torch.bfloat16 else 5e-3
    close(ours, expected, atol=bound, rtol=0)


def near_and_far(q, k, window):
    slots = torch.arange(k.shape[2])
    last = slots[-q.shape[2] :]
    q_far = ROTARY.rotate(q, far_shift(window, math.inf))
    return ROTARY.rotate(q, last), ROTARY.rotate(k, slots), q_far, k


def test_mask_with_query_slots_equals_spans():
    q, k, v = draw(16, n_queries=3)
    spans, window = [(2, 13), (0, 10)], 4
    slots = torch.tensor([[10, 11, 12], [7, 8, 9]])  # a static cache: slots after the query are not yet written
    steps = torch.arange(16)
    mask = (steps <= slots[:, None, :, None]) & (steps >= torch.tensor([2, 0])[:, None, None, None])
    out, lse = piecewise_attention(
        ROTARY.rotate(q, slots),
        ROTARY.rotate(k, steps),
        ROTARY.rotate(q, far_shift(window, math.inf)),
        k,
        v,
        window=window,
        bias=mask,
        q_slots=slots,
        return_lse=True,
    )
    for b, (start, end) in enumerate(spans):
        one = run(q[b : b + 1], k[b : b + 1, :, start:end], v[b : b + 1, :, start:end], window)
        close([out[b : b + 1], lse[b : b + 1]], one)


def test_additive_mask_and_softcap():
    q, k, v = draw(13)
    window, distance = 4, dense.distances(13, 13)
    tensors = near_and_far(q, k, window)
    scores = dense.rerope_scores(q, k, FREQ, window)
    causal = torch.zeros(13, 13, dtype=torch.float64).masked_fill(distance < 0, -math.inf)[None, None]
    slope = causal - 0.1 * distance.abs()
    close(
        piecewise_attention(*tensors, v, window=window, bias=slope, return_lse=True),
        dense.weighted(scores - 0.1 * distance.abs(), v),
    )
    capped = torch.where(distance >= 0, 3.0 * torch.tanh(scores / 3.0), -math.inf)
    close(piecewise_attention(*tensors, v, window=window, softcap=3.0, return_lse=True), dense.weighted(capped, v))
    covering = piecewise_attention(*tensors, v, window=20, bias=causal, return_lse=True)
    close(covering, run(q, k, v, 20))


def test_short_near_keys():
    q, k, v = draw(30, n_queries=3)
    q_near, k_near, q_far, k_far = near_and_far(q, k, 5)
    whole = piecewise_attention(q_near, k_near, q_far, k_far, v, window=5, return_lse=True)
    close(piecewise_attention(q_near, k_near[:, :, -7:], q_far, k_far, v, window=5, return_lse=True), whole)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize(("length", "window"), [(16384, 64), (8192, 2048)])
def test_nothing_quadratic_is_allocated(length, window):
    q, k, v = (torch.randn(1, 1, length, DIM, requires_grad=True) for _ in range(3))
    with Largest() as largest:
        out = rerope_attention(q, k, v, rotary=ROTARY, window=window)
        out.sum().backward()
    # besides tensors linear in the length there is only the mask of one tile, 256 x (window + 255)
    assert largest.elements <= max(5 * length * DIM, 256 * (window + 255))
    assert largest.elements < length * length / 50


def test_second_call_leaves_no_trace_of_the_first():
    q, k, v = draw(40)
    first = run(q, k, v, 7)
    run(*draw(40), 7)
    close(run(q, k, v, 7), first, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"window": 2.0}, TypeError, "window must be an integer number of tokens, got 2.0"),
        ({"window": True}, TypeError, "window must be an integer"),
        ({"window": 4, "stride": 0}, ValueError, "stride must be greater than 0"),
        ({"window": 4, "stride": -2.0}, ValueError, "stride must be greater than 0"),
        ({"window": 4, "stride": math.nan}, ValueError, "stride must be greater than 0"),
        ({"window": 4, "spans": [(0, 10)]}, ValueError, "one \\(start, end\\) per batch row, got 1"),
        ({"window": 4, "spans": [(0, 10), (4, 11)]}, ValueError, "0 <= start <= end <= 10, got \\(4, 11\\)"),
    ],
)
def test_bad_settings(options, error, message):
    q, k, v = draw(10)
    with pytest.raises(error, match=message):
        rerope_attention(q, k, v, rotary=ROTARY, **options)


def test_bad_shapes():
    q, k, v = draw(10)
    with pytest.raises(ValueError, match="Lq <= Lk"):
        rerope_attention(q, k[:, :, :9], v[:, :, :9], rotary=ROTARY, window=4)
    q_near, k_near, q_far, k_far = near_and_far(q, k, 4)
    with pytest.raises(ValueError, match="queries must not outnumber keys"):
        piecewise_attention(q_near, k_near, q_far, k_far, v[:, :, :9], window=4)
    with pytest.raises(ValueError, match="k_near must hold the last 10 to 10 keys, got 9"):
        piecewise_attention(q_near, k_near[:, :, 1:], q_far, k_far, v, window=4)
    with pytest.raises(ValueError, match="k_far must hold all 10 keys of v, got 9"):
        piecewise_attention(q_near, k_near, q_far, k_far[:, :, 1:], v, window=4)
    with pytest.raises(ValueError, match="q_far and k_far must be given for window < Lk"):
        piecewise_attention(q_near, k_near, None, None, v, window=4)
