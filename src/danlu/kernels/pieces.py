"""Counting pieces of text in a hash table that compiled loops can grow.

The table is a tuple of arrays: ``index`` has the upper 32 bits of a hash over the number of an entry plus one,
``entries`` has offset, length and count of each, ``arena`` their bytes, and ``used`` says how many entries and bytes
there are.
"""

from __future__ import annotations

import numba
import numpy as np

_HALF = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)
_PRIME = np.uint64(0x100000001B3)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
#: How many pieces are counted together.
BATCH = 256


@numba.njit(cache=True, nogil=True)
def empty_counter(entries):
    """A counter with room for this many pieces before it grows."""
    size = 1024
    while size < 2 * entries:
        size *= 2
    return (
        np.zeros(size, np.uint64),
        np.empty((size // 2, 3), np.int64),
        np.empty(4 * size, np.uint8),
        np.zeros(2, np.int64),
    )


@numba.njit(cache=True, nogil=True)
def _hash(data, start, stop):
    h = np.uint64(stop - start)
    for i in range(start, stop):
        h = (h ^ np.uint64(data[i])) * _PRIME
    return (h ^ (h >> _HALF)) * _GOLDEN


@numba.njit(cache=True, nogil=True)
def count_batch(data, starts, stops, weights, hashes, guesses, index, entries, arena, used):
    """Add some pieces, for which there must be room."""
    # Each loop reads what the next one needs, for many pieces at once, so that the waits for memory overlap.
    for k in range(starts.size):
        h = hashes[k] = _hash(data, starts[k], stops[k])
        held = index[np.int64(h) & (index.size - 1)]
        guesses[k] = np.int64(held & _LOW) - 1 if held >> _HALF == h >> _HALF else -1
    for k in range(starts.size):
        e = guesses[k]
        if e >= 0 and entries[e, 1] != stops[k] - starts[k]:
            guesses[k] = -1
    for k in range(starts.size):
        e = guesses[k]
        if e < 0 or not _equal(data, starts[k], stops[k], arena, entries[e, 0]):
            e = _entry(data, starts[k], stops[k], hashes[k], index, entries, arena, used)
        entries[e, 2] += weights[k]


@numba.njit(cache=True, nogil=True)
def _equal(data, start, stop, arena, at):
    for i in range(start, stop):
        if arena[at] != data[i]:
            return False
        at += 1
    return True


@numba.njit(cache=True, nogil=True)
def _entry(data, start, stop, h, index, entries, arena, used):
    """The entry of the piece ``data[start:stop]``, a new one with count 0 where there was none."""
    tag = h >> _HALF
    mask = index.size - 1
    slot = np.int64(h) & mask
    while index[slot] != 0:
        if index[slot] >> _HALF == tag:
            e = np.int64(index[slot] & _LOW) - 1
            if entries[e, 1] == stop - start and _equal(data, start, stop, arena, entries[e, 0]):
                return e
        slot = (slot + 1) & mask
    e, at = used[0], used[1]
    index[slot] = tag << _HALF | np.uint64(e + 1)
    entries[e, 0], entries[e, 1], entries[e, 2] = at, stop - start, 0
    for i in range(start, stop):
        arena[at] = data[i]
        at += 1
    used[0], used[1] = e + 1, at
    return e


@numba.njit(cache=True, nogil=True)
def with_room(index, entries, arena, used, pieces, size):
    """The same counter with room for so many more pieces of so many bytes in all."""
    if used[1] + size > arena.size:
        larger = np.empty(max(2 * arena.size, used[1] + size), np.uint8)
        larger[: used[1]] = arena[: used[1]]
        arena = larger
    if used[0] + pieces > entries.shape[0]:
        room = max(2 * entries.shape[0], used[0] + pieces)
        moved = np.empty((room, 3), np.int64)
        moved[: used[0]] = entries[: used[0]]
        entries = moved
        slots = index.size
        while slots < 2 * room:
            slots *= 2
        index = np.zeros(slots, np.uint64)
        for e in range(used[0]):
            h = _hash(arena, entries[e, 0], entries[e, 0] + entries[e, 1])
            slot = np.int64(h) & (slots - 1)
            while index[slot] != 0:
                slot = (slot + 1) & (slots - 1)
            index[slot] = (h >> _HALF) << _HALF | np.uint64(e + 1)
    return index, entries, arena, used


@numba.njit(cache=True, nogil=True)
def add_pieces(counter, data, offsets, weights):
    """Add pieces with weights to a counter; returns the counter, which may have moved.

    Args:
        counter: see the module.
        data: the pieces one after another, uint8.
        offsets: where each begins, and the end, int64.
        weights: of each, int64.
    """
    index, entries, arena, used = counter
    hashes, guesses = np.empty(BATCH, np.uint64), np.empty(BATCH, np.int64)
    for first in range(0, weights.size, BATCH):
        last = min(first + BATCH, weights.size)
        index, entries, arena, used = with_room(
            index, entries, arena, used, last - first, offsets[last] - offsets[first]
        )
        count_batch(
            data, offsets[first:last], offsets[first + 1 : last + 1], weights[first:last], hashes, guesses,
            index, entries, arena, used,
        )  # fmt: skip
    return index, entries, arena, used
