"""All segmentations of bytes at once: their total weight, exact random draws from them, and what is expected over them.

A segmentation w of a chunk has probability exp(alpha s(w)) / Z, with s(w) the sum of its pieces' scores. Chunks are
drawn independently, since no piece crosses them. The sampler that serves encoding works on weights themselves, rescaled
whenever they leave a comfortable range: no logarithm per byte, and relative errors that do not grow with the length.
The log-domain sampler is the published form and serves every alpha.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from danlu.kernels.trie import LOW, first, follow
from danlu.kernels.viterbi import chunk_end, collect, empty_ring

_SMALL, _LARGE = 1e-100, 1e100
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@numba.njit(cache=True, nogil=True)
def uniform(state: np.ndarray) -> float:
    """A uniform number in (0, 1] from a splitmix64 state, (1,) uint64, which moves on."""
    state[0] += _GAMMA
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * _MIX[0]
    z = (z ^ (z >> np.uint64(27))) * _MIX[1]
    z = z ^ (z >> np.uint64(31))
    return (np.float64(z >> np.uint64(11)) + 1.0) * 2.0**-53


@numba.njit(cache=True, nogil=True)
def sample(data, begin, end, links, weights, ended, ring, state, out):
    """Draw a segmentation of ``data[begin:end]`` by Viterbi sampling on weights.

    A newcomer at a position replaces the piece kept there with the share that its weight has of all that arrived so
    far.

    Args:
        data: bytes, (length,), uint8.
        begin: first byte.
        end: one past the last byte.
        links: of the trie's units.
        weights: exp(alpha * score) of the piece that ends at each unit, at least 1e-87; 0 where none does.
        ended: that piece in the lower half, its bytes in the upper, uint64.
        ring: scratch of zeros, float64; its size is a power of two above the longest piece.
        state: of the random numbers, (1,), uint64.
        out: at least end - begin + 1 int32, receives the pieces.

    Returns:
        How many pieces were written, and log Z.
    """
    mask = ring.size - 1
    write = 0
    start = begin
    log_total = 0.0
    while start < end:
        stop = chunk_end(data, start, end)
        ring[start & mask] = 1.0
        for s in range(start, stop):
            here = ring[s & mask]
            if here < _SMALL or here > _LARGE:
                log_total += math.log(here)
                for k in range(ring.size):
                    ring[k] /= here
                here = 1.0
            ring[s & mask] = 0.0
            node, e = first(data, s), s
            while node >= 0:
                e += 1
                if weights[node] > 0.0:
                    weight = here * weights[node]
                    total = ring[e & mask] + weight
                    ring[e & mask] = total
                    # Always true for the first, since a uniform number is at most 1.
                    if uniform(state) * total <= weight:
                        out[e - begin] = node
                node = follow(links, node, data, e, stop)
        log_total += math.log(ring[stop & mask])
        ring[stop & mask] = 0.0
        write = collect(start - begin, stop - begin, write, ended, out)
        start = stop
    return write, log_total


@numba.njit(cache=True, nogil=True)
def sample_log(data, begin, end, links, scores, alpha, ended, ring, state, out):
    """Draw a segmentation by Viterbi sampling in the log domain, for any alpha >= 0.

    Args and returns as for :func:`sample`, but with scores in place of weights, and ``ring`` is a scratch of -inf.
    """
    mask = ring.size - 1
    write = 0
    start = begin
    log_total = 0.0
    while start < end:
        stop = chunk_end(data, start, end)
        ring[start & mask] = 0.0
        for s in range(start, stop):
            here = ring[s & mask]
            ring[s & mask] = -np.inf
            node, e = first(data, s), s
            while node >= 0:
                e += 1
                score = scores[node]
                if score > -np.inf:
                    value = here + alpha * score
                    gap = value - ring[e & mask]  # +inf for the first, which is then taken
                    if gap > 0:
                        x = math.exp(-gap)
                        share = 1 / (1 + x)
                        ring[e & mask] = value + math.log1p(x)
                    else:
                        x = math.exp(gap)
                        share = x / (1 + x)
                        ring[e & mask] += math.log1p(x)
                    if uniform(state) <= share:
                        out[e - begin] = node
                node = follow(links, node, data, e, stop)
        log_total += ring[stop & mask]
        ring[stop & mask] = -np.inf
        write = collect(start - begin, stop - begin, write, ended, out)
        start = stop
    return write, log_total


@numba.njit(cache=True, nogil=True)
def backward(data, links, scores, alpha, longest, steps):
    """Log weights of all segmentations of every suffix of one chunk, as steps from each to the next.

    With B[s] the log weight of the suffix from s, ``steps[s]`` becomes B[s] - B[s + 1]. Steps stay small however long
    the chunk is, so that probabilities, which depend on differences of nearby B only, keep the full precision
    everywhere.

    Args:
        data: the chunk, (length,), uint8.
        links: of the trie's units.
        scores: score of the piece that ends at each unit, or -inf.
        alpha: inverse temperature.
        longest: bytes of the longest piece.
        steps: (length,), float64, receives the steps; their sum is log Z.
    """
    size = data.size
    ahead = empty_ring(longest)  # B[e] - B[s + 1] of the places that a piece can reach
    mask = ahead.size - 1
    ahead[size & mask] = 0.0
    for s in range(size - 1, -1, -1):
        total = -np.inf
        node, e = first(data, s), s
        while node >= 0:
            e += 1
            score = scores[node]
            if score > -np.inf:
                value = ahead[e & mask] + alpha * score
                high, low = max(value, total), min(value, total)
                total = high + math.log1p(math.exp(low - high))
            node = follow(links, node, data, e, size)
        steps[s] = total
        for k in range(ahead.size):
            ahead[k] -= total
        ahead[s & mask] = 0.0


@numba.njit(cache=True, nogil=True)
def draw(data, links, scores, ended, alpha, steps, state, out):
    """Draw one segmentation of a chunk from front to back, by the suffix weights of :func:`backward`.

    ``steps``: (length,), float64; ``out``: at least (length,), int32. Returns how many pieces were written.
    """
    size = data.size
    count = 0
    s = 0
    while s < size:
        # The first piece from s has probability exp(alpha score + B[e] - B[s]): walk until that much is used up.
        left = uniform(state)
        change = 0.0
        node, e = first(data, s), s
        at = s
        while node >= 0 and left > 0:
            change -= steps[e]
            e += 1
            score = scores[node]
            if score > -np.inf:
                at = e
                out[count] = ended[node] & LOW
                left -= math.exp(alpha * score + change)
            node = follow(links, node, data, e, size)
        s = at
        count += 1
    return count


@numba.njit(cache=True, nogil=True)
def marginals(data, links, scores, alpha, steps, out):
    """Probability that a piece begins at each place of a chunk; returns the entropy of the segmentations, in nats.

    The entropy is a sum over places: how likely a piece begins there, times the entropy of which piece it is.

    Args:
        data: the chunk, (length,), uint8.
        links: of the trie's units.
        scores: score of the piece that ends at each unit, or -inf.
        alpha: inverse temperature.
        steps: of :func:`backward`.
        out: (length + 1,), float64, receives the probabilities; the last is that of an end, 1.
    """
    size = data.size
    out[:] = 0.0
    out[0] = 1.0
    entropy = 0.0
    for s in range(size):
        change = 0.0
        node, e = first(data, s), s
        while node >= 0:
            change -= steps[e]
            e += 1
            score = scores[node]
            if score > -np.inf:
                value = alpha * score + change
                share = out[s] * math.exp(value)
                out[e] += share
                entropy -= share * value
            node = follow(links, node, data, e, size)
    return entropy


@numba.njit(cache=True, nogil=True)
def sample_batch(data, offsets, first_document, last_document, links, weights, ended, longest, states, out, counts):
    """Draw documents ``first_document..last_document - 1``; document i has random numbers of its own, ``states[i]``.

    It writes ``counts[i]`` pieces to ``out[offsets[i] + i:]``. ``weights`` are as for :func:`sample`.
    """
    ring = empty_ring(longest)
    ring[:] = 0.0
    for i in range(first_document, last_document):
        counts[i], _ = sample(
            data, offsets[i], offsets[i + 1], links, weights, ended, ring, states[i : i + 1],
            out[offsets[i] + i :],
        )  # fmt: skip
