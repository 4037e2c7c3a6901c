"""How a vocabulary is used on training text: how often each piece, and how often each two in a row."""

from __future__ import annotations

import numba
import numpy as np

from danlu.kernels.ngrams import slot_of, training_chunk_end
from danlu.kernels.trie import first as first_unit
from danlu.kernels.trie import follow
from danlu.kernels.viterbi import AHEAD, collect, empty_ring, push


@numba.njit(cache=True, nogil=True)
def count_usage(
    data, ends, characters, newlines, isolate_digits, digits, links, scores, ended, longest, counts, with_pairs
):  # fmt: skip
    """Segment texts chunk by chunk and count.

    Args:
        data: the texts one after another, uint8.
        ends: where each ends, int64.
        characters: see :func:`danlu.kernels.ngrams.training_chunk_end`, as the next three.
        newlines: most line feeds of a chunk.
        isolate_digits: whether digits are chunks.
        digits: flag per code point.
        links: of the trie's units, as the next three from :func:`danlu.kernels.trie.build`.
        scores: score of the piece that ends at each unit.
        ended: that piece in the lower half, its bytes in the upper, uint64.
        longest: bytes of the longest piece.
        counts: (pieces,), int64, is added to.
        with_pairs: whether neighbours within a chunk are counted too.

    Returns:
        Pairs as first << 32 | second in ascending order, uint64, and how often each occurs, int64.
    """
    ring, second = empty_ring(longest), np.empty(AHEAD, np.uint32)
    mask = ring.size - 1
    route = np.empty(4 * characters + newlines + 1, np.int32)
    keys, tallies = np.zeros(1 << 16, np.uint64), np.zeros(1 << 16, np.int64)
    used = 0
    start = 0
    for d in range(ends.size):
        while start < ends[d]:
            stop = training_chunk_end(data, start, ends[d], characters, newlines, isolate_digits, digits)
            ring[start & mask] = 0.0
            push(data, start, stop, links, scores, ring, second, route, start)
            ring[stop & mask] = -np.inf
            size = collect(0, stop - start, 0, ended, route)
            while with_pairs and 2 * (used + size) > keys.size:
                keys, tallies = _larger(keys, tallies)
            counts[route[0]] += 1
            for k in range(1, size):
                counts[route[k]] += 1
                if with_pairs:
                    # One more than the pair, so that no key is 0.
                    key = (np.uint64(route[k - 1]) << np.uint64(32) | np.uint64(route[k])) + np.uint64(1)
                    slot = _slot(keys, key)
                    used += keys[slot] == 0
                    keys[slot] = key
                    tallies[slot] += 1
            start = stop
    found = keys[keys != 0]
    found.sort()
    tally = np.empty(found.size, np.int64)
    for k in range(found.size):
        tally[k] = tallies[_slot(keys, found[k])]
    return found - np.uint64(1), tally


@numba.njit(cache=True, nogil=True)
def _slot(keys, key):
    slot = slot_of(key, keys.size)
    while keys[slot] != key and keys[slot] != 0:
        slot += 1
        if slot == keys.size:
            slot = 0
    return slot


@numba.njit(cache=True, nogil=True)
def _larger(keys, tallies):
    more_keys, more_tallies = np.zeros(2 * keys.size, np.uint64), np.zeros(2 * keys.size, np.int64)
    for k in range(keys.size):
        if keys[k] != 0:
            slot = _slot(more_keys, keys[k])
            more_keys[slot], more_tallies[slot] = keys[k], tallies[k]
    return more_keys, more_tallies


@numba.njit(cache=True, nogil=True)
def parts_without(data, offsets, links, scores, out):
    """How many pieces each piece would become, were it not a piece itself.

    Args:
        data: the pieces one after another, uint8.
        offsets: where each begins, and the end, (pieces + 1,), int64.
        links: of the units of their trie.
        scores: score of the piece that ends at each unit.
        out: (pieces,), int64, receives the parts of the best segmentation into at least two; 1 for single bytes.
    """
    for i in range(out.size):
        start, stop = offsets[i], offsets[i + 1]
        if stop - start == 1:
            out[i] = 1
            continue
        best = np.full(stop - start + 1, -np.inf)
        parts = np.zeros(stop - start + 1, np.int64)
        best[0] = 0.0
        for s in range(start, stop):
            unit, e = first_unit(data, s), s
            while unit >= 0:
                e += 1
                score = best[s - start] + scores[unit]
                if score > best[e - start] and e - s < stop - start:
                    best[e - start], parts[e - start] = score, parts[s - start] + 1
                unit = follow(links, unit, data, e, stop)
        out[i] = parts[stop - start]
