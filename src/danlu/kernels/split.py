"""Counting the pieces that other pieces fall into under a unigram model.

Most pieces share only their first bytes with others. The trie holds of each no more than tells it from its neighbours
in sorted order; what remains, its tail, is compared with the text directly. That trie is several times smaller.
"""

from __future__ import annotations

import numba
import numpy as np

from danlu.kernels.trie import LOW, child
from danlu.kernels.trie import first as first_unit

#: A base of TAIL | p says that the rest of piece p must follow.
TAIL = np.uint64(1 << 31)


@numba.njit(cache=True, nogil=True)
def distinct_lengths(data, offsets):
    """How many of its first bytes tell each piece from the others, or all of them where it begins another piece.

    Args:
        data: distinct pieces one after another, sorted as bytes, uint8.
        offsets: where each begins, and the end, int64.
    """
    pieces = offsets.size - 1
    lengths = np.empty(pieces, np.int64)
    before = np.int64(0)
    for i in range(pieces):
        shared = np.int64(0)
        if i + 1 < pieces:
            most = min(offsets[i + 1] - offsets[i], offsets[i + 2] - offsets[i + 1])
            while shared < most and data[offsets[i] + shared] == data[offsets[i + 1] + shared]:
                shared += 1
        lengths[i] = min(max(before, shared) + 1, offsets[i + 1] - offsets[i])
        before = shared
    return lengths


@numba.njit(cache=True, nogil=True)
def count_parts(data, starts, lengths, weights, first, last, links, scores, piece, pieces, offsets, counts):
    """Split the texts ``first..last - 1`` as probably as possible, and add the weight of each to every part it has.

    Of equal segmentations the one whose last piece is longer wins, at every prefix.

    Args:
        data: bytes that hold the texts, uint8.
        starts: where each begins, int64.
        lengths: bytes of each, int64.
        weights: int64.
        first: first text.
        last: one past the last.
        links: of the units of the trie of the beginnings of pieces; bases with ``TAIL`` have no children.
        scores: score of the piece whose beginning ends at each unit.
        piece: that piece.
        pieces: the whole pieces one after another, uint8.
        offsets: where each begins, and the end, int64.
        counts: (pieces,), int64, is added to.
    """
    room = np.int64(1)
    for i in range(first, last):
        room = max(room, lengths[i] + 1)
    best = np.full(room, -np.inf)
    route = np.empty(room, np.int32)
    for i in range(first, last):
        start, size = starts[i], lengths[i]
        stop = start + size
        best[0] = 0.0
        for s in range(start, stop):
            here = best[s - start]
            best[s - start] = -np.inf
            # Earlier beginnings come first, so a tie leaves the longer last piece in place.
            unit, e = np.uint64(first_unit(data, s)), s + 1
            while True:
                base = links[unit] & LOW
                if base >= TAIL:
                    p = np.int64(base ^ TAIL)
                    at, end = offsets[p] + (e - s), offsets[p + 1]
                    if end - at > stop - e:
                        break
                    while at < end and pieces[at] == data[e]:
                        at += 1
                        e += 1
                    if at < end:
                        break
                score = here + scores[unit]
                if score > best[e - start]:
                    best[e - start], route[e - start] = score, unit
                if base >= TAIL or e == stop:
                    break
                unit = child(links, unit, data[e])
                if unit == 0:
                    break
                e += 1
        best[size] = -np.inf
        while size > 0:
            p = piece[route[size]]
            counts[p] += weights[i]
            size -= offsets[p + 1] - offsets[p]
