"""Checks and small conversions that linear attention and attention to quantised keys share."""

from __future__ import annotations

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Float32, or float64 where it is that already: the precision of logarithms and states."""
    return x if x.dtype == torch.float64 else x.float()


def check_heads(hidden_size: int, heads: int, kv_heads: int | None, head_dim: int | None) -> tuple[int, int, int]:
    """Sizes of heads with their defaults.

    Returns:
        heads, kv_heads, head_dim.

    Raises:
        ValueError: sizes that do not fit together.
    """
    if hidden_size < 1 or heads < 1:
        raise ValueError(f"hidden_size and heads must be at least 1, got {hidden_size} and {heads}")
    kv_heads = heads if kv_heads is None else kv_heads
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"kv_heads must divide heads = {heads}, got {kv_heads}")
    if head_dim is None:
        if hidden_size % heads:
            raise ValueError(f"heads must divide hidden_size = {hidden_size}, got {heads}; or give head_dim")
        head_dim = hidden_size // heads
    if head_dim < 1:
        raise ValueError(f"head_dim must be at least 1, got {head_dim}")
    return heads, kv_heads, head_dim


def real_tokens(mask: Tensor | None, length: int) -> Tensor | None:
    """The part of a padding mask that is about the present tokens; None where all are real.

    Args:
        mask: (batch, past + length) bool, or None.
        length: number of present tokens.

    Returns:
        (batch, length) bool, or None.

    Raises:
        ValueError: another kind of mask.
    """
    if mask is None:
        return None
    if mask.ndim != 2:
        raise ValueError(
            "mask must be (batch, past + length), True = real token, for attention with a state; "
            f"got {tuple(mask.shape)}"
        )
    present = mask[:, mask.shape[1] - length :].bool()
    return None if bool(present.all()) else present


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    step_name: str = "chunk",
    step: int = 1,
) -> None:
    """Refuse shapes that do not fit together.

    Raises:
        ValueError: names what does not fit.
    """
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            "q, k and v must be (batch, heads, length, dim), (batch, kv_heads, length, dim) and (batch, kv_heads, "
            f"length, value_dim), got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or q.shape[1] % max(k.shape[1], 1):
        raise ValueError(
            f"q {tuple(q.shape)} must have the batch and length of k {tuple(k.shape)}, and kv_heads must divide heads"
        )
    if step < 1:
        raise ValueError(f"{step_name} must be at least 1, got {step}")
    for name, given in (("mask", mask), ("segment_ids", segment_ids)):
        if given is not None and given.shape != (k.shape[0], k.shape[2]):
            raise ValueError(f"{name} must be (batch, length) = {(k.shape[0], k.shape[2])}, got {tuple(given.shape)}")
