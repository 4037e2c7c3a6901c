"""Sliding-window attention, optionally with the first keys of the sequence always in sight."""

from __future__ import annotations

from torch import Tensor

from danlu.attention.rerope import check_window
from danlu.kernels.flash import attend
from danlu.kernels.regions import Part


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute causal attention to the last `window` keys and the first `sinks` keys, in O(Lk) memory.

    Args:
        q: (batch, heads, Lq, head_dim), already rotated; rows are the last Lq of Lk positions.
        k: (batch, kv_heads, Lk, head_dim), already rotated; kv_heads divides heads.
        v: (batch, kv_heads, Lk, value_dim).
        window: in tokens, the query's own included, at least 1.
        sinks: number of first keys that stay visible at any distance, 0 or more; a key in both sets counts once.
        scale: factor of the scores; default head_dim ** -0.5.
        softcap: scores become softcap * tanh(score / softcap); None: unchanged.
        return_lse: also give the log-sum-exp of the scores.

    Returns:
        (batch, heads, Lq, value_dim); with `return_lse` also (batch, heads, Lq), float32 or float64.

    Raises:
        ValueError: window or sinks out of range, or more queries than keys.

    Source: Scientific Spaces archive 9603; arXiv:2309.17453 (sinks).
    """
    check_window(window)
    if sinks < 0:
        raise ValueError(f"sinks must be 0 or more, got {sinks}")
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"queries must not outnumber keys (Lq <= Lk), got Lq = {q.shape[2]}, Lk = {k.shape[2]}")
    parts = [Part(farthest=window if window < k.shape[2] else None)]
    if sinks and window < k.shape[2]:
        parts.append(Part(nearest=window, columns=(0, sinks)))
    out, lse = attend([q], [k], v, parts, scale, softcap=softcap)
    return (out, lse) if return_lse else out
