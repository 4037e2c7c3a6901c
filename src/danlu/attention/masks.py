"""Who sees whom: causal, anti-causal, prefix and mixed-direction masks, as functions of indices and as tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

__all__ = ["make_mask"]

MaskKind = Literal["causal", "anticausal", "bidirectional", "prefix", "mixed_heads"]
#: Of index tensors (sample, head, query, key): True where the query sees the key. What the host builds masks from.
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def anticausal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A token sees itself and what comes after it."""
    return key >= query


def prefix(first: Tensor, lengths: Tensor) -> MaskFunction:
    """All keys of a sample's prefix.

    Args:
        first: (batch,) index of the first real token of each sample.
        lengths: (batch,) tokens of its prefix.
    """
    end = first + lengths

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key < end[batch]

    return sees


def make_mask(
    kind: MaskKind | str,
    length: int,
    *,
    past: int = 0,
    padding: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    heads: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """A dense attention mask, as ``scaled_dot_product_attention`` takes it.

    Query i is at index ``past + i``; the diagonal is kept by every kind. With prefix length m, all see the first m real
    tokens, and the rest is causal (UniLM). In ``mixed_heads`` the first half of the heads is causal and the second
    half anti-causal. A padded query sees what its kind lets it see among real tokens, perhaps nothing.

    Args:
        kind: ``causal``, ``anticausal``, ``bidirectional``, ``prefix`` or ``mixed_heads``.
        length: queries, >= 1.
        past: keys before the first query, >= 0; only 0 for kinds that look ahead.
        padding: (batch, past + length) bool or 0/1, True for real tokens; None: all are real.
        prefix_lengths: (batch,) integers >= 0, for ``prefix``; counted from the first real token.
        heads: number of heads, even, for ``mixed_heads``.
        device: where the mask lives; default: where ``padding`` or ``prefix_lengths`` lives.

    Returns:
        bool tensor of shape ``(batch or 1, heads or 1, length, past + length)``, True where a key is visible.

    Raises:
        ValueError: an argument is out of range, or missing for the kind, or of another shape.

    Source: Scientific Spaces archive 9529, 9547; arXiv:1905.03197 (UniLM)
    """
    total = past + length
    if length < 1 or past < 0:
        raise ValueError(f"length must be at least 1 and past at least 0, got {length} and {past}")
    if past and kind not in ("causal", "prefix"):
        raise ValueError(f"past must be 0 for {kind} masks, whose tokens see later ones, got {past}")
    if padding is not None and padding.shape[-1:] != (total,):
        raise ValueError(
            f"padding must be (batch, past + length) with {total} columns, got shape {tuple(padding.shape)}"
        )
    device = next((t.device for t in (padding, prefix_lengths) if t is not None), None) if device is None else device
    key = torch.arange(total, device=device)
    query = key[past:, None]
    causal = (key <= query)[None, None]
    if kind == "causal":
        visible = causal
    elif kind == "anticausal":
        visible = (key >= query)[None, None]
    elif kind == "bidirectional":
        visible = torch.ones_like(causal)
    elif kind == "mixed_heads":
        if heads is None or heads < 2 or heads % 2:
            raise ValueError(f"heads must be an even number for mixed_heads, got {heads}")
        ahead = (key >= query)[None, None]
        visible = torch.cat([half.expand(-1, heads // 2, -1, -1) for half in (causal, ahead)], 1)
    elif kind == "prefix":
        if prefix_lengths is None or prefix_lengths.ndim != 1 or bool((prefix_lengths < 0).any()):
            raise ValueError(f"prefix_lengths must be (batch,) integers of at least 0 for prefix, got {prefix_lengths}")
        first = first_real(padding, prefix_lengths)
        visible = causal | (key < (first + prefix_lengths)[:, None])[:, None, None]
    else:
        known = "causal, anticausal, bidirectional, prefix, mixed_heads"
        raise ValueError(f"kind must be one of {known}, got {kind!r}")
    return visible if padding is None else visible & padding.bool()[:, None, None]


def first_real(padding: Tensor | None, like: Tensor) -> Tensor:
    """Index of the first real token of every sample, 0 without padding; of the shape of ``like``."""
    return torch.zeros_like(like) if padding is None else padding.long().argmax(-1)
