"""Byte n-grams of a text: its chunks, the counts of all grams from a sorted table of the longest, and a hash table.

A gram of up to seven bytes is a key of 64 bits: the bytes from the top, zeros after them, and how many there are in the
lowest byte. Sorted keys keep all grams with a common beginning together, so that the count of a shorter gram is the sum
over a stretch of longer ones.
"""

from __future__ import annotations

import numba
import numpy as np

NEWLINE = 10
_EIGHT = np.uint64(8)
_LENGTH = np.uint64(0xFF)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ONE = np.uint64(1)
#: Counts below this are their own index in the table of logarithms; each larger count gets a place after these.
SMALL_COUNTS = 1 << 16


@numba.njit(cache=True, nogil=True)
def _is_digit(data, i, digits):
    """Whether the character at ``i`` is a decimal digit, given a flag per code point."""
    lead = np.int64(data[i])
    if lead < 0x80:
        return 48 <= lead <= 57
    if lead < 0xE0:
        return digits[(lead & 0x1F) << 6 | (data[i + 1] & 0x3F)]
    if lead < 0xF0:
        return digits[(lead & 0x0F) << 12 | np.int64(data[i + 1] & 0x3F) << 6 | (data[i + 2] & 0x3F)]
    high = (lead & 0x07) << 18 | np.int64(data[i + 1] & 0x3F) << 12
    return digits[high | np.int64(data[i + 2] & 0x3F) << 6 | (data[i + 3] & 0x3F)]


@numba.njit(cache=True, nogil=True)
def _after_character(data, i, stop):
    i += 1
    while i < stop and 0x80 <= data[i] < 0xC0:
        i += 1
    return i


@numba.njit(cache=True, nogil=True)
def training_chunk_end(data, start, stop, characters, newlines, isolate_digits, digits):
    """End of the training chunk that begins at ``start``.

    A chunk is at most ``characters`` characters of one line and at most ``newlines`` line feeds after them; with
    ``isolate_digits`` a digit is a chunk of its own.

    Args:
        data: UTF-8 bytes, uint8.
        start: first byte of the chunk, the first of a character.
        stop: end of the text.
        characters: at least 1.
        newlines: at least 1.
        isolate_digits: whether digits stand alone.
        digits: whether a code point is a digit, bool; read only with ``isolate_digits``.
    """
    i = start
    if isolate_digits and _is_digit(data, i, digits):
        return _after_character(data, i, stop)
    left = characters
    while i < stop and data[i] != NEWLINE:
        if not 0x80 <= data[i] < 0xC0:
            if left == 0 or (isolate_digits and _is_digit(data, i, digits)):
                return i
            left -= 1
        i += 1
    left = newlines
    while i < stop and data[i] == NEWLINE and left > 0:
        i += 1
        left -= 1
    return i


@numba.njit(cache=True, nogil=True)
def slot_of(key, capacity):
    """The slot at which the search for a key begins; any capacity below 2^32 will do."""
    mixed = (key ^ (key >> _HALF)) * _GOLDEN
    return np.int64(((mixed >> _HALF) * np.uint64(capacity)) >> _HALF)


@numba.njit(cache=True, nogil=True)
def count_table(data, ends, order, characters, newlines, isolate_digits, digits):
    """Count keys as :func:`count_keys`; gives them in any order, and the hash table of keys and counts."""
    capacity = max(1024, min(1 << 21, data.size // 4))
    keys = np.zeros(capacity, np.uint64)
    counts = np.zeros(capacity, np.uint32)
    room = capacity * 5 // 8
    used = 0
    mask = ~((_ONE << np.uint64(64 - 8 * order)) - _ONE)
    start = 0
    for d in range(ends.size):
        while start < ends[d]:
            stop = training_chunk_end(data, start, ends[d], characters, newlines, isolate_digits, digits)
            key = np.uint64(0)
            for i in range(stop - 1, start - 1, -1):
                key = ((key >> _EIGHT) & mask) | (np.uint64(data[i]) << np.uint64(56))
                whole = key | np.uint64(min(order, stop - i))
                slot = slot_of(whole, capacity)
                while keys[slot] != whole:
                    if keys[slot] == 0:
                        keys[slot] = whole
                        used += 1
                        break
                    slot += 1
                    if slot == capacity:
                        slot = 0
                counts[slot] += np.uint32(1)
                if used > room:
                    keys, counts = _rehash(keys, counts, 2 * capacity)
                    capacity *= 2
                    room = capacity * 5 // 8
            start = stop
    found = np.empty(used, np.uint64)
    k = 0
    for slot in range(capacity):
        if keys[slot] != 0:
            found[k] = keys[slot]
            k += 1
    return found, keys, counts


@numba.njit(cache=True, nogil=True)
def _counts_of(wanted, keys, counts):
    tally = np.empty(wanted.size, np.uint32)
    for k in range(wanted.size):
        slot = slot_of(wanted[k], keys.size)
        while keys[slot] != wanted[k]:
            slot += 1
            if slot == keys.size:
                slot = 0
        tally[k] = counts[slot]
    return tally


def count_keys(
    data: np.ndarray,
    ends: np.ndarray,
    order: int,
    characters: int,
    newlines: int,
    isolate_digits: bool,
    digits: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Count the keys of the first ``order`` bytes, or of all that the chunk still has, at each position.

    Args:
        data: the texts one after another, uint8.
        ends: where each ends, int64.
        order: bytes of the longest gram, 1 to 7.
        characters: see :func:`training_chunk_end`, as the next three.
        newlines: most line feeds of a chunk.
        isolate_digits: whether digits are chunks.
        digits: flag per code point.

    Returns:
        Distinct keys in ascending order, uint64; how often each occurs, uint32.
    """
    found, keys, counts = count_table(data, ends, order, characters, newlines, isolate_digits, digits)
    found.sort()  # numpy sorts several times faster than a compiled loop does
    return found, _counts_of(found, keys, counts)


@numba.njit(cache=True, nogil=True)
def _rehash(keys, counts, capacity):
    larger, moved = np.zeros(capacity, np.uint64), np.zeros(capacity, np.uint32)
    for k in range(keys.size):
        if keys[k] != 0:
            slot = slot_of(keys[k], capacity)
            while larger[slot] != 0:
                slot += 1
                if slot == capacity:
                    slot = 0
            larger[slot], moved[slot] = keys[k], counts[k]
    return larger, moved


@numba.njit(cache=True, nogil=True)
def merge_keys(keys, counts, more_keys, more_counts, out_keys, out_counts):
    """Merge two ascending runs of distinct keys, adding the counts of common ones; returns how many were written."""
    i = j = k = 0
    while i < keys.size and j < more_keys.size:
        if keys[i] < more_keys[j]:
            out_keys[k], out_counts[k] = keys[i], counts[i]
            i += 1
        elif keys[i] > more_keys[j]:
            out_keys[k], out_counts[k] = more_keys[j], more_counts[j]
            j += 1
        else:
            out_keys[k], out_counts[k] = keys[i], counts[i] + more_counts[j]
            i += 1
            j += 1
        k += 1
    while i < keys.size:
        out_keys[k], out_counts[k] = keys[i], counts[i]
        i += 1
        k += 1
    while j < more_keys.size:
        out_keys[k], out_counts[k] = more_keys[j], more_counts[j]
        j += 1
        k += 1
    return k


@numba.njit(cache=True, nogil=True)
def _common(a, b):
    """How many leading bytes two keys share, at most 7."""
    differing = a ^ b
    n = 0
    while n < 7 and (differing >> np.uint64(56 - 8 * n)) == 0:
        n += 1
    return n


@numba.njit(cache=True, nogil=True)
def walk_keys(keys, counts, last, order, min_count, carry, open_counts, ones, twos, kept, layout, slots, codes, large):
    """Sum sorted keys to the counts of shorter grams; without ``slots`` only counts what would be kept, else keeps it.

    Args:
        keys: ascending, uint64; may be one of several stretches of a table, which come in order.
        counts: of each key.
        last: whether this is the last stretch.
        order: bytes of the longest gram.
        min_count: grams of two bytes and more with fewer are dropped.
        carry: (1,), uint64, the last key of the stretch before, at first 0.
        open_counts: (8,), int64, counts so far of the grams that begin ``carry``, by length; at first 0.
        ones: (256,), int64, receives the counts of one-byte grams.
        twos: (65536,), int64, receives the counts of two-byte grams.
        kept: (9,), int64, receives how many grams of each length from 3 are kept, and at 8 how many of them are large.
        layout: first slot, capacity and words per slot by length of gram, (8, 3), int64.
        slots: the hash tables, uint64, or empty.
        codes: the same memory, int32.
        large: receives counts of at least ``SMALL_COUNTS``, int64.
    """
    before = carry[0]
    for k in range(keys.size + last):
        common = 0
        if k < keys.size:
            common = _common(before, keys[k])
        for j in range(max(3, common + 1), order + 1):
            count = open_counts[j]
            open_counts[j] = 0
            if count >= min_count:
                kept[j] += 1
                code = count
                if count >= SMALL_COUNTS:
                    code = SMALL_COUNTS + kept[8]
                    if slots.size > 0:
                        large[kept[8]] = count
                    kept[8] += 1
                if slots.size > 0:
                    _insert(before >> np.uint64(64 - 8 * j), code, j, layout, slots, codes)
        if k < keys.size:
            before = keys[k]
            length = min(order, np.int64(before & _LENGTH))
            for j in range(3, length + 1):
                open_counts[j] += counts[k]
            ones[before >> np.uint64(56)] += counts[k]
            if length > 1:
                twos[before >> np.uint64(48)] += counts[k]
    carry[0] = before


@numba.njit(cache=True, nogil=True)
def _insert(gram, code, length, layout, slots, codes):
    """Put a gram into its table. The more frequent of two gets the slot that both want: most searches end at once."""
    first, capacity, words = layout[length]
    word = gram << _EIGHT | _ONE  # never 0
    slot = slot_of(gram, capacity)
    while True:
        at = first + slot * words
        if slots[at] == 0:
            break
        held = codes[2 * at + length - 1]
        if held < code:
            slots[at], word = word, slots[at]
            codes[2 * at + length - 1], code = code, held
        slot += 1
        if slot == capacity:
            slot = 0
    slots[at] = word
    codes[2 * at + length - 1] = code


@numba.njit(cache=True, nogil=True)
def find(gram, first, capacity, words, slots):
    """Where the slot of a gram lies in ``slots``, or -1."""
    wanted = gram << _EIGHT | _ONE
    slot = slot_of(gram, capacity)
    while True:
        held = slots[first + slot * words]
        if held == wanted:
            return first + slot * words
        if held == 0:
            return np.int64(-1)
        slot += 1
        if slot == capacity:
            slot = 0


@numba.njit(cache=True, nogil=True)
def link_suffixes(order, layout, slots, codes):
    """Copy to each gram the codes of the shorter grams that end with it, from three bytes on, before its own.

    One look at the longest known gram that ends at a byte then tells the counts of all. A suffix occurs at least as
    often as the gram, so it is never missing.
    """
    for j in range(4, order + 1):
        first, capacity, words = layout[j]
        mask = (_ONE << np.uint64(8 * (j - 1))) - _ONE
        for slot in range(capacity):
            at = first + slot * words
            if slots[at] != 0:
                shorter = find(
                    (slots[at] >> _EIGHT) & mask, layout[j - 1, 0], layout[j - 1, 1], layout[j - 1, 2], slots
                )
                for k in range(2, j - 1):
                    codes[2 * at + k] = codes[2 * shorter + k]
