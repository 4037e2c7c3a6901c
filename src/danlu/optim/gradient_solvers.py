"""Weights of several tasks' gradients, from their inner products alone.

The three problems of the source are one: the shortest vector of a set that the gradients span with weights >= 0. For
one or two constraints there are closed forms that stay on the device; everything else goes through one dual active-set
method in float64, which is exact and finite also for equal, opposite and zero gradients.

Source: Scientific Spaces archives 8896 and 8907; active sets: Goldfarb and Idnani 1983.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor


def solve_primary(
    gram: Tensor, cross: Tensor, target: Tensor | None = None, *, precision: float | None = None
) -> Tensor:
    """Multipliers of the auxiliary tasks: the step closest to the main gradient that makes no auxiliary loss rise.

    The step is ``u = g_0 + sum_i l_i g_i``, the solution of ``max <g_0, u> - |u|^2 / 2`` subject to
    ``<g_i, u> >= target_i``, that is, the main gradient projected on the cone of the auxiliary ones. For one auxiliary
    task ``l = relu(target - <g_0, g_1>) / |g_1|^2``.

    Args:
        gram: (n, n), inner products of the auxiliary gradients.
        cross: (n,), their inner products with the main gradient.
        target: (n,), least inner products with the step, >= 0; None is zero. Targets that no step meets together count
            as zero: "no loss rises" can always be met.
        precision: relative error of the inner products, in (0, 1); None is the resolution of the dtype of ``gram``.
            Violations and angles below about ten times this are rounding.

    Returns:
        (n,) multipliers >= 0 in the dtype of ``gram``. A zero gradient gets 0: its constraint is dropped.

    Raises:
        ValueError: shapes that do not fit, an infinite or undefined number (checked on the CPU only, elsewhere it is
            passed on), negative targets (likewise).

    Source: archive 8907. Departure: the source re-optimises the multiplier of the most violated constraint and stops
    when all hold; that can leave multipliers > 0 on constraints that no longer bind. For g_0 = (-2, -2),
    g_1 = (-1, 2), g_2 = (0, 1) it ends at (-2.4, 0); the solution, found here, is (-2, 0).
    """
    n = _size(gram, "gram")
    for name, vector in (("cross", cross), ("target", target)):
        if vector is not None and vector.shape != (n,):
            raise ValueError(f"{name} must have shape ({n},) to fit gram, got {tuple(vector.shape)}")
    precision = _precision(gram, precision)
    if n in (1, 2) and gram.device.type != "cpu":
        return _enumerate(gram, cross, target, precision)
    G, h = _numbers(gram, "gram"), _numbers(cross, "cross")
    d = np.zeros(n) if target is None else _numbers(target, "target")
    if (d < 0).any():
        raise ValueError(f"target must be at least 0, got {d.min()}")
    found, met = _quadratic(G, h - d, precision)
    if not met:
        found, _ = _quadratic(G, h, precision)
    return torch.from_numpy(found).to(gram)


def solve_min_norm(gram: Tensor, *, precision: float | None = None) -> Tensor:
    """Weights of the shortest convex combination of gradients: the step that helps the worst-off task most.

    ``u = sum_i w_i g_i`` solves ``max_u min_i <g_i, u> - |u|^2 / 2``; then ``<g_i, u> >= |u|^2`` for every task, and
    u = 0 only where no step lowers all losses. Short gradients get large weights: normalise first if that is unwanted.

    Args:
        gram: (n, n), inner products of the gradients.
        precision: as in ``solve_primary``.

    Returns:
        (n,) weights >= 0 that sum to 1, in the dtype of ``gram``.

    Raises:
        ValueError: as in ``solve_primary``.

    Source: archive 8896; arXiv:1810.04650. Departure: the source iterates Frank-Wolfe, which after 100 steps can be
    several percent too long; this is exact.
    """
    n = _size(gram, "gram")
    if n == 2 and gram.device.type != "cpu":
        return _nearest_of_two(gram)
    return solve_mixed(gram, n, precision=precision)


def solve_mixed(gram: Tensor, primaries: int, *, precision: float | None = None) -> Tensor:
    """Weights for several main tasks, treated as equals, under several auxiliary constraints.

    The shortest ``u = sum w_i g_i + sum l_j g_j`` with w on the simplex and l >= 0. One primary gives
    ``solve_primary``, no auxiliary gives ``solve_min_norm``.

    Args:
        gram: (n, n), inner products of all gradients, primaries first.
        primaries: number of main tasks, in 1..n.
        precision: as in ``solve_primary``.

    Returns:
        (n,) weights: the first ``primaries`` sum to 1, the others are multipliers >= 0.

    Raises:
        ValueError: as in ``solve_primary``; ``primaries`` out of range.

    Source: archive 8907.
    """
    n = _size(gram, "gram")
    if not 1 <= primaries <= n:
        raise ValueError(f"primaries must be in 1..{n}, the number of tasks, got {primaries}")
    precision = _precision(gram, precision)
    G = _numbers(gram, "gram")
    main = np.arange(n) < primaries
    shortest = int(G.diagonal()[:primaries].argmin())
    least = G[shortest, shortest]
    if least <= 0:  # a main gradient is zero, and nothing is shorter than that
        return torch.eye(n, dtype=gram.dtype, device=gram.device)[shortest]
    # min |sum x_i g_i|^2 + least (1 - sum_main x)^2 over x >= 0 is the same problem up to the length of x: for x = t w
    # it is t^2 |u|^2 + least (1 - t)^2. The scale ``least`` keeps both parts comparable whatever the gradients' sizes.
    found, _ = _quadratic(G / least + np.outer(main, main), -main.astype(np.float64), precision)
    return torch.from_numpy(found / found[:primaries].sum()).to(gram)


def _size(gram: Tensor, name: str) -> int:
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
        raise ValueError(f"{name} must be a square matrix of at least one task, got shape {tuple(gram.shape)}")
    return gram.shape[0]


def _precision(gram: Tensor, precision: float | None) -> float:
    if precision is None:
        return torch.finfo(gram.dtype).eps
    if not 0 < precision < 1:
        raise ValueError(f"precision must be in (0, 1), got {precision}")
    return precision


def _numbers(tensor: Tensor, name: str) -> np.ndarray:
    numbers = tensor.detach().to("cpu", torch.float64).numpy()
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} must be finite, got {numbers.tolist()}")
    return numbers


def _quadratic(G: np.ndarray, c: np.ndarray, precision: float) -> tuple[np.ndarray, bool]:
    """Minimise ``x^T G x / 2 + c^T x`` over x >= 0; False where there is no minimum."""
    lengths = np.sqrt(np.maximum(G.diagonal(), 0))
    inverse = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    # Cosines and multiples of the longest pull, so that tolerances do not depend on the scale of any loss.
    pull = c * inverse
    scale = np.abs(pull).max()
    if scale == 0:
        return np.zeros_like(c), True
    cosines = np.ascontiguousarray(G * inverse * inverse[:, None])
    found, met = _active_set(cosines, pull / scale, 10 * precision)
    return found * inverse * scale, met


@numba.njit(cache=True, nogil=True)
def _solve(C, active, count, right):
    """Solve ``C[active, active] x = right`` by Cholesky; the vectors of the active set are independent."""
    factor = np.empty((count, count))
    x = np.empty(count)
    for i in range(count):
        for j in range(i + 1):
            total = C[active[i], active[j]]
            for k in range(j):
                total -= factor[i, k] * factor[j, k]
            factor[i, j] = np.sqrt(total) if i == j else total / factor[j, j]
        total = right[i]
        for k in range(i):
            total -= factor[i, k] * x[k]
        x[i] = total / factor[i, i]
    for i in range(count - 1, -1, -1):
        for k in range(i + 1, count):
            x[i] -= factor[k, i] * x[k]
        x[i] /= factor[i, i]
    return x


@numba.njit(cache=True, nogil=True)
def _active_set(C, c, tolerance):
    """Dual active-set method for a matrix of cosines; rows with a zero diagonal are left out.

    Each round brings the most violated constraint in, along the direction in which the active ones stay tight, and
    drops those whose multipliers fall to zero on the way. A gradient in the span of the active ones never joins them:
    the step is unchanged along that direction, until an active one leaves or the problem proves to be unbounded.
    """
    n = c.size
    x, right = np.zeros(n), np.empty(n)
    active, inside = np.empty(n, np.int64), np.zeros(n, np.bool_)
    dependence = max(tolerance, 1e-13)
    count = 0
    for _ in range(50 * n):  # finite without rounding; in practice about n rounds
        enter, slack = -1, -tolerance * (1 + x.sum())
        for i in range(n):
            if not inside[i] and C[i, i] > 0:
                total = c[i]
                for j in range(n):
                    total += C[i, j] * x[j]
                if total < slack:
                    enter, slack = i, total
        while enter >= 0 and not inside[enter]:
            for k in range(count):
                right[k] = C[active[k], enter]
            change = _solve(C, active, count, right)
            independent, spread = C[enter, enter], 1.0
            for k in range(count):
                independent -= change[k] * right[k]
                spread += abs(change[k])
            certain = independent > dependence * spread * spread  # errors of C, carried over
            full = -slack / independent if certain else np.inf
            step, leave = full, -1
            for k in range(count):
                if change[k] > 0 and x[active[k]] / change[k] < step:
                    step, leave = x[active[k]] / change[k], k
            if step == np.inf:
                # Without targets only rounding leads here: the worst violation is one that it explains.
                if slack < -10 * np.sqrt(dependence) * (1 + x.sum()):
                    return x, False
                enter = -1
                break
            x[enter] += step
            for k in range(count):
                x[active[k]] -= step * change[k]
            if leave < 0:
                active[count], inside[enter] = enter, True
                count += 1
            else:
                if certain:
                    slack += step * independent
                x[active[leave]], inside[active[leave]] = 0.0, False
                for k in range(leave, count - 1):
                    active[k] = active[k + 1]
                count -= 1
        if enter < 0:
            break
    for k in range(count):  # once more from scratch, free of the rounding of the steps
        right[k] = -c[active[k]]
        for j in range(n):
            if not inside[j]:
                right[k] -= C[active[k], j] * x[j]
    polished = _solve(C, active, count, right)
    for k in range(count):
        x[active[k]] = max(polished[k], 0.0)
    return x, True


def _nearest_of_two(gram: Tensor) -> Tensor:
    """The convex combination of two gradients with the least norm, without a look at the numbers."""
    apart = gram[0, 0] + gram[1, 1] - 2 * gram[0, 1]
    first = (gram[1, 1] - gram[0, 1]) / torch.where(apart > 0, apart, torch.ones_like(apart))
    first = torch.where(apart > 0, first.clamp(0, 1), torch.full_like(apart, 0.5))
    return torch.stack((first, 1 - first))


def _enumerate(gram: Tensor, cross: Tensor, target: Tensor | None, precision: float) -> Tensor:
    """The multipliers of one or two constraints: all active sets at once, and the one that violates least."""
    wide = gram.dtype if gram.device.type == "mps" else torch.float64
    G, h = gram.to(wide), cross.to(wide)
    lengths = G.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(lengths > 0, 1 / lengths, torch.zeros_like(lengths))
    C = G * inverse * inverse[:, None]
    found, worst = _least_violating(C, h * inverse, lengths > 0)
    if target is not None:
        pull = (h - target.to(wide)) * inverse
        better, violation = _least_violating(C, pull, lengths > 0)
        found = torch.where(violation <= 10 * precision * pull.abs().max(), better, found)
    return (found * inverse).to(gram.dtype)


def _least_violating(C: Tensor, pull: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Of the stationary points of all active sets, the one closest to the conditions of the optimum, and how close."""
    zero = torch.zeros_like(pull)
    candidates = [zero]
    for i in range(len(pull)):
        alone = zero.clone()
        alone[i] = -pull[i]
        candidates.append(alone)
    if len(pull) == 2:
        a = C[0, 1]
        rest = 1 - a * a
        both = torch.stack((a * pull[1] - pull[0], a * pull[0] - pull[1])) / torch.where(rest > 0, rest, torch.inf)
        candidates.append(both)
    x = torch.stack(candidates)
    slack = pull + x @ C
    wrong = torch.maximum(-x, torch.where(x > 0, slack.abs(), -slack))
    violation = wrong.masked_fill(~present, 0).amax(1).clamp(min=0)
    best = violation.argmin()
    return x[best].clamp(min=0) * present, violation[best]
