"""Streaming sums over the rows of an attention: blocks of keys go by, and no row is ever held as a whole.

Per row and against its running maximum m, the weights w = exp(s - m) leave Z1 = sum w, Z2 = sum w^2,
T = sum (s - m) w, and sums of w times distance and times indicators.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["softmax"] | Callable[[Tensor], Tensor]
# exp of it is 0 in float32 and float64, and unlike -inf it can be multiplied by 0
_FLOOR = -800.0
# columns of the sums that all scale alike
MASS, DISTANCE, SINK, LOCAL, TARGET = range(5)


def masked_scores(
    q: Tensor,
    k: Tensor,
    query_slots: Tensor,
    key_slots: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scores of some rows against some keys.

    Args:
        q: shape ``(heads, rows, d)``, float32 or float64.
        k: shape ``(kv_heads, columns, d)``, of the same type.
        query_slots: int64, shape ``(rows,)``.
        key_slots: int64, shape ``(columns,)``.
        scale: factor of the scores.
        causal: a row sees no later slot.
        window: a row sees only keys at a distance below it.
        softcap: scores become ``softcap * tanh(score / softcap)`` before the mask.
        mask: broadcastable to ``(heads, rows, columns)``, bool or additive.

    Returns:
        (scores, hidden): scores of shape ``(heads, rows, columns)``, -inf where hidden; hidden broadcasts to it, or is
        None where nothing is.
    """
    heads, n_rows, _ = q.shape
    scores = ((q * scale).reshape(k.shape[0], -1, q.shape[-1]) @ k.mT).view(heads, n_rows, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = None
    if causal or window is not None:
        ahead = query_slots[:, None] - key_slots
        hidden = ahead < 0 if causal else torch.zeros_like(ahead, dtype=torch.bool)
        if window is not None:
            hidden = hidden | (ahead >= window)
    if mask is not None:
        if mask.dtype == torch.bool:
            unseen = ~mask
        else:
            unseen = mask <= torch.finfo(mask.dtype).min / 2
            scores = scores + mask.to(scores.dtype)
        hidden = unseen if hidden is None else hidden | unseen
    if hidden is not None:
        scores = scores.masked_fill_(hidden, -math.inf)
    return scores, hidden


@dataclass(frozen=True)
class Rule:
    """What a row may see, and what is asked of it."""

    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    sinks: int
    local: int
    shift: int

    def blocks(self, rows: slice, n_keys: int, columns: int) -> list[slice]:
        """Runs of keys that some of the rows may see; the first and the last may be cut short."""
        low, high = rows.start + self.shift, rows.stop + self.shift
        start = 0 if self.window is None else max(0, low - self.window + 1)
        stop = min(n_keys, high) if self.causal else n_keys
        return [slice(c, min(c + columns, stop)) for c in range(start - start % columns, stop, columns)]


class Totals:
    """The sums of all rows."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, kernel: Kernel):
        self.kernel = kernel
        self.top = torch.full(shape, -math.inf if kernel == "softmax" else 0.0, dtype=dtype, device=device)
        self.sums = torch.zeros((*shape, 5), dtype=dtype, device=device)
        self.squares, self.logs, self.sink = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(3))
        self.keys = torch.zeros(shape, dtype=torch.int64, device=device)

    def add_sink(self, logits: Tensor) -> None:
        """Count a learnt sink: one candidate with weight 1 against itself as the maximum."""
        self.top = logits.clone()
        self.sums[..., MASS] = self.sums[..., SINK] = 1
        self.squares += 1
        self.sink += 1
        self.keys += 1

    def rows(self, b: int, heads: slice, rows: slice) -> Rows:
        """The sums of some rows of one batch entry, to add to."""
        return Rows(self, (b, heads, rows))


class Rows:
    """The sums of a few rows while keys stream by."""

    def __init__(self, totals: Totals, where: tuple[int, slice, slice]):
        self.totals, self.where = totals, where
        self.top, self.sums, self.squares, self.logs, self.sink, self.keys = (
            x[where].clone() for x in (totals.top, totals.sums, totals.squares, totals.logs, totals.sink, totals.keys)
        )

    def write_back(self) -> None:
        """Put the sums of these rows back in their place."""
        for name in ("top", "sums", "squares", "logs", "sink", "keys"):
            getattr(self.totals, name)[self.where] = getattr(self, name)

    def add(
        self,
        query: Tensor,
        keys: Tensor,
        rule: Rule,
        rows: slice,
        columns: slice,
        mask: Tensor | None,
        first: int,
        targets: Tensor | None,
    ) -> None:
        """Add the weights of some keys."""
        device = query.device
        i = torch.arange(rows.start + rule.shift, rows.stop + rule.shift, device=device)
        j = torch.arange(columns.start, columns.stop, device=device)
        near, far = rows.start + rule.shift - (columns.stop - 1), rows.stop - 1 + rule.shift - columns.start
        scores, hidden = masked_scores(
            query,
            keys,
            i,
            j,
            scale=rule.scale,
            causal=rule.causal and near < 0,
            window=rule.window if rule.window is not None and far >= rule.window else None,
            softcap=rule.softcap,
            mask=mask,
        )
        seen = torch.full_like(i, j.numel()) if hidden is None else (~hidden).sum(-1)
        self.keys += seen
        weights, logs = self._weigh(scores, hidden)
        # Sums that are linear in the weights are one product with a few columns; distances from the block's corner, so
        # that a far block loses nothing to rounding.
        order = torch.arange(j.numel(), device=device)
        sunk = (j >= first) & (j < first + rule.sinks)
        linear = weights @ torch.stack((torch.ones_like(order), order, sunk), -1).to(weights)
        mass, offset = linear[..., 0], linear[..., 1]
        if near >= 0 or far <= 0:
            lag = (i - columns.start).to(weights)
            distance = (lag * mass - offset) if near >= 0 else (offset - lag * mass)
            local = mass if max(far, -near) < rule.local else torch.zeros_like(mass)
            mixed = min(abs(near), abs(far)) < rule.local <= max(far, -near)
        else:
            gap = (i[:, None] - j).abs().to(weights)
            distance, mixed, local = torch.linalg.vecdot(weights, gap), True, mass
        if mixed:
            local = torch.linalg.vecdot(weights, ((i[:, None] - j).abs() < rule.local).to(weights))
        target = torch.zeros_like(mass)
        if targets is not None:
            place = targets - columns.start
            inside = (place >= 0) & (place < j.numel())
            found = weights.gather(-1, place.clamp(0, j.numel() - 1)[..., None])[..., 0]
            target = torch.where(inside, found, target)
        self.sums += torch.stack((mass, distance, linear[..., 2], local, target), -1)
        self.logs += logs
        self.squares += weights.mul_(weights).sum(-1)

    def _weigh(self, scores: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights of a block against the maximum so far, and their sum of w ln w."""
        kernel = self.totals.kernel
        if kernel != "softmax":
            bare = scores if hidden is None else scores.masked_fill(hidden, 0.0)
            weights = kernel(bare).abs()
            if hidden is not None:
                weights = weights.masked_fill(hidden, 0.0)
            self.top = torch.maximum(self.top, weights.amax(-1))
            return weights, torch.special.xlogy(weights, weights).sum(-1)
        top = torch.maximum(self.top, scores.amax(-1))
        safe = top.masked_fill(top == -math.inf, 0.0)
        rise = torch.where(self.top == -math.inf, 0.0, safe - self.top)
        shrink = torch.exp(-rise)
        self.logs = shrink * (self.logs - rise * self.sums[..., MASS])
        self.sums *= shrink[..., None]
        self.sink *= shrink
        self.squares *= shrink.square()
        self.top = top
        logs = scores.sub_(safe[..., None])
        if hidden is not None:
            logs.clamp_(min=_FLOOR)
        weights = logs.exp()
        return weights, logs.mul_(weights).sum(-1)
