"""One query at a time, as in decoding: products and one softmax read each key and value once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from danlu.kernels.regions import Part, plan


def attend(
    queries: Sequence[Tensor], keys: Sequence[Tensor], value: Tensor, parts: Sequence[Part], scale: float
) -> tuple[Tensor, Tensor]:
    """Attend with a single query row; differentiable.

    Args:
        queries: tensors (batch, heads, 1, head_dim), float32 or float64.
        keys: tensors (batch, kv_heads, M, head_dim); one with M < Lk holds the last M keys.
        value: (batch, kv_heads, Lk, value_dim).
        parts: pairs of query and key.
        scale: factor of the scores.

    Returns:
        (out, lse) as `flash.attend`.

    Raises:
        ValueError: a part reaches keys that its key tensor does not hold.
    """
    batch, heads, _, _ = queries[0].shape
    kv_heads, n_keys = value.shape[1:3]
    blocks = sorted((b for part in parts for b in plan(part, 1, n_keys)), key=lambda block: block.columns)
    if not blocks:
        lse = value.new_full((batch, heads, 1), -torch.inf)
        return value.new_zeros(batch, heads, 1, value.shape[3]), lse
    scores = []
    for block in blocks:
        key = block.slots(keys[block.part.key], n_keys)
        # the heads of a group are the rows of one product
        query = queries[block.part.query].reshape(batch, kv_heads, heads // kv_heads, -1)
        scores.append(query * scale @ key.mT)
    joined = torch.cat(scores, -1) if len(scores) > 1 else scores[0]
    weights = joined.softmax(-1)
    lse = joined.amax(-1) - weights.amax(-1).log()  # the same as logsumexp, without a second pass of exponentials
    start, stop = blocks[0].columns[0], blocks[-1].columns[1]
    if stop - start == joined.shape[-1]:  # the columns follow on each other
        out = weights @ value[:, :, start:stop]
    else:
        pieces = weights.split([block.columns[1] - block.columns[0] for block in blocks], -1)
        out = torch.stack([p @ value[:, :, slice(*b.columns)] for p, b in zip(pieces, blocks, strict=True)]).sum(0)
    return out.reshape(batch, heads, 1, -1), lse.reshape(batch, heads, 1)
