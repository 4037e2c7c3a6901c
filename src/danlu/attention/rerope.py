"""ReRoPE and Leaky ReRoPE: exact positions within a window, clipped or compressed distances outside it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from danlu.kernels.flash import attend
from danlu.kernels.regions import Part
from danlu.kernels.spans import Spans, attend_by_span
from danlu.positions.rotary import Rotary


def rerope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rotary: Rotary,
    window: int,
    stride: float = math.inf,
    scale: float | None = None,
    spans: Spans | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute causal attention with the relative position D for D < window and window + (D - window) / stride beyond.

    Args:
        q: (batch, heads, Lq, head_dim), not rotated; row r stands at position Lk - Lq + r.
        k: (batch, kv_heads, Lk, head_dim), not rotated; kv_heads divides heads.
        v: (batch, kv_heads, Lk, value_dim).
        rotary: the rotation that the model was trained with.
        window: w, in tokens, at least 1; from Lk on it changes nothing. A quarter to a half of the trained length.
        stride: k, greater than 0. inf: ReRoPE; above 1: Leaky ReRoPE; 1: plain rotary attention; below 1: the inverse
            use, for training.
        scale: factor of the scores; default head_dim ** -0.5.
        spans: (start, end) of the valid slots of each batch row, for padding on either side; None: all.
        return_lse: also give the log-sum-exp of the scores.

    Returns:
        (batch, heads, Lq, value_dim); with `return_lse` also (batch, heads, Lq) float32 or float64. Padded rows are 0
        with log-sum-exp -inf.

    Raises:
        ValueError: window, stride, spans or shapes out of range.

    Source: Scientific Spaces archive 9708, 9728.
    """
    check_window(window)
    check_stride(stride)
    if q.ndim != 4 or k.ndim != 4 or q.shape[2] > k.shape[2]:
        raise ValueError(f"q and k must be 4-D with Lq <= Lk, got {tuple(q.shape)} and {tuple(k.shape)}")
    if spans is not None:

        def one(*row: Tensor) -> tuple[Tensor, Tensor]:
            out, lse = rerope_attention(*row, rotary=rotary, window=window, stride=stride, scale=scale, return_lse=True)
            return out, lse

        out, lse = attend_by_span(one, q, k, v, spans)
        return (out, lse) if return_lse else out
    n_queries, n_keys = q.shape[2], k.shape[2]
    reach = min(n_keys, n_queries + window - 1)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    cos, sin = rotary.angles(torch.arange(n_keys - reach, n_keys, device=q.device), dtype=dtype)
    k_near = rotary.apply(k[:, :, n_keys - reach :], cos, sin)
    q_near = rotary.apply(q, cos[reach - n_queries :], sin[reach - n_queries :])
    q_far: Tensor | None = None
    k_far: Tensor | None = None
    if window >= n_keys or stride == 1:
        pass
    elif math.isinf(stride):
        q_far, k_far = rotary.rotate(q, far_shift(window, stride, q.device)), k
    else:
        slots = torch.arange(n_keys, device=q.device, dtype=torch.float64)
        q_far = rotary.rotate(q, (slots[n_keys - n_queries :] - window) / stride + window)
        k_far = rotary.rotate(k, slots / stride)
    if stride == 1 and window < n_keys:
        window, k_near = n_keys, rotary.rotate(k, torch.arange(n_keys, device=k.device))
    return piecewise_attention(q_near, k_near, q_far, k_far, v, window=window, scale=scale, return_lse=return_lse)


def piecewise_attention(
    q_near: Tensor,
    k_near: Tensor,
    q_far: Tensor | None,
    k_far: Tensor | None,
    v: Tensor,
    *,
    window: int,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    q_slots: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute causal attention with one rotation for distances below the window and another one from it on.

    Args:
        q_near: (batch, heads, Lq, head_dim), rotated; rows are the last Lq of Lk positions.
        k_near: (batch, kv_heads, M, head_dim), rotated, the last M keys, M >= min(Lk, Lq + window - 1).
        q_far: like `q_near`.
        k_far: (batch, kv_heads, Lk, head_dim), rotated. q_far and k_far may be None where window >= Lk.
        v: (batch, kv_heads, Lk, value_dim).
        window: in tokens, at least 1.
        scale: factor of the scores; default head_dim ** -0.5.
        softcap: scores become softcap * tanh(score / softcap); None: unchanged.
        bias: (batch or 1, heads or 1, Lq, Lk), bool (True: visible) or additive float. Where given, it alone says what
            is visible, causality included.
        q_slots: (batch, Lq) int64, slot of each query among the keys, where it is not Lk - Lq + row.
        return_lse: also give the log-sum-exp of the scores.

    Returns:
        (batch, heads, Lq, value_dim); with `return_lse` also (batch, heads, Lq). Rows that see no key are 0 with
        log-sum-exp -inf.

    Raises:
        ValueError: window or shapes out of range.

    Source: Scientific Spaces archive 9708.
    """
    check_window(window)
    n_queries, n_keys = q_near.shape[2], v.shape[2]
    if n_queries > n_keys:
        raise ValueError(f"queries must not outnumber keys (Lq <= Lk), got Lq = {n_queries}, Lk = {n_keys}")
    needed = n_keys if q_slots is not None else min(n_keys, n_queries + window - 1)
    if not needed <= k_near.shape[2] <= n_keys:
        raise ValueError(f"k_near must hold the last {needed} to {n_keys} keys, got {k_near.shape[2]}")
    if k_far is not None and k_far.shape[2] != n_keys:
        raise ValueError(f"k_far must hold all {n_keys} keys of v, got {k_far.shape[2]}")
    nearest = None if bias is not None else 0
    if window >= n_keys:
        parts, queries, keys = [Part(nearest=nearest)], [q_near], [k_near]
    else:
        if q_far is None or k_far is None:
            raise ValueError(f"q_far and k_far must be given for window < Lk, got window {window} and Lk {n_keys}")
        parts = [Part(1, 1, nearest=window), Part(0, 0, nearest=nearest, farthest=window)]
        queries, keys = [q_near, q_far], [k_near, k_far]
    out, lse = attend(queries, keys, v, parts, scale, softcap=softcap, bias=bias, q_slots=q_slots)
    return (out, lse) if return_lse else out


def far_shift(window: int, stride: float, device: torch.device | str | None = None) -> Tensor:
    """Give the constant position that turns a query in far form (rotated at i / stride) into the far query.

    With keys and queries in far form (raw for stride inf), the far query is `rotate(q, far_shift)` and the near form of
    either is `rotate(x, near_shift)`.

    Args:
        window: in tokens, at least 1.
        stride: greater than 0, inf for ReRoPE.
        device: where the result lives.

    Returns:
        float64 tensor of shape (1,): window - window / stride.

    Source: Scientific Spaces archive 9708.
    """
    return torch.tensor([window - window / stride], dtype=torch.float64, device=device)


def near_shift(positions: Tensor, stride: float) -> Tensor:
    """Give the positions that turn tensors in far form (rotated at i / stride) into near ones (rotated at i).

    Args:
        positions: i, any shape, in tokens.
        stride: greater than 0, inf for ReRoPE.

    Returns:
        float64 tensor: i - i / stride.
    """
    real = positions.to(torch.float64)
    return real - real / stride


def check_window(window: int) -> None:
    """Raise ValueError or TypeError unless `window` is an integer of at least 1."""
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"window must be an integer number of tokens, got {window!r}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")


def check_stride(stride: float) -> None:
    """Raise ValueError unless `stride` is greater than 0 (inf allowed)."""
    if not stride > 0:  # also catches nan
        raise ValueError(f"stride must be greater than 0 (inf for ReRoPE), got {stride}")
