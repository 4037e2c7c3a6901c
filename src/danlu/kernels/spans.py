"""Padded batches: each row attends on its own run of valid slots, so that padding costs nothing and cannot leak."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

Spans = Sequence[tuple[int, int]]


def attend_by_span(
    attend_one: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
) -> tuple[Tensor, Tensor]:
    """Attend row by row of the batch.

    Args:
        attend_one: takes q, k, v of one row without padding, queries last, and gives (out, lse).
        query: (batch, heads, Lq, head_dim), rows are the last Lq of Lk slots.
        key: (batch, kv_heads, Lk, head_dim).
        value: (batch, kv_heads, Lk, value_dim).
        spans: (start, end) of the valid slots of each batch row.

    Returns:
        (out, lse): (batch, heads, Lq, value_dim) and (batch, heads, Lq); padded queries have out 0 and lse -inf.

    Raises:
        ValueError: there is not one (start, end) with 0 <= start <= end <= Lk per batch row.
    """
    n_queries, n_keys = query.shape[2], key.shape[2]
    _check(spans, query.shape[0], n_keys)
    shift = n_keys - n_queries
    outs, lses = [], []
    for row, (start, end) in enumerate(spans):
        first, last = max(start - shift, 0), max(end - shift, 0)
        one = slice(row, row + 1)
        if last > first:
            out, lse = attend_one(query[one, :, first:last], key[one, :, start:end], value[one, :, start:end])
            out = pad(out, (0, 0, first, n_queries - last))
            lse = pad(lse, (first, n_queries - last), value=-math.inf)
        else:
            out = value.new_zeros(1, query.shape[1], n_queries, value.shape[3])
            high = torch.float64 if value.dtype == torch.float64 else torch.float32
            lse = torch.full_like(out[..., 0], -math.inf, dtype=high)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def _check(spans: Spans, batch: int, n_keys: int) -> None:
    if len(spans) != batch:
        raise ValueError(f"spans must have one (start, end) per batch row, got {len(spans)} for a batch of {batch}")
    for start, end in spans:
        if not 0 <= start <= end <= n_keys:
            raise ValueError(f"spans must satisfy 0 <= start <= end <= {n_keys}, got ({start}, {end})")
