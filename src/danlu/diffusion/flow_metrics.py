"""How straight a flow is, what its transport costs, and how its samples change with the number of steps.

Source: Scientific Spaces archive 9497; arXiv:2209.03003.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from danlu.diffusion.flow import RK4, VelocityModel
from danlu.diffusion.processes import RectifiedFlow
from danlu.diffusion.solvers import sample
from danlu.diffusion.steps import Solver
from danlu.diffusion.targets import Denoiser


def straightness(model: VelocityModel, x1: Tensor, steps: int = 50) -> Tensor:
    """How far a flow's velocity strays from the straight line between both ends of its own trajectory.

    ``S = int_0^1 |(x_1 - x_0) - v(x_t, t)|^2 dt`` along the ODE from each ``x_1``. It is 0 exactly if one Euler step is
    exact; over the rounds of a reflow the smallest S falls like one over their number.

    Args:
        model: velocities ``model(x, t)``, t in 0..1.
        x1: of the prior (batch, ...); the memory taken is that of ``steps`` times it.
        steps: intervals of Runge-Kutta steps and of the trapezoidal rule; the model is called five times in each.

    Returns:
        S of each trajectory (batch,), summed over elements; its mean is the S of the flow.

    Raises:
        ValueError: steps below 1.

    Source: Scientific Spaces archive 9497; arXiv:2209.03003.
    """
    denoiser = Denoiser(model, RectifiedFlow(), "velocity")
    output = sample(denoiser, solver=RK4(), steps=steps, noise=x1, trajectory=True, progress=None)
    points = output.trajectory
    if points is None:
        raise RuntimeError("a trajectory was asked for: there must be one")
    line = points[0] - points[-1]
    total = torch.zeros(len(x1), dtype=line.dtype, device=line.device)
    with torch.no_grad():
        for place, (x, t) in enumerate(zip(points, output.times, strict=True)):
            share = (0.5 if place in (0, steps) else 1.0) / steps
            total += share * (line - denoiser.predict(x, t)).square().flatten(1).sum(1)
    return total


def transport_cost(x0: Tensor, x1: Tensor, cost: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Mean cost of carrying ``x_1`` to ``x_0``; a reflow never raises it, whatever convex cost is taken.

    Args:
        x0: data (batch, ...).
        x1: of the prior, the shape of ``x0``.
        cost: convex function of the differences, (batch, ...) to (batch,); the squared length unless given.

    Returns:
        0-d, in float32 or better.

    Raises:
        ValueError: shapes that differ.

    Source: arXiv:2209.03003.
    """
    if x0.shape != x1.shape:
        raise ValueError(f"x1 must have the shape of x0 {tuple(x0.shape)}, got {tuple(x1.shape)}")
    difference = x1.to(torch.promote_types(x1.dtype, torch.float32)) - x0
    return difference.square().flatten(1).sum(1).mean() if cost is None else cost(difference).mean()


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """``2 E|x - y| - E|x - x'| - E|y - y'|`` of two sets of samples: 0 for equal distributions, else above.

    Args:
        x: samples (count, ...); all pairs are compared, a sample with itself included.
        y: samples (count, ...), of any number.

    Returns:
        0-d.

    Raises:
        ValueError: samples of different shapes.
    """
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"y must have samples of shape {tuple(x.shape[1:])}, got {tuple(y.shape[1:])}")
    x, y = x.flatten(1), y.flatten(1)
    return 2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()


def nfe_curve(
    model: VelocityModel,
    x1: Tensor,
    measure: Callable[[Tensor], Tensor | float],
    steps: Sequence[int] = (1, 2, 4, 8),
    solver: str | Solver = "euler",
) -> dict[int, float]:
    """What a measure says of a flow's samples, by the calls of the model that they took.

    Args:
        model: velocities ``model(x, t)``, t in 0..1.
        x1: of the prior (batch, ...), the same for all; not the noise that the model was trained on.
        measure: of the samples (batch, ...), such as their `energy_distance` to the data.
        steps: numbers of steps.
        solver: a name of ``SOLVERS`` or a solver.

    Returns:
        The measure by the number of calls.

    Raises:
        ValueError: steps below 1, or an unknown solver.

    Source: arXiv:2209.03003.
    """
    curve = {}
    for count in steps:
        output = sample(model, RectifiedFlow(), "velocity", solver=solver, steps=count, noise=x1, progress=None)
        curve[output.evaluations] = float(measure(output.samples))
    return curve
