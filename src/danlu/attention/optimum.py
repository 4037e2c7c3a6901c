"""The numbers behind the gradient-maximising logit scale: log moments of score laws and their optima, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["sample_log_moment"]

Array = NDArray[np.float64]
LogMoment = Callable[[Array], Array]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(240)
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def sample_log_moment(samples: Tensor | Array) -> LogMoment:
    """Log moment function ``log M(a) = log mean exp(a*(s - max s))`` of measured scores, for :func:`optimal_scale`.

    A shift of all scores changes no softmax; measured from the maximum, nothing is lost to rounding at large ``a``.

    Args:
        samples: scores, any shape, all finite; many more than ``n``: K samples can stand for at most
            K candidates.

    Returns:
        A callable from a float64 array to a float64 array of the same shape.

    Raises:
        ValueError: a sample is not finite, or there are none.

    Source: Scientific Spaces archive 9812
    """
    flat = np.asarray(samples.detach().double().cpu() if isinstance(samples, Tensor) else samples, dtype=np.float64)
    flat = flat.ravel()
    if flat.size == 0 or not np.all(np.isfinite(flat)):
        raise ValueError("samples must be finite and at least one; drop masked scores (-inf) first")
    below = flat - flat.max()

    def log_m(a: Array) -> Array:
        return np.asarray([np.logaddexp.reduce(x * below) for x in np.ravel(a)]).reshape(np.shape(a)) - np.log(
            flat.size
        )

    return log_m


def gaussian_optimum(log_n: Array) -> Array:
    """sqrt(W(n*sqrt(e)/2) - 1/2), by Newton on x + ln(1+2x) = ln n with x = alpha^2."""
    # Concave and increasing, started left of the root: every step moves right and none overshoots.
    x = np.zeros_like(log_n)
    for _ in range(12):
        x = x - (x + np.log1p(2.0 * x) - log_n) / (1.0 + 2.0 / (1.0 + 2.0 * x))
    return np.asarray(np.sqrt(x))


def log_cosine_moment(a: Array, d: int) -> Array:
    """Log M(a) - a for the cosine of two random directions, by quadrature over the angle around its peak."""
    a = np.asarray(a, dtype=np.float64)
    # The integrand exp(a cos t) sin(t)^(d-2) peaks at cos t = c; 16 widths either side leave less than 1e-16 out.
    c = 2.0 * a / ((d - 2) + np.sqrt((d - 2.0) ** 2 + 4.0 * a * a))
    sine = np.sqrt((d - 2) * c / a)
    peak = np.arctan2(sine, c)
    width = 16.0 / np.sqrt(a * c + ((d - 2) / sine**2 if d > 2 else 0.0))
    low, high = np.maximum(peak - width, 0.0), np.minimum(peak + width, math.pi)
    half = ((high - low) / 2.0)[..., None]
    t = (low[..., None] + half) + half * _NODES
    exponent = -2.0 * a[..., None] * np.sin(t / 2.0) ** 2 + (d - 2) * np.log(np.sin(t)) + np.log(half * _WEIGHTS)
    log_integral = np.logaddexp.reduce(exponent, axis=-1)
    return np.asarray(log_integral - math.log(math.pi) / 2.0 - math.lgamma((d - 1) / 2.0) + math.lgamma(d / 2.0))


@lru_cache(maxsize=256)
def cosine_optimum(counts: tuple[float, ...], d: int) -> Array:
    """The surrogate's maximiser for cosine scores in d dimensions, one for each number of candidates."""
    # log M enters as log M - a: the a's cancel in the ratio, and for small d the optimum is huge.
    return _maximise(
        lambda a: log_cosine_moment(2.0 * a, d) - 2.0 * log_cosine_moment(a, d), np.log(np.asarray(counts))
    )


def law_optimum(log_m: LogMoment, log_n: Array) -> Array:
    """Optimum for any law of scores, given its log moment function."""
    return _maximise(lambda a: np.asarray(log_m(2.0 * a)) - 2.0 * np.asarray(log_m(a)), log_n)


def _maximise(log_ratio: LogMoment, log_n: Array) -> Array:
    """Argmax over a of a*(1 - exp(log_ratio(a))/n), for a vector of ln n: a shared coarse grid, then golden section."""

    def objective(a: Array, ratio: Array, logs: Array) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(-a * np.expm1(np.minimum(ratio - logs, 700.0)))

    with np.errstate(all="ignore"):
        grid = np.exp2(np.arange(-40.0, 81.0))
        coarse = np.asarray(log_ratio(grid), dtype=np.float64)
    values = objective(grid, coarse, log_n[:, None])
    # The first descent, not the largest value: far out, log M(2a) - 2 log M(a) is lost in rounding.
    descent = ~(values[:, 1:] >= values[:, :-1])
    best = descent.argmax(axis=1)
    if not np.all(descent.any(axis=1)) or np.any(best == 0):
        raise ValueError("score has no optimum: log M(2a) - 2 log M(a) must grow past ln n (too few samples?)")
    if not np.all(np.isfinite(coarse[best + 1])):
        raise ValueError("score gives a non-finite log M(a) next to the optimum; compute it with logsumexp")
    low, high = np.log(grid[best - 1]), np.log(grid[best + 1])

    def at(log_a: Array) -> Array:
        a = np.exp(log_a)
        return objective(a, np.asarray(log_ratio(a)), log_n)

    return np.exp(golden_section(at, low, high, 44))


def golden_section(f: Callable[[Array], Array], low: Array, high: Array, steps: int) -> Array:
    """Vectorised golden-section maximisation on brackets (low, high)."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    f_left, f_right = f(left), f(right)
    for _ in range(steps):
        keep_left = f_left > f_right
        low, high = np.where(keep_left, low, left), np.where(keep_left, right, high)
        new = np.where(keep_left, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        f_new = f(new)
        left, right = np.where(keep_left, new, right), np.where(keep_left, left, new)
        f_left, f_right = np.where(keep_left, f_new, f_right), np.where(keep_left, f_left, f_new)
    return (low + high) / 2.0
