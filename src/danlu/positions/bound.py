"""The lower bound that a context length puts on the rotary base.

For queries and keys with independent components of variance sigma**2, a key similar to the query beats a random one, on
average and at distance m, by 2 sigma**2 f_b(m) with f_b(m) = sum_i cos(m * b**(-2i/d)). A base is feasible for length L
when f_b(m) >= 0 for every m in 0..L-1. Feasibility is not monotone in b: islands of feasible bases lie below the range
where every base is feasible, so both ends are reported and no bisection is used to find them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from danlu.progress import watched

from .rotary import inverse_frequencies

_FINE, _COARSE = 1e-4, 1e-3  # relative steps of the two grids of `recommended_base`
_EDGE = 1e-6  # relative accuracy of an island's edge


@dataclass(frozen=True)
class BaseBound:
    """Result of `recommended_base`.

    Attributes:
        length: Context length, tokens.
        dim: Number of rotated dims.
        b_star: Smallest feasible base found (on a grid with relative step 1e-4; narrower islands may lie below it).
        b_safe: Every base of the grid from here to `max_base` is feasible (relative step 1e-3); None where the search
            for it was left out, or where `max_base` itself is infeasible.
        islands: (low, high) runs of feasible bases from `b_star` to `max_base`; the last one is (b_safe, max_base).
        max_base: Upper end of the search.
    """

    length: int
    dim: int
    b_star: float
    b_safe: float | None
    islands: tuple[tuple[float, float], ...]
    max_base: float


def similarity_sum(m: int | float | Sequence[float] | np.ndarray, base: float, dim: int) -> np.ndarray:
    """f_b(m) = sum_{i < dim/2} cos(m * base**(-2i/dim)), the mean advantage of a similar key at distance m.

    Args:
        m: Distances, any shape.
        base: Rotary base, > 1.
        dim: Number of rotated dims, even, >= 2.

    Returns:
        float64 array of the shape of m.

    Raises:
        ValueError: Odd dim or base <= 1.

    Source: Scientific Spaces archive 10122; arXiv:2405.14591.
    """
    distances = np.asarray(m, dtype=np.float64)
    total = np.zeros_like(distances)
    for theta in _table(base, dim):
        total += np.cos(distances * theta)
    return total


def max_length(base: float, dim: int, *, pass_through: int = 0, limit: int = 1 << 22) -> int | None:
    """Longest context that a base is feasible for: the smallest m >= 0 with f_b(m) < 0.

    Args:
        base: Rotary base, > 1.
        dim: Number of rotated dims, even, >= 2.
        pass_through: Unrotated dims of the head, >= 0; each pair adds 1 to f_b.
        limit: Largest distance looked at, >= 1.

    Returns:
        The length, or None where f_b stays >= 0 below `limit`. Half of the dims unrotated is always None: each cos is
        then matched by a 1.

    Raises:
        ValueError: Odd dim, base <= 1, or limit < 1.

    Source: Scientific Spaces archive 10122.
    """
    return first_negative(_table(base, dim), _pairs(pass_through), limit)


def recommended_base(
    length: int, dim: int, *, pass_through: int = 0, max_base: float | None = None, safe: bool = True
) -> BaseBound:
    """Smallest rotary base for a context length, and the base above which every base will do.

    Args:
        length: Context length, tokens, >= 2.
        dim: Number of rotated dims, even, >= 2.
        pass_through: Unrotated dims of the head, >= 0.
        max_base: Upper end of the search; None takes 1000 * length, as the article does.
        safe: Also search `b_safe` and the islands (most of the time goes there: seconds at 128k, minutes at 1M).

    Returns:
        A `BaseBound`.

    Raises:
        ValueError: A value outside its range, or no feasible base up to `max_base` (few dims).

    Source: Scientific Spaces archive 10122; arXiv:2405.14591.
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise ValueError(f"length must be an integer >= 2, got {length!r}")
    top = 1000.0 * length if max_base is None else float(max_base)
    if not (math.isfinite(top) and top > 1):
        raise ValueError(f"max_base must be a finite number > 1, got {max_base!r}")
    _table(2.0, dim)  # refuses a bad dim before the search
    search = _Search(length, dim, _pairs(pass_through))
    count = math.ceil(math.log(top) / _FINE)
    found = search.next(1.0, _FINE, 1, count, wanted=True, label="smallest base")
    if found is None:
        raise ValueError(f"no base up to max_base={top:g} is feasible for length {length} with {dim} rotated dims")
    star = search.edge(math.exp((found - 1) * _FINE), math.exp(found * _FINE)) if found > 1 else math.exp(_FINE)
    if not safe:
        return BaseBound(length, dim, star, None, (), top)
    islands: list[tuple[float, float]] = []
    count = math.floor(math.log(top / star) / _COARSE) + 1
    start: float | None = star
    k = 0
    while (change := search.next(star, _COARSE, k, count, wanted=start is None, label="safe base")) is not None:
        k = change
        before, here = star * math.exp((k - 1) * _COARSE), star * math.exp(k * _COARSE)
        if start is None:
            start = search.edge(before, here)
        else:
            islands.append((start, search.edge(here, before)))
            start = None
    if start is not None:
        islands.append((start, top))
    return BaseBound(length, dim, star, start, tuple(islands), top)


def first_negative(table: np.ndarray, extra: float, limit: int) -> int | None:
    """Smallest m in [0, limit) with extra + sum_i cos(m * table_i) < 0, or None.

    Args:
        table: (d/2,) float64 frequencies.
        extra: What the unrotated dims add, in units of a rotated pair.
        limit: Distances to look at, >= 1.
    """
    if not isinstance(limit, int) or limit < 1:
        raise ValueError(f"limit must be an integer >= 1, got {limit!r}")
    from .bound_kernels import first_negative as scan

    found = int(scan(table, 0, limit, float(extra)))
    return None if found < 0 else found


class _Search:
    """Feasibility along a grid of bases; remembers where the last infeasible base failed, to look there first."""

    def __init__(self, length: int, dim: int, extra: float) -> None:
        self.length, self.dim, self.extra, self.hint = length, dim, extra, length - 1

    def next(self, low: float, step: float, start: int, stop: int, *, wanted: bool, label: str) -> int | None:
        """First k in [start, stop) for which low * exp(k * step) is feasible (`wanted`) or infeasible."""
        from .bound_kernels import next_base

        for first in watched(range(start, stop, 64), label):
            last = min(first + 64, stop)
            k, self.hint = next_base(low, step, first, last, wanted, self.dim, self.length, self.extra, self.hint)
            if k >= 0:
                return int(k)
        return None

    def edge(self, bad: float, good: float) -> float:
        """Edge between a neighbouring infeasible and feasible base; bisection is sound inside one step of the grid."""
        from .bound_kernels import failure

        while abs(good / bad - 1) > _EDGE:
            middle = math.sqrt(bad * good)
            fails = failure(middle, self.dim, self.length, self.extra, self.hint) >= 0
            bad, good = (middle, good) if fails else (bad, middle)
        return good


def _table(base: float, dim: int) -> np.ndarray:
    return inverse_frequencies(dim, base).numpy()


def _pairs(pass_through: int) -> float:
    if not isinstance(pass_through, (int, np.integer)) or pass_through < 0:
        raise ValueError(f"pass_through must be an integer >= 0, got {pass_through!r}")
    return pass_through / 2
