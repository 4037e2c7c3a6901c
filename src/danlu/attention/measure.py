"""How concentrated attention is, row by row, without ever holding the attention matrix.

One pass over blocks of keys keeps, per row and against its running maximum m, the sums Z1 = sum w, Z2 = sum w^2 and
T = sum (s - m) w of the weights w = exp(s - m), and weighted sums of distance and of indicators. From these:
sum p^2 = Z2 / Z1^2, H = ln Z1 - T / Z1, lse = m + ln Z1, max p = 1 / Z1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from danlu.kernels.row_sums import DISTANCE, LOCAL, MASS, SINK, TARGET, Kernel, Rule, Totals

__all__ = ["AttentionStats", "attention_stats"]

# scores held at once, in elements: they stay in the second-level cache between the passes over them
_BLOCK_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class AttentionStats:
    """Statistics of attention rows, each of shape (batch, heads, Lq) and float32, or float64 for float64 inputs.

    A row without a visible key, or whose weights are all zero, is NaN except in ``keys``, the masses included.

    Attributes:
        keys: visible candidates n, int64; a learnt sink counts as one.
        sparsity: ``mean w / sqrt(mean w^2)`` over the visible candidates, in [1/sqrt(n), 1].
        effective_tokens: ``1 / sum p^2``, in [1, n].
        entropy: Shannon entropy in nats.
        max_probability: largest share of one candidate.
        distance: mean of ``|i - j|`` under the attention, in slots, over real keys.
        sink_mass: share of the first tokens, and of a learnt sink.
        local_mass: share of keys closer than ``local``, the query's own included.
        target_mass: share of the given target slots, or None.
        lse: natural log of the sum of the weights.
    """

    keys: Tensor
    sparsity: Tensor
    effective_tokens: Tensor
    entropy: Tensor
    max_probability: Tensor
    distance: Tensor
    sink_mass: Tensor
    local_mass: Tensor
    target_mass: Tensor | None
    lse: Tensor


def attention_stats(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    kernel: Kernel = "softmax",
    sinks: int = 4,
    local: int = 32,
    targets: Tensor | None = None,
    sink_logits: Tensor | None = None,
    first: Tensor | None = None,
    block: tuple[int, int] | None = None,
) -> AttentionStats:
    """Measure each row of an attention in one pass and O(L d) memory.

    Args:
        q: queries, shape ``(batch, heads, Lq, d)``; rows are the last Lq of Lk slots.
        k: keys, shape ``(batch, kv_heads, Lk, d)``; kv_heads divides heads.
        causal: a row sees no later slot.
        mask: bool, True = visible, shape ``(batch, Lk)`` or broadcastable to ``(batch, heads, Lq, Lk)``; or additive
            floats of the latter shape, where the lowest numbers hide a key. On top of ``causal`` and ``window``.
        window: a row sees only keys with ``i - j < window``, >= 1; None: all.
        scale: factor of the scores; default ``d ** -0.5``.
        softcap: scores become ``softcap * tanh(score / softcap)`` before the mask; None: unchanged.
        kernel: ``"softmax"``, or an elementwise function of the scores that gives weights of any sign, for instance
            ``lambda s: s.relu().square()``. Linear attention: pass feature maps of q and k, ``scale=1`` and the
            identity. Statistics are of ``|w| / sum |w|``.
        sinks: how many of the first tokens count as sinks, >= 0.
        local: keys with ``|i - j| < local`` are near, >= 0.
        targets: int64 slot to watch per row, broadcastable to ``(batch, heads, Lq)``; mass 0 where it is hidden or
            outside 0..Lk-1.
        sink_logits: a learnt logit per head, shape ``(heads,)``: one more candidate without a value (softmax only).
        first: int64 slot of the first token, shape ``(batch,)``, negative if it has left a cache; default: the first
            slot that any row may see.
        block: rows and keys of one step; default: as many as stay in cache.

    Returns:
        The statistics per row. Results do not depend on ``block`` beyond rounding. Nothing is differentiable.

    Raises:
        ValueError: shapes disagree, an argument is out of range, or k is empty.

    Source: Scientific Spaces archive 9889
    """
    _check(q, k, mask, window, sinks, local, sink_logits, kernel, block)
    with torch.no_grad():
        high = torch.float64 if q.dtype == torch.float64 else torch.float32
        batch, heads, n_rows, d = q.shape
        n_keys, group = k.shape[2], heads // k.shape[1]
        rows, columns = block or (128, 512)
        mask = _as_4d(mask)
        lanes = max(1, _BLOCK_ELEMENTS // (min(rows, max(n_rows, 1)) * min(columns, n_keys) * group))
        if first is None:
            first = _first_visible(mask, batch, q.device)
        watched = None if targets is None else targets.to(q.device).expand(batch, heads, n_rows)
        rule = Rule(causal, window, d**-0.5 if scale is None else scale, softcap, sinks, local, n_keys - n_rows)
        totals = Totals((batch, heads, n_rows), high, q.device, kernel)
        if sink_logits is not None:
            totals.add_sink(sink_logits.to(high)[None, :, None].expand(batch, heads, n_rows))
        for b in range(batch):
            start = int(first[b])
            for lane in range(0, k.shape[1], lanes):
                kv = slice(lane, min(lane + lanes, k.shape[1]))
                h = slice(kv.start * group, kv.stop * group)
                keys = k[b, kv].to(high)
                for r in range(0, n_rows, rows):
                    rr = slice(r, min(r + rows, n_rows))
                    query = q[b, h, rr].to(high)
                    state = totals.rows(b, h, rr)
                    for c in rule.blocks(rr, n_keys, columns):
                        piece = _slice_mask(mask, b, h, rr, c)
                        chosen = None if watched is None else watched[b, h, rr]
                        state.add(query, keys[:, c], rule, rr, c, piece, start, chosen)
                    state.write_back()
        return _statistics(totals, watched is not None)


def _statistics(totals: Totals, with_targets: bool) -> AttentionStats:
    mass = totals.sums[..., MASS]
    mass = torch.where(mass > 0, mass, math.nan)
    softmax = totals.kernel == "softmax"
    largest = torch.ones_like(mass) if softmax else totals.top
    share = totals.sums / mass[..., None]
    real = mass - totals.sink
    effective = mass.square() / totals.squares
    return AttentionStats(
        keys=totals.keys,
        sparsity=(effective / totals.keys).sqrt(),
        effective_tokens=effective,
        entropy=mass.log() - totals.logs / mass,
        max_probability=largest / mass,
        distance=totals.sums[..., DISTANCE] / torch.where(real > 0, real, math.nan),
        sink_mass=share[..., SINK],
        local_mass=share[..., LOCAL],
        target_mass=share[..., TARGET] if with_targets else None,
        lse=torch.where(mass > 0, mass.log() + (totals.top if softmax else 0), -math.inf),
    )


def _as_4d(mask: Tensor | None) -> Tensor | None:
    return mask[:, None, None, :] if mask is not None and mask.ndim == 2 else mask


def _slice_mask(mask: Tensor | None, b: int, heads: slice, rows: slice, columns: slice) -> Tensor | None:
    if mask is None:
        return None
    piece = mask[b if mask.shape[0] > 1 else 0]
    piece = piece[heads] if piece.shape[0] > 1 else piece
    piece = piece[:, rows] if piece.shape[1] > 1 else piece
    return piece[..., columns]


def _first_visible(mask: Tensor | None, batch: int, device: torch.device) -> Tensor:
    if mask is None:
        return torch.zeros(batch, dtype=torch.int64, device=device)
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen.flatten(1, 2).any(1).int().argmax(-1).expand(batch)


def _check(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    window: int | None,
    sinks: int,
    local: int,
    sink_logits: Tensor | None,
    kernel: Kernel,
    block: tuple[int, int] | None,
) -> None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q and k must be (batch, heads, Lq, d) and (batch, kv_heads, Lk, d), got {tuple(q.shape)} and "
            f"{tuple(k.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"kv_heads must divide heads = {q.shape[1]}, got {k.shape[1]}")
    if k.shape[2] == 0:
        raise ValueError("k must hold at least one key: attention over nothing has no statistics")
    if mask is not None:
        whole = (q.shape[0], k.shape[2]) if mask.ndim == 2 else (*q.shape[:3], k.shape[2])
        fits = mask.ndim in (2, 4) and all(a in (1, b) for a, b in zip(mask.shape, whole, strict=True))
        if not fits or mask.shape[-1] != k.shape[2] or (mask.ndim == 2 and mask.dtype != torch.bool):
            raise ValueError(
                f"mask must be bool of shape {(q.shape[0], k.shape[2])}, or bool or floats that broadcast to "
                f"{(*q.shape[:3], k.shape[2])}, got {mask.dtype} of shape {tuple(mask.shape)}"
            )
    if window is not None and window < 1:
        raise ValueError(f"window must be >= 1, got {window}; use None for no window")
    if sinks < 0 or local < 0:
        raise ValueError(f"sinks and local must be >= 0, got {sinks} and {local}")
    if sink_logits is not None and (kernel != "softmax" or sink_logits.shape != q.shape[1:2]):
        raise ValueError(f"sink_logits must be ({q.shape[1]},) with the softmax kernel, got {tuple(sink_logits.shape)}")
    if block is not None and min(block) < 1:
        raise ValueError(f"block must be (rows, keys), each >= 1, got {block}")
