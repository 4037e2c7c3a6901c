"""The best segmentation of bytes under a unigram model, in one pass of a compiled loop.

A text falls into chunks: a line together with all the line feeds that follow it. Pieces do not cross chunks. Within a
chunk the score of every prefix is pushed along the trie from each start, in float64, with the longest last piece
winning a tie; only as many scores are held as the longest piece has bytes.
"""

from __future__ import annotations

import numba
import numpy as np

from danlu.kernels.trie import HALF, LOW, ROOT, child

_NEWLINE = 10
#: Positions whose second unit is looked up at once.
AHEAD = 128


@numba.njit(cache=True, nogil=True)
def chunk_end(data: np.ndarray, start: int, stop: int) -> int:
    """End of the chunk that begins at ``start``: after its line feeds, or ``stop``."""
    i = start
    while i < stop and data[i] != _NEWLINE:
        i += 1
    while i < stop and data[i] == _NEWLINE:
        i += 1
    return i


@numba.njit(cache=True, nogil=True)
def push(data, start, stop, links, scores, ring, second, route, shift):
    """Score all prefixes of one chunk; the last unit of the best path to position e goes to route[e - shift]."""
    # Unsigned numbers throughout: for signed indices compiled code also handles negative ones.
    one, shift = np.uint64(1), np.uint64(shift)
    low, stop, mask = np.uint64(start), np.uint64(stop), np.uint64(ring.size - 1)
    while low < stop:
        high = min(low + np.uint64(AHEAD), stop)
        # The second unit of many walks at once, so that their waits for memory overlap; 0 where there is none.
        for s in range(low, high):
            unit = np.uint64(0)
            if s + one < stop:
                unit = child(links, np.uint64(ROOT) + np.uint64(data[s]), data[s + one])
            second[s - low] = unit
        for s in range(low, high):
            here = ring[s & mask]
            ring[s & mask] = -np.inf
            unit, e = np.uint64(ROOT) + np.uint64(data[s]), s + one
            score = here + scores[unit]
            if score > ring[e & mask]:
                ring[e & mask] = score
                route[e - shift] = unit
            unit = np.uint64(second[s - low])
            while unit > 0:
                e += one
                score = here + scores[unit]
                if score > ring[e & mask]:
                    ring[e & mask] = score
                    route[e - shift] = unit
                if e == stop:
                    break
                unit = child(links, unit, data[e])
        low = high


@numba.njit(cache=True, nogil=True)
def collect(begin, end, write, ended, route):
    """Follow the route back from ``end``; leaves the pieces in order at route[write:] and returns the new ``write``."""
    # A piece has at least one byte, so what is written never overtakes what is still to be read.
    free = end
    at = end
    while at > begin:
        node = route[at]
        both = ended[node]
        at -= np.int64(both >> HALF)
        route[free] = both & LOW
        free -= 1
    for k in range(free + 1, end + 1):
        route[write] = route[k]
        write += 1
    return write


@numba.njit(cache=True, nogil=True)
def viterbi(data, begin, end, score, links, scores, ended, ring, second, out):
    """Segment ``data[begin:end]``.

    Args:
        data: bytes, (length,), uint8.
        begin: first byte.
        end: one past the last byte.
        score: of the path up to the first byte; 0 but where a line has been begun before.
        links: of the trie's units, as the next three from :func:`danlu.kernels.trie.build`.
        scores: score of the piece that ends at each unit.
        ended: that piece in the lower half, its bytes in the upper, uint64.
        ring: scratch of -inf, float64; its size is a power of two above the longest piece.
        second: scratch, (AHEAD,), uint32.
        out: at least end - begin + 1 int32, receives the pieces from index 0.

    Returns:
        How many pieces were written.
    """
    mask = ring.size - 1
    write = 0
    start = begin
    while start < end:
        stop = chunk_end(data, start, end)
        ring[start & mask] = score if start == begin else 0.0
        push(data, start, stop, links, scores, ring, second, out, begin)
        ring[stop & mask] = -np.inf
        write = collect(start - begin, stop - begin, write, ended, out)
        start = stop
    return write


@numba.njit(cache=True, nogil=True)
def viterbi_batch(data, offsets, first, last, links, scores, ended, longest, out, counts):
    """Segment the documents ``first..last - 1``; document i writes ``counts[i]`` pieces to ``out[offsets[i] + i:]``."""
    ring, second = empty_ring(longest), np.empty(AHEAD, np.uint32)
    for i in range(first, last):
        counts[i] = viterbi(
            data, offsets[i], offsets[i + 1], 0.0, links, scores, ended, ring, second, out[offsets[i] + i :]
        )


@numba.njit(cache=True, nogil=True)
def close_gaps(out, offsets, counts, first_id):
    """Move what :func:`viterbi_batch` wrote together at the front, as ids from ``first_id``; returns how much it is."""
    write = 0
    for i in range(counts.size):
        for k in range(offsets[i] + i, offsets[i] + i + counts[i]):
            out[write] = out[k] + first_id
            write += 1
    return write


@numba.njit(cache=True, nogil=True)
def empty_ring(longest: int) -> np.ndarray:
    """Scratch for a longest piece of this many bytes."""
    size = 2
    while size <= longest:
        size *= 2
    return np.full(size, -np.inf)


@numba.njit(cache=True, nogil=True)
def viterbi_open(data, score, piece_scores, links, scores, ended, longest, out):
    """Segment the settled part of a chunk whose end is not known yet.

    Whatever follows, the best path leaves these bytes through one of the last ``longest`` positions. Where the best
    paths to all of these meet, everything before is settled.

    Args:
        data: the bytes so far, all within one chunk, uint8.
        score: score of the path up to the first byte.
        piece_scores: score of each piece.
        links: of the trie's units, as the next three from :func:`danlu.kernels.trie.build`.
        scores: score of the piece that ends at each unit.
        ended: that piece in the lower half, its bytes in the upper, uint64.
        longest: bytes of the longest piece.
        out: at least data.size + 1 int32, receives the settled pieces.

    Returns:
        Settled bytes, settled pieces, and the score up to there.
    """
    size = data.size
    ring = empty_ring(longest)
    ring[0] = score
    push(data, 0, size, links, scores, ring, np.empty(AHEAD, np.uint32), out, 0)
    marked = np.zeros(size + 1, np.bool_)
    earliest = max(0, size - longest)
    marked[earliest:] = True
    paths = size + 1 - earliest
    at = size
    while True:
        if marked[at]:
            if paths == 1:
                break
            before = at - np.int64(ended[out[at]] >> HALF)
            paths -= marked[before]
            marked[before] = True
        at -= 1
    count = collect(0, at, 0, ended, out)
    for k in range(count):
        score += piece_scores[out[k]]  # in the order of the path, so that the sum is the same to the last bit
    return at, count, score
