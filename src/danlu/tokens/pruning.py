"""From all pieces of a corpus to a vocabulary: unwanted pieces are split into others, which take their counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from danlu.kernels.split import TAIL, count_parts, distinct_lengths
from danlu.kernels.trie import LOW, build
from danlu.tokens.unigram import even_ranges, starts_of


@dataclass(frozen=True)
class Pieces:
    """Byte strings with counts.

    Args:
        data: bytes that hold all of them, uint8.
        starts: where each begins, int64.
        lengths: bytes of each, int64.
        counts: int64.
    """

    data: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        return self.counts.size

    def __getitem__(self, chosen: np.ndarray) -> Pieces:
        """Those at some indices, or where a mask is true, over the same bytes."""
        return Pieces(self.data, self.starts[chosen], self.lengths[chosen], self.counts[chosen])

    def with_counts(self, counts: np.ndarray) -> Pieces:
        """The same byte strings, counted otherwise."""
        return Pieces(self.data, self.starts, self.lengths, counts)

    def compact(self) -> Pieces:
        """The same in the same order, over bytes of their own without gaps."""
        ends = np.cumsum(self.lengths)
        starts = ends - self.lengths
        index = np.arange(ends[-1]) + np.repeat(self.starts - starts, self.lengths)
        return Pieces(self.data[index], starts, self.lengths, self.counts)

    def strings(self) -> list[bytes]:
        """The byte strings themselves."""
        data = self.data.tobytes()
        stops = (self.starts + self.lengths).tolist()
        return [data[start:stop] for start, stop in zip(self.starts.tolist(), stops, strict=True)]

    @classmethod
    def of(cls, strings: Sequence[bytes], counts: np.ndarray) -> Pieces:
        """From byte strings."""
        lengths = np.fromiter(map(len, strings), np.int64, len(strings))
        starts = np.cumsum(lengths) - lengths
        return cls(np.frombuffer(bytearray().join(strings), np.uint8), starts, lengths, np.asarray(counts, np.int64))


def prune(
    pieces: Pieces,
    sizes: Sequence[int],
    *,
    min_count: int,
    max_piece_length: int,
    workers: int,
    progress: Callable[[int], None] = lambda size: None,
) -> list[tuple[Pieces, bool]]:
    """Vocabularies of several sizes, each within the one before.

    Missing single bytes are added with count 1. Pieces that are too long or too rare are split into the rest by the
    most probable segmentation under their counts. Then every piece that its own vocabulary would rather write as
    several others goes, again and again until none does. If too many are left, the rarest go, and the same once more.

    Args:
        pieces: distinct, non-empty, counts at least 1.
        sizes: pieces at most, in descending order, each at least 256.
        min_count: pieces of two bytes and more with fewer are split.
        max_piece_length: longer ones are split, at least 1.
        workers: threads.
        progress: called with the number of pieces after every round.

    Returns:
        For each size the pieces, sorted as bytes, and whether the limit took part in choosing them.

    Source: Scientific Spaces archive 9752.
    """
    kept = (pieces.lengths == 1) | ((pieces.lengths <= max_piece_length) & (pieces.counts >= min_count))
    vocabulary, dropped = _sorted_with_bytes(pieces[kept]), pieces[~kept]
    limited = False
    results = []
    with ThreadPoolExecutor(workers) as pool:
        vocabulary = _Model(vocabulary, pool, workers).settled(dropped, progress)
        for size in sizes:
            if len(vocabulary) > size:
                limited = True
                # The last key is the place in byte order.
                order = np.lexsort(
                    (np.arange(len(vocabulary)), -vocabulary.lengths, -vocabulary.counts, vocabulary.lengths > 1)
                )
                dropped = vocabulary[order[size:]]
                vocabulary = _Model(vocabulary[np.sort(order[:size])].compact(), pool, workers).settled(
                    dropped, progress
                )
            results.append((vocabulary, limited))
    return results


def _sorted_with_bytes(pieces: Pieces) -> Pieces:
    counts = dict(zip(pieces.strings(), pieces.counts.tolist(), strict=True))
    for byte in range(256):
        counts.setdefault(bytes([byte]), 1)
    strings = sorted(counts)
    return Pieces.of(strings, np.array([counts[string] for string in strings], np.int64))


class _Model:
    """A unigram model whose counts change and whose pieces only become fewer, over one trie."""

    def __init__(self, vocabulary: Pieces, pool: ThreadPoolExecutor, workers: int):
        self._vocabulary, self._pool, self._workers = vocabulary, pool, workers
        # The vocabulary lies sorted and without gaps in its data.
        self._offsets = np.append(vocabulary.starts, vocabulary.data.size)
        lengths = distinct_lengths(vocabulary.data, self._offsets)
        beginnings = Pieces(vocabulary.data, vocabulary.starts, lengths, vocabulary.counts).compact()
        starts = np.append(beginnings.starts, beginnings.data.size)
        self._links, self._scores, self._piece, _ = build(beginnings.data, starts, np.zeros(len(vocabulary)))
        (places,) = np.nonzero(self._piece >= 0)
        self._unit = np.empty(len(vocabulary), np.int64)
        self._unit[self._piece[places]] = places
        (tailed,) = np.nonzero(lengths < vocabulary.lengths)
        ends = self._unit[tailed]
        self._links[ends] = self._links[ends] & ~LOW | TAIL | tailed.astype(np.uint64)

    def settled(self, dropped: Pieces, progress: Callable[[int], None]) -> Pieces:
        """The pieces that stay when they take the counts of dropped ones and no piece is written by others any more."""
        counts = self._vocabulary.counts + self._parts(self._vocabulary.counts, dropped)
        left = int(np.count_nonzero(counts))
        while True:
            progress(left)
            counts = self._parts(counts, self._vocabulary.with_counts(counts)[counts > 0])
            before, left = left, int(np.count_nonzero(counts))
            if left == before:
                return self._vocabulary.with_counts(counts)[counts > 0]

    def _parts(self, counts: np.ndarray, texts: Pieces) -> np.ndarray:
        """How often each piece is used to write the texts, each as often as it counts; one with count 0 never is."""
        scores = np.log(np.maximum(counts, 1)) - np.log(counts.sum())
        self._scores[self._unit] = np.where(counts > 0, scores, -np.inf)

        def work(first: int, last: int) -> np.ndarray:
            parts = np.zeros(counts.size, np.int64)
            count_parts(
                texts.data, texts.starts, texts.lengths, texts.counts, first, last,
                self._links, self._scores, self._piece, self._vocabulary.data, self._offsets, parts,
            )  # fmt: skip
            return parts

        if not len(texts):
            return np.zeros(counts.size, np.int64)
        offsets = starts_of(texts.lengths)
        if self._workers == 1 or offsets[-1] < 1 << 16:
            return work(0, len(texts))
        total = np.zeros(counts.size, np.int64)
        for part in self._pool.map(work, *even_ranges(offsets, self._workers)):
            total += part
        return total
