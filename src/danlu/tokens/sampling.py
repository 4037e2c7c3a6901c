"""Exact random segmentation: draws with probability exp(alpha * s(w)) / Z over all segmentations w of a text.

Two samplers have this law. *Viterbi sampling* (archive 9811) is one forward pass like Viterbi decoding, in which a
newcomer replaces the piece kept at a position with the share its weight has of all that arrived so far. *Filtering,
then sampling* computes the weights of all suffixes once and then draws from front to back, which makes further draws
cheap. For alpha up to about ten the first works on weights, rescaled where needed, beyond that on their logarithms.

Alpha is an inverse temperature: 1 is the model's own posterior, infinity its best segmentation, 0 makes all
segmentations equally likely; 0.1 to 0.3 are usual for training.

Source: Scientific Spaces archives 9768, 9811; Subword Regularization, arXiv:1804.10959.
"""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Iterator, Sequence

import numpy as np

from danlu.kernels import lattice as loops
from danlu.kernels.compiling import announce
from danlu.kernels.viterbi import chunk_end, empty_ring
from danlu.tokens.unigram import Unigram, in_threads

_STEP = np.uint64(0x9E3779B97F4A7C15)
#: exp(-200) is far above the smallest float64, so that products with a rescaled prefix stay normal numbers.
_REACH = 200.0


def check_alpha(alpha: float | None) -> float | None:
    """The inverse temperature, with infinity as None, which stands for the best segmentation.

    Raises:
        TypeError: not a number.
        ValueError: negative or NaN.
    """
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float | np.floating | np.integer):
        raise TypeError(f"alpha must be a number or None, got {alpha!r}")
    if not alpha >= 0:
        raise ValueError(f"alpha must be at least 0 (None for the best segmentation), got {alpha}")
    return None if math.isinf(alpha) else float(alpha)


def random_states(seed: int | Sequence[int] | None, count: int) -> np.ndarray:
    """Independent states of random numbers for ``count`` texts, (count,), uint64.

    Args:
        seed: an integer, from which text i gets stream i; or one integer per text; or None for fresh randomness.
        count: how many.

    Raises:
        TypeError: not an integer.
        ValueError: negative, above 2**64 - 1, or not one per text.
    """
    one = secrets.randbits(64) if seed is None else seed
    if isinstance(one, int | np.integer):
        seeds, streams = [one], np.arange(count, dtype=np.uint64)
    else:
        seeds, streams = list(one), np.zeros(1, np.uint64)
        if len(seeds) != count:
            raise ValueError(f"seed must be one integer, or one for each of the {count} texts, got {len(seeds)}")
    for item in seeds:
        if isinstance(item, bool) or not isinstance(item, int | np.integer):
            raise TypeError(f"seed must be an integer, got {item!r}")
        if not 0 <= item < 2**64:
            raise ValueError(f"seed must be in 0..2**64 - 1, got {item}")
    return _mixed(_mixed(np.array(seeds, dtype=np.uint64)) + streams * _STEP)


def _mixed(values: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits that leaves no trace of neighbouring inputs (the finaliser of splitmix64)."""
    values = values + _STEP
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Sampler:
    """Viterbi sampling from a unigram model at one alpha.

    Args:
        model: the engine.
        alpha: inverse temperature, at least 0 and finite.
    """

    def __init__(self, model: Unigram, alpha: float):
        announce(loops.sample)
        self.model, self.alpha = model, alpha
        self._on_weights = alpha * -float(model.scores.min()) <= _REACH
        if self._on_weights:
            scores = model.unit_scores
            self._weights = np.exp(alpha * np.maximum(scores, -1e300)) * np.isfinite(scores)

    def segment(self, data: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, float]:
        """Draw a segmentation.

        Args:
            data: (length,), uint8.
            state: of the random numbers, (1,), uint64; moves on.

        Returns:
            Indices of pieces, int32, and log Z.
        """
        model = self.model
        out = np.empty(data.size + 1, np.int32)
        ring = empty_ring(model.longest)
        if self._on_weights:
            ring[:] = 0.0
            count, log_total = loops.sample(
                data, 0, data.size, model.links, self._weights, model.ended, ring, state, out
            )
        else:
            count, log_total = loops.sample_log(
                data, 0, data.size, model.links, model.unit_scores, self.alpha, model.ended, ring, state, out
            )
        return out[:count].copy(), log_total

    def segment_batch(
        self, data: np.ndarray, offsets: np.ndarray, states: np.ndarray, threads: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw a segmentation of every document; arguments and returns as for ``Unigram.segment_batch``."""
        model = self.model
        out = np.empty(data.size + offsets.size, np.int32)
        counts = np.zeros(offsets.size - 1, np.int64)

        def work(first: int, last: int) -> None:
            if self._on_weights:
                loops.sample_batch(
                    data, offsets, first, last,
                    model.links, self._weights, model.ended, model.longest,
                    states, out, counts,
                )  # fmt: skip
                return
            for i in range(first, last):
                drawn, _ = self.segment(data[offsets[i] : offsets[i + 1]], states[i : i + 1])
                out[offsets[i] + i :][: drawn.size] = drawn
                counts[i] = drawn.size

        in_threads(work, offsets, threads)
        return out, counts


class Segmentations:
    """All segmentations of one text, with probabilities proportional to exp(alpha * score).

    Args:
        model: the engine.
        data: the text, (length,), uint8.
        alpha: inverse temperature, at least 0 and finite.
        first_id: id of the engine's first piece.

    Raises:
        TypeError: alpha is not a number.
        ValueError: alpha is negative, NaN or infinite.

    Source: Scientific Spaces archive 9811.
    """

    def __init__(self, model: Unigram, data: np.ndarray, alpha: float, first_id: int = 0):
        announce(loops.backward)
        finite = check_alpha(alpha)
        if finite is None:
            raise ValueError(f"alpha must be finite here, got {alpha}: encode gives the best segmentation")
        self._model, self._alpha, self._first_id = model, finite, first_id
        self._chunks, self._steps = list(_chunks(data)), []
        for chunk in self._chunks:
            steps = np.empty(chunk.size)
            loops.backward(chunk, model.links, model.unit_scores, finite, model.longest, steps)
            self._steps.append(steps)
        #: log Z, the log of the sum of exp(alpha * score) over all segmentations.
        self.log_partition = math.fsum(math.fsum(steps) for steps in self._steps)

    @functools.cached_property
    def _marginals(self) -> tuple[np.ndarray, float]:
        model = self._model
        parts, entropies = [], []
        for chunk, steps in zip(self._chunks, self._steps, strict=True):
            out = np.empty(chunk.size + 1)
            entropies.append(loops.marginals(chunk, model.links, model.unit_scores, self._alpha, steps, out))
            parts.append(out[:-1])
        return np.concatenate([*parts, np.ones(1)]), math.fsum(entropies)

    @property
    def boundary_marginals(self) -> np.ndarray:
        """Probability that a piece begins at each byte, and ends at the end: (length + 1,), float64."""
        return self._marginals[0].copy()

    @property
    def expected_tokens(self) -> float:
        """Mean number of pieces."""
        return math.fsum(self._marginals[0]) - 1.0

    @property
    def entropy(self) -> float:
        """Entropy of the distribution, in nats."""
        return self._marginals[1]

    def log_prob(self, ids: Sequence[int]) -> float:
        """Log probability of a segmentation of this text, given as ids."""
        return self._alpha * float(self._model.scores[np.asarray(ids, int) - self._first_id].sum()) - self.log_partition

    def sample(self, n: int = 1, *, seed: int | None = None) -> list[list[int]]:
        """Independent draws, each from front to back by the weights of what can follow.

        Args:
            n: how many.
            seed: in 0..2**64 - 1; None is fresh randomness.

        Returns:
            ``n`` lists of ids.

        Raises:
            ValueError: n is below 1, or the seed is out of range.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        model = self._model
        states = random_states(seed, n)
        drawn: list[list[int]] = [[] for _ in range(n)]
        for chunk, steps in zip(self._chunks, self._steps, strict=True):
            out = np.empty(chunk.size, np.int32)
            for k in range(n):
                size = loops.draw(
                    chunk, model.links, model.unit_scores, model.ended, self._alpha, steps, states[k : k + 1], out
                )
                drawn[k] += (out[:size] + self._first_id).tolist()
        return drawn


def _chunks(data: np.ndarray) -> Iterator[np.ndarray]:
    """The parts of a text that are segmented independently: lines with the line feeds after them."""
    start = 0
    while start < data.size:
        stop = chunk_end(data, start, data.size)
        yield data[start:stop]
        start = stop
