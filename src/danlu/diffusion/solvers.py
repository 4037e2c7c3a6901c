"""Sampling: from noise to data by any solver, on any process, prediction and times; model calls are counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from danlu.diffusion.grids import Spacing, check_grid, time_grid
from danlu.diffusion.multistep import IPNDM, HostScheduler
from danlu.diffusion.processes import Process, per_sample
from danlu.diffusion.steps import DDIM, Euler, EulerMaruyama, Heun, Midpoint, Solver, Walk, draw_noise, home_of
from danlu.diffusion.targets import Denoiser, Prediction
from danlu.progress import watched

__all__ = [
    "DDIM",
    "IPNDM",
    "SOLVERS",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "HostScheduler",
    "Midpoint",
    "SampleOutput",
    "Solver",
    "Walk",
    "endpoint_error",
    "find_solver",
    "sample",
]

#: Solvers by name.
SOLVERS: Mapping[str, Solver] = {
    "ddim": DDIM(),
    "ancestral": DDIM(eta=1),
    "euler": Euler(),
    "euler-maruyama": EulerMaruyama(),
    "heun": Heun(),
    "dpm2": Midpoint(),
    "ipndm": IPNDM(),
    "dpm++2m": HostScheduler("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "dpm++3m": HostScheduler("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "unipc": HostScheduler("UniPCMultistepScheduler"),
}


@dataclass(frozen=True)
class SampleOutput:
    """What a sampling run gave.

    Args:
        samples: (batch, ...) at the last time, or the data predicted there.
        evaluations: calls of the model, counted.
        times: at which the solver stopped (steps + 1,), float64.
        trajectory: samples at each of these times (steps + 1, batch, ...), if asked for.
    """

    samples: Tensor
    evaluations: int
    times: Tensor
    trajectory: Tensor | None = None


def find_solver(solver: str | Solver) -> Solver:
    """A solver by name, or the solver itself.

    Raises:
        ValueError: unknown name.
        TypeError: neither a name nor a solver.
    """
    if isinstance(solver, str):
        if solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)} or a Solver, got {solver!r}")
        return SOLVERS[solver]
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a name or a Solver such as DDIM(), got {type(solver).__name__}")
    return solver


def sample(
    model: Callable[..., Any] | Denoiser,
    process: Process | None = None,
    prediction: Prediction | None = None,
    *,
    solver: str | Solver = "ddim",
    steps: int | None = None,
    spacing: Spacing | None = None,
    times: Tensor | None = None,
    shape: Sequence[int] | None = None,
    noise: Tensor | None = None,
    start: Tensor | None = None,
    seed: int | torch.Generator | None = None,
    denoise: bool = False,
    analytic_first: bool = False,
    trajectory: bool = False,
    gradient: bool = False,
    callback: Callable[[int, float, Tensor], object] | None = None,
    progress: str | None = "sampling",
) -> SampleOutput:
    """Samples of a diffusion model.

    The state is held in float32, or in float64 if the noise is; a module with weights of another type gets samples of
    its type, and times in float32 or better.

    Args:
        model: called as ``model(x, t)`` with x (batch, ...) and t (batch,), in the process's own time; or a `Denoiser`,
            which knows process and prediction.
        process: that the model was trained with.
        prediction: what the model predicts, ``epsilon`` unless given.
        solver: a name of `SOLVERS`, or a solver such as ``DDIM(eta=0.5)``.
        steps: intervals, at least 1; instead of ``times``.
        spacing: of the times, see `time_grid`; only with ``steps``.
        times: strictly decreasing times from noise to data, at least two; a trained solver brings its own.
        shape: (batch, ...) of the samples; noise is drawn by ``seed``.
        noise: standard normal noise (batch, ...) instead of a shape; it is scaled by sigma at the first time.
        start: samples (batch, ...) that belong to the first time, instead of noise: to go on from a noised picture.
        seed: a seed or a generator, of the first noise and of stochastic solvers.
        denoise: return the data that the model predicts at the last time, by one more call, instead of the sample
            there.
        analytic_first: take the first prediction from the exact answer for data of mean 0 and variance 1 and save its
            call: good where hardly any data is left.
        trajectory: also return the samples at every time.
        gradient: keep the graph, to differentiate through the whole run.
        callback: called after each step with the number of steps done, the time reached and the samples.
        progress: label of the progress bar; None for none.

    Returns:
        Samples with the counted calls and the times.

    Raises:
        ValueError: arguments that exclude each other, a shape, time or prediction that cannot be.
        TypeError: a model, process, solver or tensor that is none.
        FloatingPointError: the model or a step gave a value that is not finite; names the step and the time.

    Source: Scientific Spaces archives 9209 and 9228.
    """
    denoiser = as_denoiser(model, process, prediction)
    chosen = find_solver(solver)
    if steps is None and times is None:
        # A trained solver knows the only times that it can run on.
        times = getattr(chosen, "times", None)
    if (steps is None) == (times is None):
        raise ValueError("give either steps or times, and not both")
    if steps is not None:
        grid = time_grid(denoiser.process, steps, spacing)
    elif spacing is not None:
        raise ValueError("spacing goes with steps: times already say where to stop")
    else:
        grid = check_grid(torch.as_tensor(times), denoiser.process)
    grid = grid.cpu()
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    x = _first(denoiser, grid[0], shape, noise, start, generator)
    walk = Walk(denoiser, grid, generator, analytic_first)
    kept = [x]
    with torch.set_grad_enabled(gradient):
        moves = chosen.integrate(walk, x)
        places = range(len(grid) - 1)
        for place in places if progress is None else watched(places, progress):
            x = next(moves)
            reached = float(grid[place + 1])
            walk.model.check(x, "the sample", reached)
            if trajectory:
                kept.append(x)
            if callback is not None:
                callback(place + 1, reached, x)
        if denoise and float(denoiser.process.sigma(grid[-1])) > 0:
            x, _ = walk.components(x, grid[-1])
    return SampleOutput(x, walk.model.calls, grid, torch.stack(kept) if trajectory else None)


def endpoint_error(
    model: Denoiser,
    solvers: Mapping[str, str | Solver],
    evaluations: Sequence[int],
    noise: Tensor,
    reference: Tensor,
    spacing: Spacing | None = None,
) -> dict[str, dict[int, float]]:
    """How far solvers end from where the exact solution ends, by the calls of the model they were given.

    Args:
        model: with its process.
        solvers: by the name that the result has for them.
        evaluations: budgets of calls. A solver takes as many whole steps as the budget holds.
        noise: standard normal noise (batch, ...) that all start from.
        reference: where the exact solution ends (batch, ...).
        spacing: of the times.

    Returns:
        For each solver the mean distance (Euclidean, over the batch) by the calls it really took, a budget that
        does not hold one step left out.

    Raises:
        ValueError: reference and noise differ in shape, or a budget below 1.
    """
    if reference.shape != noise.shape:
        raise ValueError(f"reference must have the shape of noise {tuple(noise.shape)}, got {tuple(reference.shape)}")
    if any(budget < 1 for budget in evaluations):
        raise ValueError(f"evaluations must be at least 1, got {min(evaluations)}")
    errors: dict[str, dict[int, float]] = {}
    for name, kind in solvers.items():
        solver = find_solver(kind)
        errors[name] = {}
        for budget in evaluations:
            if budget >= solver.calls:
                output = sample(
                    model, solver=solver, steps=budget // solver.calls, spacing=spacing, noise=noise, progress=None
                )
                distance = (output.samples - reference).flatten(1).norm(dim=1).mean()
                errors[name][output.evaluations] = float(distance)
    return errors


def as_denoiser(
    model: Callable[..., Any] | Denoiser, process: Process | None, prediction: Prediction | None
) -> Denoiser:
    """The model with its process, given in one piece or in parts.

    Raises:
        ValueError: a `Denoiser` together with a process or a prediction, or a model without a process.
    """
    if isinstance(model, Denoiser):
        if process is not None or prediction is not None:
            raise ValueError("process and prediction must not be given with a Denoiser, which has its own")
        return model
    if process is None:
        raise ValueError("give the process that the model was trained with, such as VP() or EDM()")
    return Denoiser(model, process, prediction or "epsilon")


def _first(
    denoiser: Denoiser,
    time: Tensor,
    shape: Sequence[int] | None,
    noise: Tensor | None,
    start: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Samples at the first time."""
    if sum(value is not None for value in (shape, noise, start)) != 1:
        raise ValueError("give exactly one of shape, noise and start")
    if shape is not None:
        if len(shape) < 2 or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in shape):
            raise ValueError(f"shape must be (batch, ...) of at least two positive integers, got {tuple(shape)}")
        if generator is None:
            raise ValueError("give a seed, or the noise itself: shape alone says nothing about the noise to draw")
        home = home_of(denoiser.model)
        noise = draw_noise(tuple(shape), generator, torch.float32, torch.device("cpu") if home is None else home[0])
    name, given = ("start", start) if start is not None else ("noise", noise)
    if not isinstance(given, Tensor) or not given.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {getattr(given, 'dtype', type(given).__name__)}")
    if given.dim() < 2 or len(given) < 1:
        raise ValueError(f"{name} must be (batch, ...) with at least one sample, got shape {tuple(given.shape)}")
    given = given if given.dtype == torch.float64 else given.float()
    return given if start is not None else per_sample(denoiser.process.sigma(time), given) * given
