"""AMED written out in plain loops over intervals, one sample at a time, with its own formulas for every base."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def walk(
    epsilon: Callable[[Tensor, float], Tensor],
    z: Tensor,
    ratios: list[float],
    r: Tensor,
    c: Tensor,
    a: Tensor,
    base: str,
    order: int = 1,
    afs: bool = False,
) -> Tensor:
    """Samples (batch, d) from the first ratio to the last.

    Args:
        epsilon: noise that the network predicts in one sample (d,) when it is told a ratio.
        z: (batch, d).
        ratios: ends of the intervals.
        r: (batch, intervals), and c and a likewise.
        base: of the plug-in.
        order: of the multistep bases.
        afs: analytical first direction.
    """
    return torch.stack([_one(epsilon, z[b], ratios, r[b], c[b], a[b], base, order, afs) for b in range(len(z))])


def _one(epsilon, x, ratios, r, c, a, base, order, afs):
    past: list[tuple[float, Tensor]] = []
    calls_of_steps = 2 * (len(ratios) - 1)
    for i in range(len(ratios) - 1):
        t, u = ratios[i], ratios[i + 1]
        m = t * (u / t) ** float(r[i])
        d = x / math.sqrt(1 + t * t) if afs and i == 0 else epsilon(x, t)
        if base in ("amed", "euler", "dpm2"):
            y = x + (m - t) * d
        else:
            y = x + _multistep(base, order, x, t, m, d, past, calls_of_steps - 2 * i)
        told = float(a[i]) * m
        # D is what the network makes of y when it is told another time; the division is by the true place.
        data = y - told * epsilon(y, told)
        d_m = (y - data) / m
        if base == "amed":
            x = x + float(c[i]) * (u - t) * d_m
        elif base == "dpm2":
            x = x + float(c[i]) * (u - t) * (d_m / (2 * float(r[i])) + (1 - 1 / (2 * float(r[i]))) * d)
        elif base == "euler":
            x = y + float(c[i]) * (u - m) * d_m
        else:
            x = y + float(c[i]) * _multistep(base, order, y, m, u, d_m, past, calls_of_steps - 2 * i - 1)
    return x


def _multistep(base, order, x, start, stop, direction, past, left):
    if base == "ipndm":
        past.append((start, direction))
        d = [value for _, value in past[::-1]][:order]
        if len(d) == 1:
            mean = d[0]
        elif len(d) == 2:
            mean = (3 * d[0] - d[1]) / 2
        elif len(d) == 3:
            mean = (23 * d[0] - 16 * d[1] + 5 * d[2]) / 12
        else:
            mean = (55 * d[0] - 59 * d[1] + 37 * d[2] - 9 * d[3]) / 24
        return (stop - start) * mean
    past.append((start, x - start * direction))
    use = min(order, left, len(past))
    points = [(-math.log(ratio), data) for ratio, data in past[::-1]][:use]
    h = -math.log(stop) - points[0][0]
    phi = math.exp(-h) - 1
    result = math.exp(-h) * x - phi * points[0][1] - x
    if use == 1:
        return result
    h0 = points[0][0] - points[1][0]
    first = (points[0][1] - points[1][1]) / (h0 / h)
    if use == 2:
        return result - 0.5 * phi * first
    h1 = points[1][0] - points[2][0]
    second = (points[1][1] - points[2][1]) / (h1 / h)
    both = first + h0 / (h0 + h1) * (first - second)
    curve = (first - second) / ((h0 + h1) / h)
    return result + (phi / h + 1) * both - ((phi + h) / h**2 - 0.5) * curve
