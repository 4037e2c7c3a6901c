"""The sums behind an attention probe: one layer's heads over many calls."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from danlu.attention.measure import attention_stats
from danlu.attention.scale import optimal_scale, softmax_grad_l1
from danlu.attention.sparsity import effective_rank
from danlu.context.probe.report import HeadReport
from danlu.kernels.row_sums import masked_scores

_MEANS = (
    "keys",
    "effective_tokens",
    "effective_share",
    "sparsity",
    "entropy",
    "max_probability",
    "distance",
    "sink_mass",
    "local_mass",
)
_SAMPLED = ("effective_rank", "alpha", "objective", "best_alpha", "best_objective")
_BINS = 40  # positions up to 2^40
_SCALE_ROWS = 16


@dataclass(frozen=True)
class Sample:
    """One call of an attention function, in the terms of ``attention_stats``.

    Attributes:
        query: (batch, heads, Lq, d), as the softmax sees them.
        key: (batch, kv_heads, Lk, d).
        mask: as ``attention_stats`` takes it, as the next five.
        causal: a row sees no later slot.
        window: reach of a row.
        scale: factor of the scores.
        softcap: cap of the scores.
        sink_logits: (heads,).
        first: (batch,), slot of the first real token.
        real: bool (batch, Lq), rows that are not padding.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    sink_logits: Tensor | None
    first: Tensor
    real: Tensor


class LayerTotals:
    """Sums of one layer, and its small dense samples."""

    def __init__(self, sinks: int, local: int, rank_rows: int, samples: int):
        self.sinks, self.local, self.rank_rows, self.samples = sinks, local, rank_rows, samples
        self.blank = 0
        self._sums = self._counts = self.bins = self.bin_counts = torch.zeros(0)
        self._sampled: list[Tensor] = []
        self._rows_of_rank = 0

    def add(self, sample: Sample) -> None:
        """Measure a call and add it."""
        stats = attention_stats(
            sample.query,
            sample.key,
            causal=sample.causal,
            mask=sample.mask,
            window=sample.window,
            scale=sample.scale,
            softcap=sample.softcap,
            sinks=self.sinks,
            local=self.local,
            sink_logits=sample.sink_logits,
            first=sample.first,
        )
        heads = sample.query.shape[1]
        if not len(self._sums):
            self._sums, self._counts = torch.zeros(heads, len(_MEANS), dtype=torch.float64), torch.zeros(heads).long()
            self.bins, self.bin_counts = torch.zeros(_BINS, dtype=torch.float64), torch.zeros(_BINS).long()
        values = {name: getattr(stats, name).double() for name in _MEANS if name != "effective_share"}
        values["effective_share"] = values["effective_tokens"] / stats.keys
        table = torch.stack([values[name] for name in _MEANS], -1)
        real = sample.real[:, None].expand(table.shape[:3])
        good = real & table.isfinite().all(-1)
        self.blank += int((real & ~good).sum())
        self._sums += table.masked_fill(~good[..., None], 0.0).sum((0, 2)).cpu()
        self._counts += good.sum((0, 2)).cpu()
        shift = sample.key.shape[2] - sample.query.shape[2]
        positions = torch.arange(shift, shift + sample.query.shape[2], device=good.device) - sample.first[:, None]
        # the exponent of a float32 is exact far beyond any length of text
        power = torch.frexp((positions.clamp(min=0) + 1).double()).exponent.long() - 1
        power = power[:, None].expand(good.shape)[good]
        self.bins += torch.zeros(_BINS, dtype=torch.float64, device=power.device).index_add_(
            0, power, values["effective_tokens"][good]
        ).cpu()  # fmt: skip
        self.bin_counts += torch.bincount(power, minlength=_BINS).cpu()
        for b in range(len(sample.query)):
            if len(self._sampled) < self.samples:
                self._add_dense(sample, b)

    def _add_dense(self, sample: Sample, b: int) -> None:
        """Effective rank, and the scale that passes most gradient, from some rows of one text."""
        rows = sample.real[b].nonzero()[:, 0]
        if len(rows) < 2:  # single decoding steps have no rank
            return
        rows = _spread(rows, self.rank_rows)
        scores = _dense_scores(sample, b, rows)
        scores = scores[:, (scores > -math.inf).any(-1).all(0)]
        if scores.shape[1] < 2:
            return
        with_sink = scores
        if sample.sink_logits is not None:
            sink = sample.sink_logits.to(scores)[:, None, None].expand(*scores.shape[:2], 1)
            with_sink = torch.cat((scores, sink), -1)
        probabilities = with_sink.softmax(-1)[..., : scores.shape[-1]]
        ranks = effective_rank(probabilities)
        late = with_sink[:, with_sink.shape[1] // 2 :]  # rows of about the same number of keys
        late = late[:, _spread(torch.arange(late.shape[1], device=late.device), _SCALE_ROWS)]
        scales = torch.tensor([_scale_report(head) for head in late], dtype=torch.float64)
        self._sampled.append(torch.cat((ranks.cpu()[:, None], scales), -1))
        self._rows_of_rank = max(self._rows_of_rank, scores.shape[1])

    def heads(self, layer: int, first: int) -> Iterator[HeadReport]:
        """A report of each head, counted from ``first``; none before the first call."""
        if self._sampled:
            sampled = torch.stack(self._sampled).nanmean(0)
        else:
            sampled = torch.full((len(self._sums), len(_SAMPLED)), math.nan, dtype=torch.float64)
        for head, (sums, count) in enumerate(zip(self._sums, self._counts.tolist(), strict=True)):
            means = (sums / count if count else sums * math.nan).tolist()
            numbers = dict(zip(_MEANS, means, strict=True)) | dict(zip(_SAMPLED, sampled[head].tolist(), strict=True))
            yield HeadReport(layer=layer, head=first + head, rows=count, rank_rows=self._rows_of_rank, **numbers)

    def used_bins(self) -> int:
        """Bins of positions up to the last one with a row."""
        used = self.bin_counts.nonzero()
        return int(used[-1]) + 1 if len(used) else 0


def mean_by_position(parts: Sequence[LayerTotals], bins: int) -> tuple[float, ...]:
    """Mean effective tokens of a layer's heads in the first bins of positions; NaN where there was no row."""
    if not parts:
        return (math.nan,) * bins
    sums, counts = (torch.stack([getattr(part, name) for part in parts]).sum(0) for name in ("bins", "bin_counts"))
    return tuple((sums / counts)[:bins].tolist())


def _spread(rows: Tensor, most: int) -> Tensor:
    """At most so many of the rows, evenly spaced, the first and the last among them."""
    count = min(len(rows), most)
    return rows[torch.linspace(0, len(rows) - 1, count, device=rows.device).round().long()]


def _dense_scores(sample: Sample, b: int, rows: Tensor) -> Tensor:
    """Scores (heads, rows, Lk) of one text, float64, -inf where hidden."""
    key = sample.key[b].double()
    mask = sample.mask
    if mask is not None:
        mask = mask[:, None, None] if mask.ndim == 2 else mask
        mask = mask[b if mask.shape[0] > 1 else 0]
        mask = mask[:, rows] if mask.shape[1] > 1 else mask
    slots = torch.arange(key.shape[1], device=key.device)
    shift = key.shape[1] - sample.query.shape[2]
    scores, _ = masked_scores(
        sample.query[b, :, rows].double(),
        key,
        rows + shift,
        slots,
        scale=sample.scale,
        causal=sample.causal,
        window=sample.window,
        softcap=sample.softcap,
        mask=mask,
    )
    return scores


def _scale_report(scores: Tensor) -> tuple[float, float, float, float]:
    """Present scale, objective there, best scale and objective there, of the logits (rows, n) of one head."""
    hidden = scores == -math.inf
    kept = (~hidden).sum(-1)
    bare = scores.masked_fill(hidden, 0.0)
    mean = bare.sum(-1) / kept
    alpha = float((bare - mean[:, None]).masked_fill(hidden, 0.0).square().sum(-1).div(kept).sqrt().mean())
    if not 0 < alpha < math.inf:
        return alpha, math.nan, math.nan, math.nan
    unit = scores / alpha
    objective = float(softmax_grad_l1(unit, alpha).median())
    try:
        best = optimal_scale(scores.shape[-1], objective="empirical", scores=unit)
    except ValueError:  # no peak: the logits say nothing that a scale could sharpen
        return alpha, objective, math.nan, math.nan
    return alpha, objective, best, float(softmax_grad_l1(unit, best).median())
