"""A double-array trie over bytes, built and read by compiled loops.

The links of a unit are one 64-bit number, so that a step of a walk reads one: in the low half its base, which says
where the children are, in the high half its check, which says whose child it is; a unit that is not in use has a check
that no unit has as its number. The child of a unit by a byte is ``base ^ byte``, which keeps all children of a unit
within one block of 256 units. The scores of the pieces that end at the units are an array of their own.
"""

from __future__ import annotations

import numba
import numpy as np

#: Every byte is a piece, so the children of the root fill the second block and need no check.
ROOT = 256
_BLOCK = 256
#: What splits links into base and check.
HALF, LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
#: A block that refused this many nodes is not asked again.
_PATIENCE = 24


@numba.njit(cache=True, nogil=True)
def build(
    data: np.ndarray, offsets: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Build the trie of sorted distinct pieces, among them all 256 bytes.

    Args:
        data: the pieces one after another, sorted as bytes, uint8.
        offsets: where each begins in ``data``, and the end: (pieces + 1,), int64.
        scores: one per piece, (pieces,), float64.

    Returns:
        The links of each unit, (units,), uint64; the score of the piece that ends there, or -inf, (units,), float64;
        that piece, or -1, and its length, or 0, (units,), int32 each.
    """
    pieces = offsets.size - 1
    capacity = max(4 * _BLOCK, 1 << int(np.ceil(np.log2(2.0 * data.size + 2 * _BLOCK))))
    base = np.zeros(capacity, np.int32)
    check = np.full(capacity, -1, np.int32)
    score = np.full(capacity, -np.inf)
    piece = np.full(capacity, -1, np.int32)
    length = np.zeros(capacity, np.int32)
    free = np.full(capacity // _BLOCK, _BLOCK, np.int32)  # units left in each block
    refused = np.zeros(capacity // _BLOCK, np.int32)
    free[0] = 0
    first_open = 1
    last = 1  # the highest block in use
    # A queue of nodes, each the range of pieces that share its prefix.
    node_of = np.empty(data.size + 1, np.int32)
    low_of = np.empty(data.size + 1, np.int32)
    high_of = np.empty(data.size + 1, np.int32)
    depth_of = np.empty(data.size + 1, np.int32)
    node_of[0], low_of[0], high_of[0], depth_of[0] = 0, 0, pieces, 0
    head, tail = 0, 1
    labels = np.empty(256, np.int32)
    starts = np.empty(257, np.int32)
    while head < tail:
        node, low, high, depth = node_of[head], low_of[head], high_of[head], depth_of[head]
        head += 1
        if offsets[low + 1] - offsets[low] == depth:
            piece[node], length[node], score[node] = low, depth, scores[low]
            low += 1
        if low == high:
            continue
        count = 0
        previous = -1
        for i in range(low, high):
            label = int(data[offsets[i] + depth])
            if label != previous:
                labels[count], starts[count] = label, i
                count += 1
                previous = label
        starts[count] = high
        place = -1
        block = first_open
        while place < 0:
            if block > last:
                last = block
                if (last + 1) * _BLOCK > capacity:
                    capacity *= 2
                    base = _grown(base, capacity, 0)
                    check = _grown(check, capacity, -1)
                    piece = _grown(piece, capacity, -1)
                    length = _grown(length, capacity, 0)
                    free = _grown(free, capacity // _BLOCK, _BLOCK)
                    refused = _grown(refused, capacity // _BLOCK, 0)
                    larger = np.full(capacity, -np.inf)
                    larger[: score.size] = score
                    score = larger
            if free[block] >= count and refused[block] < _PATIENCE:
                place = _fit(check, block, labels, count)
                refused[block] += place < 0
            if place < 0:
                block += 1
        while first_open < last and (free[first_open] == 0 or refused[first_open] >= _PATIENCE):
            first_open += 1
        base[node] = place
        free[block] -= count
        for k in range(count):
            child = place ^ labels[k]
            check[child] = node
            node_of[tail], low_of[tail], high_of[tail], depth_of[tail] = child, starts[k], starts[k + 1], depth + 1
            tail += 1
    size = (last + 1) * _BLOCK
    links = np.empty(size, np.uint64)
    for i in range(size):
        links[i] = np.uint64(check[i]) << HALF | np.uint64(base[i])  # a check of -1 becomes 32 ones
    return links, score[:size].copy(), piece[:size].copy(), length[:size].copy()


@numba.njit(cache=True, nogil=True)
def _grown(array: np.ndarray, size: int, fill: int) -> np.ndarray:
    larger = np.full(size, fill, array.dtype)
    larger[: array.size] = array
    return larger


@numba.njit(cache=True, nogil=True)
def _fit(check: np.ndarray, block: int, labels: np.ndarray, count: int) -> int:
    """A base in this block under which all children fall on free units, or -1."""
    begin = block * _BLOCK
    for slot in range(begin, begin + _BLOCK):
        if check[slot] != -1:
            continue
        place = slot ^ labels[0]
        fits = True
        for k in range(1, count):
            if check[place ^ labels[k]] != -1:
                fits = False
                break
        if fits:
            return place
    return -1


@numba.njit(cache=True, nogil=True)
def child(links: np.ndarray, unit: np.uint64, byte: int) -> np.uint64:
    """The unit after ``unit`` by a byte, or 0 where no piece goes on like this."""
    found = (links[unit] & LOW) ^ np.uint64(byte)
    return found if links[found] >> HALF == unit else np.uint64(0)


@numba.njit(cache=True, nogil=True)
def first(data: np.ndarray, at: int) -> int:
    """The unit of the one-byte piece ``data[at]``."""
    return ROOT + int(data[at])


@numba.njit(cache=True, nogil=True)
def follow(links: np.ndarray, unit: int, data: np.ndarray, at: int, stop: int) -> int:
    """The unit after ``unit`` by byte ``data[at]``, or -1 where no piece goes on like this or ``at`` is ``stop``."""
    if at == stop:
        return -1
    found = child(links, np.uint64(unit), data[np.uint64(at)])
    return int(np.int64(found)) if found > 0 else -1
