"""Counts of byte n-grams over a corpus: sorted runs of keys, merged in memory or from files, and the table of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from danlu.kernels import ngrams as loops

logger = logging.getLogger("danlu.tokens.trainer")

#: A run: distinct keys in ascending order, and their counts.
Run = tuple[np.ndarray, np.ndarray]


class Runs:
    """Sorted runs, merged as they come; beyond a limit they are written to files.

    Two runs of similar size are merged at once, so every key takes part in few merges and common keys are held once.

    Args:
        limit: bytes of memory for runs and their merging.
        folder: where runs go that do not fit.
        dtype: of the counts; must hold their sum over the corpus.
    """

    def __init__(self, limit: int, folder: Path, dtype: type = np.int64):
        self._limit = limit
        self._folder = folder
        self._dtype = dtype
        self._held: list[Run] = []
        self._spilled: list[tuple[Path, Path]] = []
        #: Sum of all counts, the bytes of the corpus.
        self.total = 0

    def add(self, keys: np.ndarray, counts: np.ndarray) -> None:
        """Add a run."""
        self.total += int(counts.sum())
        self._held.append((keys, counts.astype(self._dtype, copy=False)))
        while len(self._held) > 1 and 2 * self._held[-1][0].size >= self._held[-2][0].size:
            self._held.append(_merged(self._held.pop(), self._held.pop()))
        # Merging needs the room once more.
        if 2 * sum(keys.nbytes + counts.nbytes for keys, counts in self._held) > self._limit:
            self._spill()

    def _spill(self) -> None:
        keys, counts = self._take()
        number = len(self._spilled)
        paths = self._folder / f"run-{number}-keys.npy", self._folder / f"run-{number}-counts.npy"
        np.save(paths[0], keys)
        np.save(paths[1], counts)
        self._spilled.append(paths)
        logger.info("n-gram counts outgrow the memory limit of %d bytes: run %d written", self._limit, number)

    def _take(self) -> Run:
        while len(self._held) > 1:
            self._held.append(_merged(self._held.pop(), self._held.pop()))
        return self._held.pop() if self._held else (np.empty(0, np.uint64), np.empty(0, self._dtype))

    def stretches(self) -> Iterator[Run]:
        """The merged table in ascending order, in stretches that fit the limit; may be called again."""
        if not self._spilled:
            self._held = [self._take()]
            yield self._held[0]
            return
        if self._held:
            self._spill()
        files = [(np.load(keys, mmap_mode="r"), np.load(counts, mmap_mode="r")) for keys, counts in self._spilled]
        size = sum(keys.nbytes + counts.nbytes for keys, counts in files)
        parts = 1 + 4 * size // self._limit
        largest = max((keys for keys, _ in files), key=len)
        splits = [np.uint64(0), *(largest[len(largest) * part // parts] for part in range(1, parts))]
        places = [[int(np.searchsorted(keys, split)) for split in splits] + [keys.size] for keys, _ in files]
        for part in range(parts):
            stretch: Run = np.empty(0, np.uint64), np.empty(0, self._dtype)
            for (keys, counts), place in zip(files, places, strict=True):
                low, high = place[part], place[part + 1]
                stretch = _merged(stretch, (np.array(keys[low:high]), np.array(counts[low:high])))
            yield stretch


def _merged(run: Run, other: Run) -> Run:
    size = run[0].size + other[0].size
    keys, counts = np.empty(size, np.uint64), np.empty(size, run[1].dtype)
    used = loops.merge_keys(*run, *other, keys, counts)
    return keys[:used], counts[:used]


@dataclass(frozen=True)
class GramTable:
    """Log counts of all byte n-grams that were kept.

    Args:
        order: bytes of the longest, n.
        ones: log counts of single bytes, (256,), float64; a byte that does not occur counts 1.
        twos: log counts of two bytes, (65536,), float64; -inf for those not kept.
        layout: first word, capacity and words per slot of the table of each longer length, (8, 3), int64.
        slots: these tables, uint64.
        logs: logarithms that the tables refer to, float64.
        log_total: logarithm of the number of bytes.
    """

    order: int
    ones: np.ndarray
    twos: np.ndarray
    layout: np.ndarray
    slots: np.ndarray
    logs: np.ndarray
    log_total: float

    @classmethod
    def from_runs(cls, runs: Runs, order: int, min_count: int) -> GramTable:
        """Sum the runs to grams of every length, and keep those of one byte or with ``min_count``.

        Args:
            runs: counts of the longest grams.
            order: bytes of these, 1 to 7.
            min_count: at least 1.
        """
        layout = np.zeros((8, 3), np.int64)
        nothing = np.empty(0, np.uint64), np.empty(0, np.int64)
        ones, twos, kept = _walk(runs, order, min_count, layout, *nothing)
        at = 0
        for j in range(3, order + 1):
            # Two thirds full; j - 2 codes of half a word follow each key.
            layout[j] = at, max(16, kept[j] + kept[j] // 2), 1 + (j - 1) // 2
            at += layout[j, 1] * layout[j, 2]
        slots, large = np.zeros(at, np.uint64), np.zeros(kept[8], np.int64)
        if at:
            _walk(runs, order, min_count, layout, slots, large)
            loops.link_suffixes(order, layout, slots, slots.view(np.int32))
        # numpy's logarithm throughout: others differ in the last bit, and ties would fall otherwise.
        logs = np.log(np.concatenate([np.maximum(np.arange(loops.SMALL_COUNTS), 1), large]))
        twos_log = np.where(twos >= min_count, np.log(np.maximum(twos, 1)), -np.inf)
        ones = np.maximum(ones, 1)
        return cls(order, np.log(ones), twos_log, layout, slots, logs, float(np.log(ones.sum())))

    @property
    def nbytes(self) -> int:
        """Memory of the table."""
        return self.slots.nbytes + self.twos.nbytes + self.logs.nbytes


def _walk(
    runs: Runs, order: int, min_count: int, layout: np.ndarray, slots: np.ndarray, large: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ones, twos, kept = np.zeros(256, np.int64), np.zeros(1 << 16, np.int64), np.zeros(9, np.int64)
    carry, open_counts = np.zeros(1, np.uint64), np.zeros(8, np.int64)
    codes = slots.view(np.int32)

    def walk(keys: np.ndarray, counts: np.ndarray, last: bool) -> None:
        loops.walk_keys(
            keys, counts, last, order, min_count, carry, open_counts, ones, twos, kept, layout, slots, codes, large
        )

    for keys, counts in runs.stretches():
        walk(keys, counts, False)
    walk(np.empty(0, np.uint64), np.empty(0, counts.dtype), True)
    return ones, twos, kept
