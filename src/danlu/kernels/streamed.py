"""Exact attention under any block-wise rule: rows and keys go by in blocks, forward and backward, in O(L d) memory.

The vendor kernels behind `flash.attend` know causal and windowed parts. Here a rule may hide or shift any pair, as long
as it can be written for a block at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from danlu.kernels.chunked import grouped_product
from danlu.kernels.flash import relative_weights

BlockRule = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Pairs:
    """Which pairs of row and key there are, and how their scores are shifted.

    Attributes:
        causal: a row sees no later slot.
        window: a row sees only distances below it.
        mask: bool (True: visible) or additive, broadcastable to (batch, heads, Lq, Lk).
        segments: (batch, Lk), a row sees only keys of its own segment.
        bias: called with slots of rows (r,) and of keys (c,); gives bool or additive values that broadcast to
            (batch, heads, r, c).
        shift: slot of the first row.
    """

    causal: bool
    window: int | None
    mask: Tensor | None
    segments: Tensor | None
    bias: BlockRule | None
    shift: int

    def blocks(self, n_rows: int, n_keys: int, rows: int, columns: int) -> Iterator[tuple[slice, list[slice]]]:
        """Runs of rows with the runs of keys that some of them may see."""
        starts = list(range(0, n_keys, columns))
        ranges = None if self.segments is None else [_range(self.segments[:, c : c + columns]) for c in starts]
        for r in range(0, n_rows, rows):
            rr = slice(r, min(r + rows, n_rows))
            low, high = rr.start + self.shift, rr.stop + self.shift
            own = None if self.segments is None else _range(self.segments[:, low:high])
            found = []
            for place, c in enumerate(starts):
                cc = slice(c, min(c + columns, n_keys))
                if self.causal and cc.start >= high:
                    break
                if self.window is not None and cc.stop <= low - self.window + 1:
                    continue
                if ranges is not None and own is not None and _apart(own, ranges[place]):
                    continue
                found.append(cc)
            yield rr, found

    def apply(self, scores: Tensor, rows: slice, columns: slice) -> Tensor:
        """Shift and hide scores (batch, heads, r, c) in place; hidden ones become -inf."""
        i = torch.arange(rows.start + self.shift, rows.stop + self.shift, device=scores.device)
        j = torch.arange(columns.start, columns.stop, device=scores.device)
        ahead = i[:, None] - j
        if self.causal and columns.stop - 1 > rows.start + self.shift:
            scores.masked_fill_(ahead < 0, -math.inf)
        if self.window is not None and rows.stop - 1 + self.shift - columns.start >= self.window:
            scores.masked_fill_(ahead >= self.window, -math.inf)
        if self.segments is not None:
            same = self.segments[:, i][:, :, None] == self.segments[:, j][:, None, :]
            scores.masked_fill_(~same[:, None], -math.inf)
        rules = [] if self.mask is None else [_part(self.mask, rows, columns)]
        rules += [] if self.bias is None else [self.bias(i, j)]
        for rule in rules:
            if rule.dtype == torch.bool:
                scores.masked_fill_(~rule, -math.inf)
            else:
                scores.add_(rule.to(scores.dtype))
        return scores


def _range(ids: Tensor) -> tuple[list[int], list[int]]:
    return ids.amin(1).tolist(), ids.amax(1).tolist()


def _apart(a: tuple[list[int], list[int]], b: tuple[list[int], list[int]]) -> bool:
    """Whether no batch entry's ranges meet."""
    return all(a[1][n] < b[0][n] or b[1][n] < a[0][n] for n in range(len(a[0])))


def _part(mask: Tensor, rows: slice, columns: slice) -> Tensor:
    mask = mask[:, :, rows] if mask.shape[2] > 1 else mask
    return mask[..., columns] if mask.shape[3] > 1 else mask


def attend(
    q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    """Attend block by block; differentiable in q, k and v.

    Args:
        q: (batch, heads, Lq, d).
        k: (batch, kv_heads, Lk, d).
        v: (batch, kv_heads, Lk, dv).
        pairs: the rule.
        scale: factor of the scores.
        rows: rows of a block.
        columns: keys of a block.

    Returns:
        (out, lse): (batch, heads, Lq, dv) like q, and (batch, heads, Lq) in float32 or float64. A row without keys has
        out 0 and lse -inf.
    """
    return _Streamed.apply(pairs, scale, rows, columns, q, k, v)


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pairs: Pairs, scale: float, rows: int, columns: int, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        high = torch.float64 if q.dtype == torch.float64 else torch.float32
        out = q.new_empty(*q.shape[:3], v.shape[-1])
        lse = q.new_empty(q.shape[:3], dtype=high)
        for rr, blocks in pairs.blocks(q.shape[2], k.shape[2], rows, columns):
            query = q[:, :, rr].to(high) * scale
            m = query.new_full(query.shape[:3], -math.inf)
            z, y = torch.zeros_like(m), query.new_zeros(*query.shape[:3], v.shape[-1])
            for cc in blocks:
                scores = pairs.apply(grouped_product(query, k[:, :, cc].to(high).mT), rr, cc)
                m, z, y = absorb(m, z, y, scores, v[:, :, cc].to(high))
            seen = z > 0
            safe = z.masked_fill(~seen, 1.0)
            out[:, :, rr] = y / safe[..., None]
            lse[:, :, rr] = torch.where(seen, m + safe.log(), -math.inf)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan = pairs, scale, rows, columns
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        pairs, scale, rows, columns = ctx.plan
        high = lse.dtype
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=high), torch.zeros_like(v, dtype=high)
        for rr, blocks in pairs.blocks(q.shape[2], k.shape[2], rows, columns):
            query, grad = q[:, :, rr].to(high) * scale, grads[0][:, :, rr].to(high)
            # dS = P * (dO.v + dlse - D) with D = dO.o
            offset = (grad * out[:, :, rr].to(high)).sum(-1) - grads[1][:, :, rr]
            level = lse[:, :, rr].masked_fill(lse[:, :, rr] == -math.inf, 0.0)
            d_query = torch.zeros_like(query)
            for cc in blocks:
                key, value = k[:, :, cc].to(high), v[:, :, cc].to(high)
                p = pairs.apply(grouped_product(query, key.mT), rr, cc).sub_(level[..., None]).exp_()
                dv[:, :, cc] += _over_groups(p, grad, v.shape[1])
                ds = grouped_product(grad, value.mT).sub_(offset[..., None]).mul_(p)
                d_query += grouped_product(ds, key)
                dk[:, :, cc] += _over_groups(ds, query, k.shape[1])
            dq[:, :, rr] = d_query * scale
        return None, None, None, None, dq, dk.to(k.dtype), dv.to(v.dtype)


def absorb(
    m: Tensor, z: Tensor, y: Tensor, scores: Tensor, values: Tensor, keep: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Extend running softmax sums by a block of keys.

    Args:
        m: running maximum (batch, heads, rows), -inf at the start.
        z: running sum of exp(s - m), as m.
        y: running sum of exp(s - m) v, (batch, heads, rows, dv).
        scores: (batch, heads, rows, n), -inf where hidden.
        values: (batch, kv_heads, n, dv).
        keep: factors on the weights in y alone, like scores: dropout.

    Returns:
        The new (m, z, y); m carries no gradient.
    """
    new, (old, _) = relative_weights(torch.stack((m, scores.detach().amax(-1))))
    weights = (scores - new.masked_fill(new == -math.inf, 0.0)[..., None]).exp()
    z = old * z + weights.sum(-1)
    weights = weights if keep is None else weights * keep
    return new, z, old[..., None] * y + grouped_product(weights, values)


def _over_groups(x: Tensor, y: Tensor, kv_heads: int) -> Tensor:
    """Products x' y of (batch, heads, rows, a) and (batch, heads, rows, b), summed over the heads of a group."""
    x, y = (t.reshape(t.shape[0], kv_heads, -1, t.shape[-1]) for t in (x, y))
    return x.mT @ y
