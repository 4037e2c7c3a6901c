"""Which pairs of query and key belong to a part of an attention, and how to cut them into blocks that kernels know."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A set of (query, key) pairs that share one pair of tensors.

    Query row r of Lq stands at position i = r + Lk - Lq (queries are the last Lq of Lk positions), key slot j at
    position j. The part holds the pairs with nearest <= i - j < farthest and columns[0] <= j < columns[1]. Parts that
    are merged must not share a pair: a key seen twice counts twice.

    Attributes:
        query: index of the query tensor (one query may be present in several rotations).
        key: index of the key tensor. A key tensor shorter than the value holds the last keys.
        nearest: smallest visible distance, 0 or more; None: keys after the query are visible too.
        farthest: distances from here on are invisible; None: no limit.
        columns: visible slots (start, stop); None: all.
    """

    query: int = 0
    key: int = 0
    nearest: int | None = 0
    farthest: int | None = None
    columns: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.nearest is not None and self.nearest < 0:
            raise ValueError(f"nearest must be 0 or more, or None, got {self.nearest}")
        if self.nearest is not None and self.farthest is not None and self.farthest < self.nearest:
            raise ValueError(f"farthest must be at least nearest = {self.nearest}, got {self.farthest}")
        if self.columns is not None and not 0 <= self.columns[0] <= self.columns[1]:
            raise ValueError(f"columns must be (start, stop) with 0 <= start <= stop, got {self.columns}")


@dataclass(frozen=True)
class Block:
    """One kernel call: rows [r0, r1) of the queries against slots [c0, c1) of the keys.

    Every row sees at least one slot: kernels give a fully masked row the log-sum-exp 0, which no merge could undo.

    Attributes:
        kind: "full"; "causal" (square, own key visible); "band" (each tile of `tile` rows sees `tile + width - 1`
            slots, the window of the next tile is `tile` slots further).
    """

    part: Part
    kind: str
    rows: tuple[int, int]
    columns: tuple[int, int]
    tile: int = 0
    width: int = 0

    @property
    def tiles(self) -> int:
        """Number of tiles of a band."""
        return (self.rows[1] - self.rows[0]) // self.tile

    def slots(self, key: Tensor, n_keys: int) -> Tensor:
        """Give the keys that this block sees, from a tensor that may hold only the last of `n_keys` keys."""
        first, last = (c - n_keys + key.shape[2] for c in self.columns)
        if first < 0:
            raise ValueError(
                f"key tensor {self.part.key} must hold the last {key.shape[2] - first} keys for {self.part}, "
                f"got {key.shape[2]}"
            )
        return key[:, :, first:last]

    def mask(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Give the additive mask (tile, tile + width - 1) of a band: row r sees the `width` slots from r on."""
        if self.kind != "band":
            return None
        slots = torch.arange(self.tile + self.width - 1, device=device)
        ahead = slots - torch.arange(self.tile, device=device)[:, None]
        mask = torch.zeros(ahead.shape, dtype=dtype, device=device)
        return mask.masked_fill_((ahead < 0) | (ahead >= self.width), -torch.inf)


def can_plan(part: Part, n_keys: int) -> bool:
    """Tell whether `plan` can cut a part: one with a farthest distance must be causal and reach to the last slot."""
    if part.farthest is None:
        return True
    return part.nearest is not None and (part.columns is None or part.columns[1] >= n_keys)


def plan(part: Part, n_queries: int, n_keys: int, tile: int | None = None) -> list[Block]:
    """Cut a part into blocks: at most a few calls, no pair twice, no pair missing, no row without a key.

    Args:
        part: the pairs wanted.
        n_queries: Lq, the last positions of Lk.
        n_keys: Lk, at least Lq unless the part has no causal limit.
        tile: rows of a band's tile; None: chosen by the width.

    Returns:
        Blocks, possibly none.

    Raises:
        ValueError: the part is one that `can_plan` refuses; only the math route knows it.
    """
    if not can_plan(part, n_keys):
        raise ValueError(f"a part with a farthest distance must be causal and reach the last slot, got {part}")
    start, stop = part.columns or (0, n_keys)
    stop = min(stop, n_keys)
    shift = n_keys - n_queries
    if n_queries == 0 or start >= stop:
        return []
    if part.nearest is None:
        return [Block(part, "full", (0, n_queries), (start, stop))]
    low, high = part.nearest, part.farthest
    if high is not None and high <= low:
        return []
    if n_queries == 1:  # decoding: whatever one row sees is a run of slots
        first, last = max(start, n_keys - high if high is not None else start), min(stop, n_keys - low)
        return [Block(part, "full", (0, 1), (first, last))] if first < last else []
    # positions i in [begin, clipped) reach back to `start`: they see an ever longer prefix of the columns
    begin = max(shift, start + low)
    clipped = n_keys if high is None else min(n_keys, max(begin, start + high))
    blocks = _staircase(part, shift, (begin, clipped), (start, stop), low)
    if high is None or clipped >= n_keys:
        return blocks
    width = high - low
    tile = tile or _tile_rows(width)
    for first, last in _tiled(clipped, n_keys, tile, width):
        rows, columns = (first - shift, last - shift), (first - high + 1, last - low)
        blocks.append(Block(part, "band", rows, columns, min(tile, last - first), width))
    return blocks


def _staircase(part: Part, shift: int, span: tuple[int, int], columns: tuple[int, int], low: int) -> list[Block]:
    """Cut the rows at positions [begin, end), each seeing slots [start, min(stop, i - low + 1))."""
    (begin, end), (start, stop) = span, columns
    blocks = []
    flat = min(end, max(begin, stop + low))  # from here on every row sees all of the columns
    if begin < flat:
        rows, diagonal = (begin - shift, flat - shift), begin - low
        if start < diagonal:
            blocks.append(Block(part, "full", rows, (start, diagonal)))
        blocks.append(Block(part, "causal", rows, (diagonal, flat - low)))
    if flat < end:
        blocks.append(Block(part, "full", (flat - shift, end - shift), (start, stop)))
    return blocks


def _tiled(first: int, last: int, tile: int, width: int) -> list[tuple[int, int]]:
    """Cut [first, last) into runs of whole tiles and a remainder.

    The windows of a run hold at most about four times its slots in all, because the backward pass stores them side by
    side: with a wide window and a single run its memory would grow with length * width / tile.
    """
    middle = first + (last - first) // tile * tile
    runs = max(1, round((tile + width) / tile / _WINDOW_COPIES))
    step = -(-(middle - first) // tile // runs) * tile or tile
    cuts = [*range(first, middle, step), middle, last]
    return [(a, b) for a, b in itertools.pairwise(cuts) if a < b]


_WINDOW_COPIES = 4


def _tile_rows(width: int) -> int:
    # Measured: a tile of t rows does (t + width) / width of the needed work, but small tiles run below kernel speed.
    return 256 if width >= 256 else 64
