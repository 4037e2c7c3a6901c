"""Times at which a solver stops, from noise to data.

Source: arXiv:2206.00364 (polynomial), arXiv:2206.00927 (uniform in the log signal-to-noise ratio), arXiv:2312.00094
(uniform in the time of a variance-preserving process).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from danlu.diffusion.process import Process

Spacing = Literal["uniform", "polynomial", "logsnr", "time_uniform"]
SPACINGS: tuple[str, ...] = get_args(Spacing)


def time_grid(
    process: Process,
    steps: int,
    spacing: Spacing | None = None,
    rho: float | None = None,
    start: float | None = None,
    end: float | None = None,
) -> Tensor:
    """Times from noise to data.

    Args:
        process: whose times they are.
        steps: intervals, at least 1.
        spacing: ``uniform`` in time; ``polynomial`` in the root of order ``rho`` of sigma / alpha; ``logsnr``, uniform
            in log(sigma / alpha); ``time_uniform``, uniform in the power ``1 / rho`` of the time of the `VP` process
            that has these noises. By default ``uniform`` for processes that reach pure noise or pure data, else
            ``polynomial``.
        rho: order, above 0; 7 for ``polynomial`` and 1 for ``time_uniform`` unless given.
        start: first time, ``t_max`` unless given.
        end: last time, ``process.t_end`` unless given.

    Returns:
        Strictly decreasing float64 times (steps + 1,).

    Raises:
        ValueError: steps below 1, times outside the process or not descending, an unknown spacing, a spacing by noise
            ratio from or to a time that has none, or ``time_uniform`` between ends that no `VP` process fits.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
    first = process.t_max if start is None else start
    last = process.t_end if end is None else end
    ends = process.check_times(torch.tensor([first, last], dtype=torch.float64), "start and end")
    if not first > last:
        raise ValueError(f"start must be above end, got {first:g} and {last:g}: sampling runs from noise to data")
    ratios = process.noise_ratio(ends)
    if spacing is None:
        spacing = "polynomial" if bool(torch.isfinite(ratios).all()) and ratios[1] > 0 else "uniform"
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    order = float(rho) if rho is not None else 7.0 if spacing == "polynomial" else 1.0
    if not 0 < order < math.inf:
        raise ValueError(f"rho must be above 0, got {rho}")
    place = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if spacing == "uniform":
        times = ends[0] + place * (ends[1] - ends[0])
    else:
        if not bool(torch.isfinite(ratios).all()) or not ratios[1] > 0:
            raise ValueError(
                f"spacing {spacing!r} needs noise and data at both ends, but sigma / alpha runs from {ratios[0]:g} to "
                f"{ratios[1]:g}: give start below {first:g} or end above {last:g}, or take spacing='uniform'"
            )
        times = process.time_of(-_ratios(ratios[0], ratios[1], place, spacing, order).log())
    times[0], times[-1] = ends
    if bool((times.diff() >= 0).any()):
        raise ValueError(
            f"spacing {spacing!r} does not descend in {steps} steps from {first:g} to {last:g}: the ends are too "
            "close, take another spacing"
        )
    return times


def check_grid(times: Tensor, process: Process) -> Tensor:
    """Times given by a user, once they are known to descend strictly inside the process.

    Raises:
        ValueError: fewer than two times, not one axis, outside the process, or not strictly descending.
    """
    times = process.check_times(times, "times")
    if times.dim() != 1 or len(times) < 2:
        raise ValueError(f"times must be one axis of at least two times, got shape {tuple(times.shape)}")
    rises = (times.diff() >= 0).nonzero()
    if len(rises):
        where = int(rises[0])
        raise ValueError(
            f"times must descend strictly from noise to data, got {times[where]:g} before {times[where + 1]:g} "
            f"at place {where}"
        )
    return times


def _ratios(top: Tensor, bottom: Tensor, place: Tensor, spacing: str, rho: float) -> Tensor:
    """Noise ratios sigma / alpha at every place (0..1)."""
    if spacing == "logsnr":
        return (top.log() + place * (bottom.log() - top.log())).exp()
    if spacing == "polynomial":
        return (top ** (1 / rho) + place * (bottom ** (1 / rho) - top ** (1 / rho))) ** rho
    # A VP process whose B(s) = bm s + bd s^2 / 2 gives the first ratio at s = 1 and the last at s = e.
    e = 1e-3
    bottom_log, top_log = torch.log1p(bottom**2), torch.log1p(top**2)
    bd = 2 * (bottom_log / e - top_log) / (e - 1)
    bm = top_log - bd / 2
    s = (1 + place * (e ** (1 / rho) - 1)) ** rho
    return torch.expm1(bd * s**2 / 2 + bm * s).sqrt()
