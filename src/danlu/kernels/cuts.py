"""The best cut of training text into pieces under byte n-gram probabilities."""

from __future__ import annotations

import numba
import numpy as np

from danlu.kernels.ngrams import find, slot_of, training_chunk_end
from danlu.kernels.pieces import BATCH, count_batch, empty_counter, with_room

_EIGHT, _ONE, _ALL = np.uint64(8), np.uint64(1), np.uint64(0xFFFFFFFFFFFFFFFF)
#: How many grams are looked up before they are needed.
AHEAD = 64


@numba.njit(cache=True, nogil=True)
def cut_chunk(
    data, start, stop, order, ensure_unicode, ones, twos, layout, slots, codes, logs, log_total, routes, homes, held
):  # fmt: skip
    """Forward pass of the cut: the best score of every state at every byte of a chunk, and how it was reached.

    State j < n - 1 is "byte number j of its piece", state n - 1 "number n - 1 or later". A step to state j at byte i
    scores log C(the j + 1 bytes that end at i) - log C(the same without the last). Scores are compared after the step
    is added, and the smallest state wins a tie.

    Args:
        data: bytes, uint8.
        start: first byte of the chunk.
        stop: one past its last byte.
        order: n, the number of states, 2 to 7.
        ensure_unicode: whether a piece must not begin with a UTF-8 continuation byte.
        ones: log counts of the one-byte grams, (256,).
        twos: of the two-byte grams, (65536,), -inf where unknown.
        layout: see :func:`danlu.kernels.ngrams.walk_keys`, as the next two.
        slots: the longer grams.
        codes: indices into ``logs``.
        logs: logarithms of counts.
        log_total: logarithm of the number of bytes.
        routes: at least stop - start, uint8, receives at byte i the state before state 0 in the lower four bits, and in
            the next whether state n - 1 was reached from itself.
        homes: scratch, (AHEAD,), int64.
        held: scratch, (AHEAD,), uint64.

    Returns:
        The byte from which on no state has a finite score, or ``stop``; the best state at the last byte before.
    """
    top = order - 1
    window = ahead = np.uint64(0)
    # All states are scalars, so that they stay in registers: s0 to s5 are those before n - 1, late is n - 1. Likewise
    # l2 to l6 are log counts of the known grams of fewer than n bytes, b1 to b5 the same at the byte before.
    s0 = s1 = s2 = s3 = s4 = s5 = late = -np.inf
    b1 = b2 = b3 = b4 = b5 = b_top = 0.0
    for i in range(start, stop):
        block = (i - start) % AHEAD
        if block == 0 and order > 2:
            # Look up a block of grams at once: the waits for memory then overlap.
            for k in range(min(AHEAD, stop - i)):
                ahead = ahead << _EIGHT | np.uint64(data[i + k])
                length = min(order, i - start + k + 1)
                if length > 2:
                    gram = ahead & (_ALL >> np.uint64(64 - 8 * length))
                    home = layout[length, 0] + slot_of(gram, layout[length, 1]) * layout[length, 2]
                    homes[k], held[k] = home, slots[home]
        byte = data[i]
        window = window << _EIGHT | np.uint64(byte)
        known = min(order, i - start + 1)
        l1, l2, l3, l4, l5, l6, l_top = ones[byte], -np.inf, -np.inf, -np.inf, -np.inf, -np.inf, -np.inf
        if known > 1:
            l2 = twos[window & np.uint64(0xFFFF)]
            if l2 == -np.inf:
                known = 1
        at = np.int64(-1)
        if known > 2 and held[block] == (window & (_ALL >> np.uint64(64 - 8 * known))) << _EIGHT | _ONE:
            at = homes[block]
        while at < 0 and known > 2:
            gram = window & (_ALL >> np.uint64(64 - 8 * known))
            at = find(gram, layout[known, 0], layout[known, 1], layout[known, 2], slots)
            if at < 0:
                known -= 1
        at = 2 * at + 2
        below = min(known, top)
        b_now = l1
        if below > 1:
            b_now = l2
        if below > 2:
            b_now = l3 = logs[codes[at]]
        if below > 3:
            b_now = l4 = logs[codes[at + 1]]
        if below > 4:
            b_now = l5 = logs[codes[at + 2]]
        if below > 5:
            b_now = l6 = logs[codes[at + 3]]
        if known == order:
            if order == 2:
                l_top, l2 = l2, -np.inf
            else:
                l_top = logs[codes[at + order - 3]]
        # Into state 0, from any state.
        best, route = -np.inf, 0
        if not (ensure_unicode and 0x80 <= byte < 0xC0):
            node = l1 - log_total
            best = s0 + node
            if i == start:
                best = node
            score = s1 + node
            route, best = 1 if score > best else route, score if score > best else best
            score = s2 + node
            route, best = 2 if score > best else route, score if score > best else best
            score = s3 + node
            route, best = 3 if score > best else route, score if score > best else best
            score = s4 + node
            route, best = 4 if score > best else route, score if score > best else best
            score = s5 + node
            route, best = 5 if score > best else route, score if score > best else best
            score = late + node
            route, best = top if score > best else route, score if score > best else best
        # Into state n - 1, from the one below or from itself.
        node = l_top - b_top
        score, late = late + node, _state(top - 1, s0, s1, s2, s3, s4, s5) + node
        route, late = route | 16 if score > late else route, score if score > late else late
        s5 = s4 + (l6 - b5)
        s4 = s3 + (l5 - b4)
        s3 = s2 + (l4 - b3)
        s2 = s1 + (l3 - b2)
        s1 = s0 + (l2 - b1)
        s0 = best
        routes[i - start] = route
        if best == -np.inf and max(s1, s2, s3, s4, s5, late) == -np.inf:
            return i, 0
        # An unknown gram makes all longer ones unknown, so what stands in for it here never counts.
        b1, b_top = l1, b_now
        b2 = l2 if l2 > -np.inf else 0.0
        b3 = l3 if l3 > -np.inf else 0.0
        b4 = l4 if l4 > -np.inf else 0.0
        b5 = l5 if l5 > -np.inf else 0.0
    state, best = 0, s0
    for j in range(1, order):
        score = late if j == top else _state(j, s0, s1, s2, s3, s4, s5)
        if score > best:
            state, best = j, score
    return stop, state


@numba.njit(cache=True, nogil=True)
def _state(j, s0, s1, s2, s3, s4, s5):
    if j == 4:  # the usual order is 6
        return s4
    if j < 2:
        return s0 if j == 0 else s1
    if j < 4:
        return s2 if j == 2 else s3
    return s5


@numba.njit(cache=True, nogil=True)
def count_cut_pieces(
    data, ends, characters, newlines, isolate_digits, digits,
    order, ensure_unicode, ones, twos, layout, slots, codes, logs, log_total,
):  # fmt: skip
    """Cut texts into pieces and count these.

    Where no state has a finite score, because a rare character is in the way, every byte from there to the end of the
    chunk is a piece: the best of nothing is the smallest state, and state 0 begins a piece.

    Args:
        data: the texts one after another, uint8.
        ends: where each ends, int64.
        characters: see :func:`danlu.kernels.ngrams.training_chunk_end`, as the next three.
        newlines: most line feeds of a chunk.
        isolate_digits: whether digits are chunks.
        digits: flag per code point.
        order: see :func:`cut_chunk`, as all that follow.
        ensure_unicode: whether a piece must not begin with a continuation byte.
        ones: log counts.
        twos: log counts.
        layout: of the table.
        slots: the table.
        codes: the table.
        logs: logarithms.
        log_total: logarithm of the number of bytes.

    Returns:
        A counter, see :mod:`danlu.kernels.pieces`.
    """
    index, entries, arena, used = empty_counter(min(data.size // 16, 1 << 20))
    routes = np.empty(4 * characters + newlines, np.uint8)
    homes, held = np.empty(AHEAD, np.int64), np.empty(AHEAD, np.uint64)
    hashes, guesses = np.empty(BATCH, np.uint64), np.empty(BATCH, np.int64)
    starts, stops, weights = np.empty(BATCH, np.int64), np.empty(BATCH, np.int64), np.ones(BATCH, np.int64)
    waiting = size = 0
    top = order - 1
    start = 0
    for d in range(ends.size):
        while start < ends[d]:
            stop = training_chunk_end(data, start, ends[d], characters, newlines, isolate_digits, digits)
            if order == 1:
                alive, state = start, 0  # there is no state but 0
            else:
                alive, state = cut_chunk(
                    data, start, stop, order, ensure_unicode, ones, twos, layout, slots, codes, logs, log_total,
                    routes, homes, held,
                )  # fmt: skip
            end = stop
            while end > start:
                begin = end - 1
                if begin < alive:
                    if state == top and top > 0:
                        while routes[begin - start] & 16:
                            begin -= 1
                    begin -= state
                    state = int(routes[begin - start] & 15)
                starts[waiting], stops[waiting] = begin, end
                waiting += 1
                size += end - begin
                end = begin
                if waiting == BATCH:
                    index, entries, arena, used = with_room(index, entries, arena, used, BATCH, size)
                    count_batch(data, starts, stops, weights, hashes, guesses, index, entries, arena, used)
                    waiting = size = 0
            start = stop
    index, entries, arena, used = with_room(index, entries, arena, used, waiting, size)
    count_batch(data, starts[:waiting], stops[:waiting], weights, hashes, guesses, index, entries, arena, used)
    return index, entries, arena, used
