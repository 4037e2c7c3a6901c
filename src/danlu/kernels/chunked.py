"""The math route of `flash.attend`: any device, dtype, cap, bias or slots, in O(chunk * Lk) memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from danlu.kernels.regions import Part

# scores held at once, in elements
_CHUNK_ELEMENTS = 1 << 22


def attend(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    value: Tensor,
    parts: Sequence[Part],
    scale: float,
    *,
    softcap: float | None = None,
    bias: Tensor | None = None,
    q_slots: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend over parts by plain tensor operations on chunks of rows.

    Args:
        queries: as for `flash.attend`, like all arguments but the last.
        keys: see there.
        value: see there.
        parts: see there.
        scale: factor of the scores.
        softcap: see there.
        bias: see there.
        q_slots: see there.
        chunk: rows computed at once; None: as many as keep the scores below 2 ** 22 elements.

    Returns:
        (out, lse) as `flash.attend`. Where gradients are wanted, chunks are computed again in the backward pass.
    """
    batch, heads, n_rows, _ = queries[0].shape
    n_keys, dtype = value.shape[2], queries[0].dtype
    high = torch.float64 if dtype == torch.float64 else torch.float32
    if n_rows == 0:
        return value.new_zeros(batch, heads, 0, value.shape[3]), value.new_zeros((batch, heads, 0), dtype=high)
    keys, value = [x.to(high) for x in keys], value.to(high)
    rows = chunk or max(1, min(n_rows, _CHUNK_ELEMENTS // max(1, batch * heads * n_keys)))

    def one(first: int, last: int) -> tuple[Tensor, Tensor]:
        scores = []
        for part in parts:
            shift = None if q_slots is not None else n_keys - n_rows
            columns = _reach(part, n_keys, None if shift is None else (first + shift, last + shift))
            scores.append((_scores(part, columns, first, last), columns))
        return _softmax([(s, c) for s, c in scores if c[0] < c[1]], value, (batch, heads, last - first))

    def _scores(part: Part, columns: tuple[int, int], first: int, last: int) -> Tensor:
        key = keys[part.key]
        offset = n_keys - key.shape[2]
        q = queries[part.query][:, :, first:last].to(high)
        k = key[:, :, max(columns[0] - offset, 0) : max(columns[1] - offset, 0)]
        raw = grouped_product(q * scale, k.mT)
        if columns[0] < offset:  # slots that this key tensor does not hold are out of its reach
            missing = min(columns[1], offset) - columns[0]
            raw = torch.cat((raw.new_zeros(*raw.shape[:3], max(missing, 0)), raw), -1)
        if softcap is not None:
            raw = softcap * torch.tanh(raw / softcap)
        slots = torch.arange(*columns, device=raw.device)
        if q_slots is None:
            positions = torch.arange(first, last, device=raw.device) + (n_keys - n_rows)
        else:
            positions = q_slots[:, None, first:last].to(raw.device)
        distance = positions[..., None] - slots
        hidden = (slots < offset).expand_as(distance)
        if part.nearest is not None:
            hidden = hidden | (distance < part.nearest)
        if part.farthest is not None:
            hidden = hidden | (distance >= part.farthest)
        if bias is not None:
            piece = bias[:, :, first:last, columns[0] : columns[1]]
            if piece.dtype == torch.bool:
                hidden = hidden | ~piece
            else:
                raw = raw + piece.to(high)
        return raw.masked_fill(hidden, -torch.inf)

    spans = [(first, min(first + rows, n_rows)) for first in range(0, n_rows, rows)]
    again = len(spans) > 1 and torch.is_grad_enabled()
    pieces = [checkpoint(one, *span, use_reentrant=False) if again else one(*span) for span in spans]
    out, lse = (torch.cat(tensors, 2) for tensors in zip(*pieces, strict=True))
    return out.to(dtype), lse


def _reach(part: Part, n_keys: int, positions: tuple[int, int] | None) -> tuple[int, int]:
    """Give the slots that any row at positions [first, last) may see; all of them where positions are not known."""
    start, stop = part.columns or (0, n_keys)
    stop = min(stop, n_keys)
    if positions is not None:
        if part.farthest is not None:
            start = max(start, positions[0] - part.farthest + 1)
        if part.nearest is not None:
            stop = min(stop, positions[1] - part.nearest)
    return start, max(start, stop)


def grouped_product(x: Tensor, y: Tensor) -> Tensor:
    """Multiply (batch, heads, rows, a) by (batch, kv_heads, a, b), each kv head serving a group of heads.

    Args:
        x: left factor.
        y: right factor; kv_heads divides heads.

    Returns:
        (batch, heads, rows, b).
    """
    batch, heads, rows, width = x.shape
    folded = x.reshape(batch, y.shape[1], heads // y.shape[1] * rows, width)
    return (folded @ y).reshape(batch, heads, rows, y.shape[-1])


def _softmax(
    scores: list[tuple[Tensor, tuple[int, int]]], value: Tensor, shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    if not scores:
        lse = torch.full(shape, -torch.inf, dtype=value.dtype, device=value.device)
        return value.new_zeros(*shape, value.shape[3]), lse
    top = torch.stack([s.detach().amax(-1) for s, _ in scores]).amax(0)
    top = torch.where(torch.isfinite(top), top, torch.zeros_like(top))
    weights = [((s - top[..., None]).exp(), columns) for s, columns in scores]
    total = torch.stack([p.sum(-1) for p, _ in weights]).sum(0)
    out = torch.stack([grouped_product(p, value[:, :, first:last]) for p, (first, last) in weights]).sum(0)
    seen = total > 0
    safe = torch.where(seen, total, torch.ones_like(total))
    return out / safe[..., None], torch.where(seen, top + safe.log(), torch.full_like(top, -torch.inf))
