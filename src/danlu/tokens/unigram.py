"""A unigram model over bytes, ready to segment: the one engine behind encoding, sampling and the trainer's pruning."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from danlu.kernels import viterbi as loops
from danlu.kernels.compiling import announce
from danlu.kernels.trie import build

#: Below this many bytes a batch is not worth a thread.
_WORTH = 1 << 17


class Unigram:
    """Pieces with scores, held in a trie.

    Args:
        pieces: distinct byte strings, among them all 256 single bytes.
        scores: log probability of each, (pieces,), float64.
    """

    def __init__(self, pieces: Sequence[bytes], scores: np.ndarray):
        announce(build)
        self.scores = np.ascontiguousarray(scores, dtype=np.float64)
        self.lengths = np.fromiter(map(len, pieces), np.int32, len(pieces))
        self.longest = int(self.lengths.max())
        order = sorted(range(len(pieces)), key=pieces.__getitem__)
        data = np.frombuffer(b"".join(pieces[i] for i in order), np.uint8)
        permutation = np.array(order, np.int32)
        starts = starts_of(self.lengths[permutation])
        self.links, self.unit_scores, place, length = build(data, starts, self.scores[permutation])
        # The piece that ends at each unit and its bytes, side by side: following a path back costs one look a piece.
        self.ended = permutation[place].astype(np.uint64) | length.astype(np.uint64) << np.uint64(32)

    def segment(self, data: np.ndarray, score: float = 0.0) -> np.ndarray:
        """The best segmentation of some bytes.

        Args:
            data: (length,), uint8. A line with the line feeds after it is segmented on its own.
            score: of the path up to the first byte, for the end of a line whose beginning has been segmented before.

        Returns:
            Indices of pieces, int32. Of equal segmentations the one whose last piece is longer wins, at every prefix.
        """
        announce(loops.viterbi)
        out = np.empty(data.size + 1, np.int32)
        ring, second = loops.empty_ring(self.longest), np.empty(loops.AHEAD, np.uint32)
        count = loops.viterbi(
            data, 0, data.size, score,
            self.links, self.unit_scores, self.ended, ring, second, out,
        )  # fmt: skip
        return out[:count].copy()

    def segment_batch(
        self, data: np.ndarray, offsets: np.ndarray, threads: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best segmentations of many documents.

        Args:
            data: the documents one after another, uint8.
            offsets: where each begins, and the end, (documents + 1,), int64.
            threads: how many work on it; None is all cores.

        Returns:
            An array in which document i has its pieces at ``offsets[i] + i``, and how many each has.
        """
        announce(loops.viterbi_batch)
        out = np.empty(data.size + offsets.size, np.int32)
        counts = np.zeros(offsets.size - 1, np.int64)

        def work(first: int, last: int) -> None:
            loops.viterbi_batch(
                data, offsets, first, last,
                self.links, self.unit_scores, self.ended, self.longest, out, counts,
            )  # fmt: skip

        in_threads(work, offsets, threads)
        return out, counts

    def segment_open(self, data: np.ndarray, score: float) -> tuple[int, np.ndarray, float]:
        """The part of a chunk without an end that no further byte can change.

        Args:
            data: the bytes so far, with line feeds at their end only, uint8.
            score: score of the path up to the first of them.

        Returns:
            How many bytes are settled, their pieces, and the score up to there.
        """
        out = np.empty(data.size + 1, np.int32)
        size, count, reached = loops.viterbi_open(
            data, score, self.scores,
            self.links, self.unit_scores, self.ended, self.longest, out,
        )  # fmt: skip
        return size, out[:count].copy(), reached


def in_threads(work: Callable[[int, int], None], offsets: np.ndarray, threads: int | None = None) -> None:
    """Call ``work(first, last)`` on ranges of documents that cover all, each with about equally many bytes."""
    documents, size = offsets.size - 1, int(offsets[-1] - offsets[0])
    workers = min(threads or cores(), max(1, size // _WORTH))
    if workers <= 1:
        work(0, documents)
        return
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, *even_ranges(offsets, workers)))


def even_ranges(offsets: np.ndarray, workers: int) -> tuple[list[int], list[int]]:
    """First and one-past-last of ranges of texts with about equally many bytes, four for each worker."""
    parts = 4 * workers  # texts differ in what they cost; smaller parts even it out
    cuts = np.searchsorted(offsets, offsets[0] + (offsets[-1] - offsets[0]) * np.arange(parts + 1) // parts)
    cuts[0], cuts[-1] = 0, offsets.size - 1
    return cuts[:-1].tolist(), cuts[1:].tolist()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def starts_of(lengths: np.ndarray) -> np.ndarray:
    """Where parts of these lengths begin when put one after another, and the end: (parts + 1,), int64."""
    starts = np.zeros(lengths.size + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts
