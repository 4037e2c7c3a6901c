"""Sliding windows with and without sinks against a dense mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.attention.window import window_attention
from reference import dense


def draw(length, n_queries, dtype=torch.float64, batch=2):
    q = torch.randn(batch, 4, n_queries, 6, dtype=torch.float64)
    k, v = (torch.randn(batch, 2, length, 6, dtype=torch.float64) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 30), st.data())
def test_equals_the_dense_mask(length, data):
    n_queries = data.draw(st.integers(1, length))
    window, sinks = data.draw(st.integers(1, length + 2)), data.draw(st.integers(0, length + 2))
    q, k, v = draw(length, n_queries)
    visible = dense.window_visible(n_queries, length, window, sinks)
    ours = window_attention(q, k, v, window=window, sinks=sinks, scale=0.9, return_lse=True)
    for a, b in zip(ours, dense.masked_attention(q, k, v, visible, scale=0.9), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [0, 3])
def test_gradients_and_softcap(sinks, softcap):
    q, k, v = (x.requires_grad_() for x in draw(200, 200))
    ours = window_attention(q, k, v, window=33, sinks=sinks, softcap=softcap)
    expected, _ = dense.masked_attention(q, k, v, dense.window_visible(200, 200, 33, sinks), softcap=softcap)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
    weight = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), weight), torch.autograd.grad(expected, (q, k, v), weight), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_dtypes(dtype, bound):
    q, k, v = draw(150, 150, dtype)
    expected, _ = dense.masked_attention(q.double(), k.double(), v.double(), dense.window_visible(150, 150, 40, 4))
    ours = window_attention(q, k, v, window=40, sinks=4)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), expected, atol=bound, rtol=0)


def test_decoding_equals_prefill():
    q, k, v = draw(25, 25)
    whole = window_attention(q, k, v, window=6, sinks=2)
    for t in range(25):
        step = window_attention(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], window=6, sinks=2)
        torch.testing.assert_close(step, whole[:, :, t : t + 1], atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": 2, "sinks": -1}, "sinks must be 0 or more, got -1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        window_attention(*draw(5, 5), **options)


def test_more_queries_than_keys():
    with pytest.raises(ValueError, match="Lq = 6, Lk = 5"):
        window_attention(*draw(5, 6), window=2)
