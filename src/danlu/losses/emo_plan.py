"""What one call of the earth-mover loss computes: the ground cost, the targets, the rows that count and their tiles."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from danlu.losses.emo_logits import Workspace, wide
from danlu.losses.mixing import Mixture


@dataclass(frozen=True)
class Cost:
    """Ground cost 1 - <e_i, e_j> between tokens, from the directions of a table's rows.

    Make one with :meth:`of` to check and measure a table once and use it in many calls.

    Args:
        table: shape (V_e, d_e). Tokens from V_e on, and rows of zeros, have cost 1 to every token.
        inverse: one over each row's length, 0 for rows of zeros; none for a table of unit rows.
    """

    table: Tensor
    inverse: Tensor | None = None

    @classmethod
    def of(cls, embedding: Tensor) -> Cost:
        """Measure the rows of an embedding, which is neither copied nor changed.

        Args:
            embedding: floating, shape (V_e, d_e), without gradient.

        Raises:
            TypeError: not a floating tensor.
            ValueError: not a matrix, requires a gradient, or holds an infinity or NaN.
        """
        if not isinstance(embedding, Tensor) or not embedding.is_floating_point():
            kind = embedding.dtype if isinstance(embedding, Tensor) else type(embedding).__name__
            raise TypeError(f"cost_embedding must be a floating-point tensor, got {kind}")
        if embedding.ndim != 2:
            raise ValueError(f"cost_embedding must have shape (vocabulary, width), got {tuple(embedding.shape)}")
        if embedding.requires_grad:
            raise ValueError("cost_embedding must not require a gradient, it is a constant of the loss; detach() it")
        length = torch.linalg.vector_norm(embedding, dim=1, dtype=wide(embedding.dtype))
        if not bool(length.isfinite().all()):
            row = int((~length.isfinite()).nonzero()[0])
            raise ValueError(f"cost_embedding must be finite, got an infinity or NaN in row {row}")
        return cls(embedding, torch.where(length > 0, 1 / length, 0))

    def unit(self) -> Tensor:
        """A new table of unit rows in the dtype of this one."""
        if self.inverse is None:
            return self.table.clone()
        return (self.table * self.inverse[:, None]).to(self.table.dtype)

    def directions(self, ids: Tensor) -> Tensor:
        """Unit rows e_t of tokens, shape (n, d_e); zeros beyond the table."""
        known = ids < len(self.table)
        ids = torch.where(known, ids, 0)
        inverse = self.inverse.index_select(0, ids) if self.inverse is not None else torch.ones_like(known).float()
        rows = self.table.index_select(0, ids) * torch.where(known, inverse, 0)[:, None]
        return rows.to(self.table.dtype)

    def mean_direction(self, soft: Iterable[tuple[int, Tensor]]) -> Tensor:
        """E^T tau of rows tau of shape (n, V), given as (start, columns) parts, shape (n, d_e)."""
        total: Tensor | None = None
        for start, part in soft:
            part = part[:, : max(0, len(self.table) - start)]
            if self.inverse is not None:
                part = part * self.inverse[start : start + part.shape[1]]
            added = part.to(self.table.dtype) @ self.table[start : start + part.shape[1]]
            total = added if total is None else total + added
        if total is None:
            raise ValueError("soft must have at least one part, got none")
        return total

    def similarity(self, q: Tensor, start: int, stop: int, out: Tensor) -> Tensor:
        """<q, e_j> for start <= j < stop, written into ``out`` of shape (n, stop - start)."""
        known = max(0, min(stop, len(self.table)) - start)
        out[:, known:] = 0
        if known:
            columns = self.table[start : start + known]
            if out.dtype == columns.dtype and known == stop - start:
                torch.mm(q, columns.T, out=out)
            else:
                out[:, :known] = q @ columns.T
            if self.inverse is not None:
                out[:, :known].mul_(self.inverse[start : start + known])
        return out


class HardTarget:
    """One label for each row; rows with the same label share one row of similarities."""

    def __init__(self, labels: Tensor, cost: Cost):
        self.labels, self.cost = labels, cost
        distinct, self.back = torch.unique_consecutive(labels, return_inverse=True)
        self.q = cost.directions(distinct)

    def similarity(self, start: int, stop: int, space: Workspace) -> Tensor:
        """s_j = <e_t, e_j> for each row."""
        out = space.take("similarity", len(self.labels), stop - start)
        if len(self.q) == len(self.labels):
            return self.cost.similarity(self.q, start, stop, out)
        few = self.cost.similarity(self.q, start, stop, space.take("distinct", len(self.q), stop - start))
        return torch.index_select(few, 0, self.back, out=out)

    def pick(self, x: Tensor, start: int, stop: int) -> Tensor:
        """The target's entry of each row, 0 where it is not in this tile."""
        place = self.labels - start
        here = (place >= 0) & (place < stop - start)
        picked = x.gather(1, place.clamp(0, stop - start - 1)[:, None])[:, 0]
        return torch.where(here, picked, 0)

    def subtract_(self, dz: Tensor, amount: Tensor, start: int, stop: int) -> None:
        """Take ``amount`` off the target's entry of each row."""
        place = self.labels - start
        here = (place >= 0) & (place < stop - start)
        dz.scatter_add_(1, place.clamp(0, stop - start - 1)[:, None], torch.where(here, -amount, 0)[:, None])


class SoftTarget:
    """A distribution over the vocabulary for each row: rows ``index`` of ``soft``, shape (N, V)."""

    def __init__(self, soft: Tensor, index: Tensor, cost: Cost, tiles: list[tuple[int, int]]):
        self.soft, self.index, self.cost = soft, index, cost
        self.q = cost.mean_direction([(start, self._tile(start, stop)) for start, stop in tiles])

    def _tile(self, start: int, stop: int) -> Tensor:
        return self.soft[:, start:stop].index_select(0, self.index).to(wide(self.soft.dtype))

    def similarity(self, start: int, stop: int, space: Workspace) -> Tensor:
        """<E^T tau, e_j> for each row."""
        return self.cost.similarity(self.q, start, stop, space.take("similarity", len(self.q), stop - start))

    def pick(self, x: Tensor, start: int, stop: int) -> Tensor:
        """The mean of each row under its target; an entry of -inf that the target gives no weight does not count."""
        return (x.clamp_min(torch.finfo(x.dtype).min) * self._tile(start, stop)).sum(1)

    def subtract_(self, dz: Tensor, amount: Tensor, start: int, stop: int) -> None:
        """Take ``amount`` times the target off each row."""
        dz.sub_(amount[:, None] * self._tile(start, stop))


@dataclass(frozen=True)
class Plan:
    """What one call computes, for all its rows.

    Args:
        cost: between tokens.
        mixture: of cross entropy and earth-mover loss.
        share: of the mixture against plain cross entropy.
        labels: shape (N,), valid where ``index`` points.
        soft: soft labels in place of labels, shape (N, V), or none.
        index: rows that count, sorted by label so that equal ones meet in one chunk.
        rows: rows of a tile.
        columns: columns of a tile.
    """

    cost: Cost
    mixture: Mixture
    share: float
    labels: Tensor
    soft: Tensor | None
    index: Tensor
    rows: int
    columns: int

    def tiles(self, vocabulary: int) -> list[tuple[int, int]]:
        """Stretches of the vocabulary."""
        return [(start, min(start + self.columns, vocabulary)) for start in range(0, vocabulary, self.columns)]

    def chunks(self) -> tuple[Tensor, ...]:
        """Groups of rows."""
        return self.index.split(self.rows) if len(self.index) else ()

    def target(self, index: Tensor, vocabulary: int) -> HardTarget | SoftTarget:
        """The targets of some rows."""
        if self.soft is None:
            return HardTarget(self.labels.index_select(0, index), self.cost)
        return SoftTarget(self.soft, index, self.cost, self.tiles(vocabulary))


def make_plan(
    shape: tuple[int, ...],
    labels: Tensor | None,
    soft: Tensor | None,
    cost: Cost,
    mixture: Mixture,
    share: float,
    ignore_index: int,
    rows: int,
    columns: int,
) -> Plan:
    """Check what a caller gave, flatten it, and find and sort the rows that count.

    Args:
        shape: of the logits, (..., V), whether they exist or not.
        labels: shape (...), or none with soft labels.
        soft: soft labels of the shape of the logits, or none.
        cost: between tokens.
        mixture: of the losses.
        share: of the mixture.
        ignore_index: label of rows that do not count.
        rows: rows of a tile.
        columns: columns of a tile.

    Raises:
        TypeError: labels that are no integers.
        ValueError: shapes that do not match, labels or shares out of range, soft labels that are no distributions.
    """
    vocabulary = shape[-1]
    if len(cost.table) > vocabulary:
        raise ValueError(
            f"cost_embedding must have at most as many rows as the vocabulary, {vocabulary}, got {len(cost.table)}"
        )
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in 0..1, got {share}")
    if soft is not None:
        if not soft.is_floating_point() or soft.shape != shape:
            raise ValueError(
                f"soft_labels must be floating-point of shape {tuple(shape)}, got {soft.dtype} {tuple(soft.shape)}"
            )
        if soft.requires_grad:
            raise ValueError("soft_labels must not require a gradient; detach() them")
        soft = soft.reshape(-1, vocabulary)
    elif labels is None:
        raise ValueError("labels must be given when soft_labels are not, got None for both")
    if labels is None:
        size = math.prod(shape[:-1])
        index = torch.arange(size, device=cost.table.device)
        return Plan(cost, mixture, share, index, _distributions(soft, index), index, rows, columns)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}; pass distributions as soft_labels")
    if labels.shape != shape[:-1]:
        raise ValueError(f"labels must have shape {tuple(shape[:-1])}, got {tuple(labels.shape)}")
    labels = labels.reshape(-1).long()
    index = (labels != ignore_index).nonzero()[:, 0]
    if soft is not None:
        return Plan(cost, mixture, share, labels, _distributions(soft, index), index, rows, columns)
    kept, order = labels[index].sort(stable=True)
    if len(kept) and (kept[0] < 0 or kept[-1] >= vocabulary):
        bad = int(kept[0] if kept[0] < 0 else kept[-1])
        raise ValueError(f"labels must lie in 0..{vocabulary - 1} or be ignore_index {ignore_index}, got {bad}")
    return Plan(cost, mixture, share, labels, None, index[order], rows, columns)


def _distributions(soft: Tensor | None, index: Tensor) -> Tensor | None:
    """The soft labels, after a check that those which count are distributions."""
    if soft is not None:
        sums = soft.sum(1, dtype=wide(soft.dtype)).index_select(0, index)
        off = (sums - 1).abs() > 1e-2
        if bool((soft.amin(1).index_select(0, index) < 0).any()) or bool(off.any()) or bool(sums.isnan().any()):
            raise ValueError("soft_labels must be >= 0 and sum to 1 over the vocabulary in every row that counts")
    return soft
