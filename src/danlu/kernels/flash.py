"""Exact attention put together from parts: each part is a few vendor flash calls, merged by their log-sum-exp.

The backward pass needs no new kernel either. With the merged output O and log-sum-exp, the flash backward of one part
computes P = exp(S - lse) and delta = rowsum(dO * O), which are the probabilities and the correction of the whole
attention restricted to that part; the gradients of the parts therefore add up to the exact gradient.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.kernels import chunked, row, vendor
from danlu.kernels.regions import Block, Part, plan
from danlu.kernels.vendor import choose_route

logger = logging.getLogger("danlu.kernels")


def attend(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    value: Tensor,
    parts: Sequence[Part],
    scale: float | None = None,
    *,
    softcap: float | None = None,
    bias: Tensor | None = None,
    q_slots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute one softmax attention over the union of parts, each with its own query and key tensor.

    Args:
        queries: tensors (batch, heads, Lq, head_dim), rows are the last Lq of Lk positions.
        keys: tensors (batch, kv_heads, M, head_dim), M <= Lk; one with M < Lk holds the last M keys.
        value: (batch, kv_heads, Lk, value_dim); kv_heads divides heads.
        parts: pairs of query and key; no pair may be in two parts.
        scale: factor of the scores; default head_dim ** -0.5.
        softcap: scores become softcap * tanh(score / softcap), as in Gemma 2; None: unchanged.
        bias: (batch or 1, heads or 1, Lq, Lk), bool (True: visible) or additive float, applied after the cap and on top
            of what the parts say.
        q_slots: (batch, Lq) slot of each query, where it is not Lk - Lq + row (static caches).

    Returns:
        (out, lse): out (batch, heads, Lq, value_dim) of the dtype of the queries; lse (batch, heads, Lq), the natural
        log of the sum of exp(score), float32 or float64. A row that sees no key has out 0 and lse -inf. Both are
        differentiable.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or a part names a tensor or slot that does not exist.

    Source: arXiv:2205.14135; arXiv:2310.01889 (merged backward).
    """
    _check(queries, keys, value, parts)
    head_dim = queries[0].shape[-1]
    scale = head_dim**-0.5 if scale is None else float(scale)
    route, reason = choose_route(queries[0], value, parts, softcap=softcap, bias=bias, q_slots=q_slots)
    if not torch.compiler.is_compiling() and logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s route for %s queries, %s values: %s", route, tuple(queries[0].shape), value.dtype, reason)
    if route == "math":
        return chunked.attend(queries, keys, value, parts, scale, softcap=softcap, bias=bias, q_slots=q_slots)
    if route == "row":
        return row.attend(queries, keys, value, parts, scale)
    # kernels want one head size; zero columns change neither scores nor the first columns of the output
    value_dim = value.shape[-1]
    wide = max(head_dim, value_dim)
    value = _pad(value, wide)
    tensors = (*(_pad(x, wide) for x in queries), *(_pad(x, wide) for x in keys))
    n_queries = len(queries)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, value)):
        out, lse = _Attend.apply(tuple(parts), scale, n_queries, value, *tensors)
    else:
        out, lse = _forward(parts, scale, tensors[:n_queries], tensors[n_queries:], value)
    return (out if wide == value_dim else out[..., :value_dim]), lse


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attentions over disjoint sets of keys into the attention over their union.

    Args:
        outs: outputs (..., length, value_dim) of the parts, same shape.
        lses: natural log-sum-exps (..., length) of the parts; -inf where a part sees no key.

    Returns:
        (out, lse) over the union; out has the dtype of the first part, lse float32 or better. Differentiable.

    Raises:
        ValueError: no part, or unequal numbers of outputs and log-sum-exps.

    Source: arXiv:2205.14135.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"merge needs one log-sum-exp per output, got {len(outs)} outputs and {len(lses)}")
    top, weights = relative_weights(torch.stack([x if x.dtype == torch.float64 else x.float() for x in lses]))
    total = weights.sum(0)
    seen = total > 0
    safe = torch.where(seen, total, torch.ones_like(total))
    out = torch.zeros((), dtype=weights.dtype, device=weights.device)
    for o, weight in zip(outs, weights, strict=True):
        out = out + o.to(weights.dtype) * (weight / safe)[..., None]
    lse = torch.where(seen, top + safe.log(), torch.full_like(top, -torch.inf))
    return out.to(outs[0].dtype), lse


def relative_weights(logs: Tensor) -> tuple[Tensor, Tensor]:
    """Exponentials of stacked logarithms against their largest: what every merge of softmax states begins with.

    Args:
        logs: (n, ...), -inf allowed, also for all n.

    Returns:
        (top, weights): the largest (...), without gradient, and exp(logs - top) (n, ...), 0 where a logarithm is -inf.
    """
    top = logs.detach().amax(0)
    return top, (logs - top.masked_fill(top == -math.inf, 0.0)).exp()


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, parts: tuple[Part, ...], scale: float, n_queries: int, value: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        out, lse = _forward(parts, scale, tensors[:n_queries], tensors[n_queries:], value)
        ctx.save_for_backward(value, out, lse, *tensors)
        ctx.plan = parts, scale, n_queries
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        parts, scale, n_queries = ctx.plan
        value, out, lse, *tensors = ctx.saved_tensors
        grad_out, grad_lse = grads
        if grad_out is None and grad_lse is None:
            return (None,) * (4 + len(tensors))
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        head_dim = value.shape[-1]
        if grad_lse is not None:
            # dS = P * (dO.v + dlse - delta): dlse enters as one more column of dO, against a column of ones in v
            grad_out = torch.cat((grad_out, grad_lse[..., None].to(grad_out.dtype)), -1)
            value = torch.cat((value, torch.ones_like(value[..., :1])), -1)
            width = head_dim + 8  # CUDA kernels want multiples of 8
            grad_out, value, out, *tensors = (_pad(x, width) for x in (grad_out, value, out, *tensors))
        d_value, d_tensors = _backward(parts, scale, n_queries, tensors, value, out, lse, grad_out)
        if grad_lse is not None:
            d_value, *d_tensors = (x[..., :head_dim] for x in (d_value, *d_tensors))
        return None, None, None, d_value, *d_tensors


class _Sum:
    """A tensor that grows by contributions to runs of rows (axis 2): the first one is copied, the next are added."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        batch, heads, length, *rest = like.shape
        # the memory order (batch, length, heads, head_dim) is that of kernel outputs and of the projections beyond
        self.tensor = like.new_empty((batch, length, heads, *rest), dtype=dtype).transpose(1, 2)
        self.written: list[tuple[int, int]] = []

    def claim(self, first: int, last: int) -> bool:
        """Announce a contribution to rows [first, last); True if it may overwrite them."""
        fresh = all(last <= a or b <= first for a, b in self.written)
        if not fresh:
            self._clear(first, last)
        self.written.append((first, last))
        return fresh

    def _clear(self, first: int, last: int) -> None:
        for a, b in sorted(self.written):
            if first < min(a, last):
                self.tensor[:, :, first : min(a, last)] = self.empty
            first = max(first, b)
        if first < last:
            self.tensor[:, :, first:last] = self.empty

    empty = 0.0

    def add(self, first: int, last: int, value: Tensor) -> None:
        fresh = self.claim(first, last)
        target = self.tensor[:, :, first:last]
        target.copy_(value) if fresh else target.add_(value)

    def finish(self, dtype: torch.dtype) -> Tensor:
        self._clear(0, self.tensor.shape[2])
        return self.tensor.to(dtype)


class _LogSum(_Sum):
    empty = -math.inf


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _forward(
    parts: Sequence[Part], scale: float, queries: Sequence[Tensor], keys: Sequence[Tensor], value: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = queries[0].dtype
    high = _accumulation_dtype(dtype)
    n_queries, n_keys = queries[0].shape[2], value.shape[2]
    blocks = [block for part in parts for block in plan(part, n_queries, n_keys)]
    if len(blocks) == 1 and blocks[0].kind != "band" and blocks[0].rows == (0, n_queries):
        return vendor.forward(blocks[0], *_operands(blocks[0], queries, keys, value), scale)
    out, lse = _Sum(queries[0], high), _LogSum(queries[0][..., 0], high)
    for block in blocks:
        operands = _operands(block, queries, keys, value)
        first, last = block.rows
        block_out, block_lse = vendor.forward(block, *operands, scale)
        fresh = out.claim(first, last)
        lse.claim(first, last)
        old_out, old_lse = out.tensor[:, :, first:last], lse.tensor[:, :, first:last]
        if fresh:
            old_out.copy_(block_out)
            old_lse.copy_(block_lse)
        else:  # an untouched row has lse -inf, hence weight 1 for the new block
            old_out.lerp_(block_out.to(high), torch.sigmoid(block_lse - old_lse)[..., None])
            torch.logaddexp(old_lse, block_lse.to(high), out=old_lse)
    return out.finish(dtype), lse.finish(high)


def _backward(
    parts: Sequence[Part],
    scale: float,
    n_queries: int,
    tensors: Sequence[Tensor],
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    queries, keys = tensors[:n_queries], tensors[n_queries:]
    high = _accumulation_dtype(value.dtype)
    d_queries, d_keys = [_Sum(x, high) for x in queries], [_Sum(x, high) for x in keys]
    d_value = _Sum(value, high)
    lq, lk = queries[0].shape[2], value.shape[2]
    for part in parts:
        for block in plan(part, lq, lk):
            rows = slice(*block.rows)
            state = out[:, :, rows], lse[:, :, rows], grad_out[:, :, rows]
            operands = _operands(block, queries, keys, value)
            offset = lk - keys[part.key].shape[2]
            for grad, total, first in zip(
                vendor.backward(block, *operands, *state, scale),
                (d_queries[part.query], d_keys[part.key], d_value),
                (block.rows[0], block.columns[0] - offset, block.columns[0]),
                strict=True,
            ):
                total.add(first, first + grad.shape[2], grad)
    grads = [total.finish(value.dtype) for total in (*d_queries, *d_keys)]
    return d_value.finish(value.dtype), grads


def _operands(
    block: Block, queries: Sequence[Tensor], keys: Sequence[Tensor], value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Slice the rows of the query and the slots of key and value that a block works on."""
    query = queries[block.part.query][:, :, slice(*block.rows)]
    return query, block.slots(keys[block.part.key], value.shape[2]), value[:, :, slice(*block.columns)]


def _pad(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _check(queries: Sequence[Tensor], keys: Sequence[Tensor], value: Tensor, parts: Sequence[Part]) -> None:
    if not queries or not keys:
        raise ValueError(f"attend needs at least one query and one key tensor, got {len(queries)} and {len(keys)}")
    shape, n_keys = queries[0].shape, value.shape[2]
    if any(x.shape != shape for x in queries) or len(shape) != 4:
        raise ValueError(f"queries must all be (batch, heads, Lq, head_dim), got {[tuple(x.shape) for x in queries]}")
    for x in keys:
        good = x.ndim == 4 and x.shape[:2] == value.shape[:2] and x.shape[2] <= n_keys and x.shape[3] == shape[3]
        if not good or x.shape[0] != shape[0]:
            raise ValueError(
                f"keys must be (batch, kv_heads, M <= {n_keys}, {shape[3]}) like value {tuple(value.shape)} and "
                f"queries {tuple(shape)}, got {tuple(x.shape)}"
            )
    if shape[1] % max(value.shape[1], 1):
        raise ValueError(f"kv_heads must divide heads = {shape[1]}, got {value.shape[1]}")
    if len({(x.dtype, x.device) for x in (*queries, *keys, value)}) > 1:
        raise ValueError("queries, keys and value must share one dtype and one device")
    if any(not (0 <= part.query < len(queries) and 0 <= part.key < len(keys)) for part in parts):
        raise ValueError(f"parts must name one of {len(queries)} queries and {len(keys)} keys, got {list(parts)}")
