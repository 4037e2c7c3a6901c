"""A vocabulary that writes its corpus with fewer tokens: pieces that often meet are joined, those that save least go.

The published training chooses pieces by how often the n-gram model cuts them out, and never looks at how the finished
vocabulary writes the text. Refinement does. Each round segments the corpus, adds the most frequent neighbours as
pieces, then drops, a tenth at a time, the pieces whose loss would cost the fewest tokens: how often a piece is used,
times how many more tokens its bytes would take without it. Counts are taken anew after every step. This goes beyond
archive 9752.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from danlu.kernels import usage
from danlu.tokens.corpus import Shard
from danlu.tokens.mapping import Arrays, Task, rules
from danlu.tokens.unicode import is_utf8
from danlu.tokens.unigram import Unigram, starts_of
from danlu.tokens.vocabulary import Vocabulary

#: Candidates of a round, and what stays of a vocabulary in one step of dropping.
_JOINED, _STAY = 0.5, 0.9

#: Neighbours as first << 32 | second in ascending order, uint64, and how often each meets, int64.
Pairs = tuple[np.ndarray, np.ndarray]
#: Runs a task on every shard.
Run = Callable[[Task], Iterator[Arrays]]


@dataclass(frozen=True)
class CountUsage:
    """Segments a shard: ``counts`` of pieces; with ``pairs`` also ``keys`` of neighbours and their ``tallies``."""

    model: Unigram
    isolate_digits: bool
    pairs: bool

    def __call__(self, shard: Shard) -> Arrays:
        """Segment and count."""
        model = self.model
        counts = np.zeros(model.lengths.size, np.int64)
        keys, tallies = usage.count_usage(
            shard.data, shard.ends, *rules(self.isolate_digits),
            model.links, model.unit_scores, model.ended, model.longest, counts, self.pairs,
        )  # fmt: skip
        return {"counts": counts, "keys": keys, "tallies": tallies}


def refine(
    vocabulary: Vocabulary,
    size: int,
    rounds: int,
    run: Run,
    *,
    isolate_digits: bool,
    ensure_unicode: bool,
    max_piece_length: int,
    min_count: int,
) -> Vocabulary:
    """Rounds of joining and dropping.

    Args:
        vocabulary: where to begin.
        size: pieces of the result, at most.
        rounds: at least 1; four come close to what more of them reach.
        run: runs a task on all shards of the corpus.
        isolate_digits: whether no piece may hold two digits.
        ensure_unicode: whether pieces of several bytes must be whole characters.
        max_piece_length: bytes of the longest piece.
        min_count: how often neighbours must meet.

    Returns:
        Pieces with the counts of their use, each at least 1.
    """
    current = vocabulary
    for _ in range(rounds):
        model, counts, pairs = _usage(current, run, isolate_digits, pairs=True)
        known = dict(zip(current.pieces, np.maximum(counts, 1).tolist(), strict=True))
        for joined, count in _frequent(current.pieces, pairs, min_count):
            if len(known) >= len(current) + int(_JOINED * size):
                break
            if len(joined) <= max_piece_length and joined not in known and (not ensure_unicode or is_utf8(joined)):
                known[joined] = count
        current = Vocabulary.sorted(known.items())
        while True:
            model, counts, _ = _usage(current, run, isolate_digits, pairs=False)
            current = Vocabulary(current.pieces, np.maximum(counts, 1))
            if len(current) <= size:
                break
            current = _without_the_least(current, model, counts, max(size, int(_STAY * len(current))))
    return current


def _usage(vocabulary: Vocabulary, run: Run, isolate_digits: bool, pairs: bool) -> tuple[Unigram, np.ndarray, Pairs]:
    model = Unigram(vocabulary.pieces, vocabulary.scores)
    counts = np.zeros(len(vocabulary), np.int64)
    found: list[Pairs] = [(np.empty(0, np.uint64), np.empty(0, np.int64))]
    for arrays in run(CountUsage(model, isolate_digits, pairs)):
        counts += arrays["counts"]
        found.append((arrays["keys"], arrays["tallies"]))
        if len(found) > 16:  # common pairs are in every shard: held once, they take little room
            found = [_added(found)]
    return model, counts, _added(found)


def _added(parts: list[Pairs]) -> Pairs:
    keys, places = np.unique(np.concatenate([keys for keys, _ in parts]), return_inverse=True)
    tallies = np.zeros(keys.size, np.int64)
    np.add.at(tallies, places, np.concatenate([tallies for _, tallies in parts]))
    return keys, tallies


def _frequent(pieces: Sequence[bytes], pairs: Pairs, min_count: int) -> Iterator[tuple[bytes, int]]:
    """Two pieces as one, and how often they meet, the most frequent first."""
    keys, tallies = pairs
    order = np.lexsort((keys, -tallies))
    order = order[tallies[order] >= min_count]
    for key, tally in zip(keys[order].tolist(), tallies[order].tolist(), strict=True):
        yield pieces[key >> 32] + pieces[key & 0xFFFFFFFF], tally


def _without_the_least(vocabulary: Vocabulary, model: Unigram, counts: np.ndarray, size: int) -> Vocabulary:
    """The ``size`` pieces without which the text would grow most, single bytes first."""
    parts = np.empty(len(vocabulary), np.int64)
    data = np.frombuffer(b"".join(vocabulary.pieces), np.uint8)
    usage.parts_without(data, starts_of(model.lengths), model.links, model.unit_scores, parts)
    cost = np.where(model.lengths == 1, np.iinfo(np.int64).max, counts * (parts - 1))
    stay = np.sort(np.argsort(-cost, kind="stable")[:size])
    return Vocabulary(tuple(vocabulary.pieces[i] for i in stay.tolist()), vocabulary.counts[stay])
