"""Training of AMED-Solver and AMED-Plugin: a few minutes, no data, any model that lets gradients through.

Source: Scientific Spaces archive 9881; arXiv:2312.00094.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from danlu.diffusion.amed import AMED, default_ends, time_of_ratio
from danlu.diffusion.amed_predictor import AMEDPredictor, Features
from danlu.diffusion.amed_recipe import AMEDRecipe
from danlu.diffusion.amed_student import Student
from danlu.diffusion.amed_table import AMEDTable
from danlu.diffusion.grids import Spacing, time_grid
from danlu.diffusion.multistep import IPNDM
from danlu.diffusion.process import Process, per_sample
from danlu.diffusion.solvers import as_denoiser, sample
from danlu.diffusion.steps import CountedModel, Heun, Solver, draw_noise, home_of
from danlu.diffusion.targets import Denoiser, Prediction
from danlu.progress import watched

__all__ = ["AMEDRecipe", "train_amed"]

T = TypeVar("T")

logger = logging.getLogger("danlu.diffusion")

#: Spacings by which the best iPNDM of the same budget is looked for.
_RIVAL_SPACINGS: tuple[Spacing, ...] = ("polynomial", "logsnr", "time_uniform")
_REFINED = 4


def train_amed(
    model: Callable[..., Any] | Denoiser,
    shape: Sequence[int],
    steps: int,
    process: Process | None = None,
    prediction: Prediction | None = None,
    *,
    recipe: AMEDRecipe | None = None,
    features: str | Features = "sample",
    held_out: int = 256,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: str | None = "training AMED",
) -> AMED:
    """Train a solver of few steps for a model. The model stays as it is; no data are needed.

    Args:
        model: called as ``model(x, t)``, or a `Denoiser`; gradients must flow from its output to x and t. It should be
            in evaluation mode.
        shape: of one sample.
        steps: intervals; the solver takes ``2 * steps`` calls, one less with the analytical first step.
        process: that the model was trained with.
        prediction: what it predicts, ``epsilon`` unless given.
        recipe: how to train, ``AMEDRecipe()`` unless given; `AMEDRecipe.published` is the paper's.
        features: what the predictor reads: ``sample``, the predicted data, or a callable such as `Captured`.
        held_out: samples for the errors that are reported; they are not trained on.
        seed: of noise, weights and batches.
        device: to train on; that of the model's weights unless given.
        progress: label of the progress bars; None for none.

    Returns:
        The trained solver. Its ``errors`` are mean Euclidean distances of ``x / alpha``, over samples that were not
        trained on, from where a teacher of four times as many points ends: ``student``, ``static`` (its averages),
        ``untrained``, ``teacher``, and ``ipndm``, the best of six iPNDM-4 with the same calls (three spacings, with and
        without an analytical first step).

    Raises:
        ValueError: a shape or number that cannot be.
        RuntimeError: no gradient flows through the model.

    Source: Scientific Spaces archive 9881; arXiv:2312.00094.
    """
    recipe = recipe or AMEDRecipe()
    denoiser = as_denoiser(model, process, prediction)
    shape = _checked_shape(shape)
    if isinstance(held_out, bool) or held_out < 1:
        raise ValueError(f"held_out must be at least 1, got {held_out}")
    home = home_of(denoiser.model)
    place = torch.device(device) if device is not None else home[0] if home is not None else torch.device("cpu")
    generator = torch.Generator().manual_seed(seed)
    first, last = default_ends(denoiser.process)
    times = time_grid(denoiser.process, steps, recipe.spacing, start=first, end=last)
    _check_gradients(denoiser, times, torch.randn((2, *shape), generator=generator).to(place))

    def noises(count: int) -> list[Tensor]:
        """Noise in batches."""
        parts = [min(recipe.batch, count - begin) for begin in range(0, count, recipe.batch)]
        return [draw_noise((part, *shape), generator, torch.float32, place) for part in parts]

    held = noises(held_out)
    teacher = _teacher(denoiser, recipe, times, 1)
    fine = _teacher(denoiser, recipe, times, _REFINED)
    reference = torch.cat([fine(noise)[-1] for noise in _shown(held, progress, "reference")])
    states = torch.cat([teacher(noise) for noise in _shown(noises(recipe.trajectories), progress, "teacher")], 1)

    predictor = AMEDPredictor(None, recipe.scale_c, recipe.scale_a, seed).to(place)
    ratios = denoiser.process.noise_ratio(times)
    student = Student(denoiser, ratios, predictor, recipe.base, recipe.order, recipe.afs, features)
    if recipe.init == "residual":
        found = student.search(states[:, : 2 * recipe.batch])
        student.predictor = AMEDPredictor(found, recipe.scale_c, recipe.scale_a, seed).to(place)

    def error(ends: Callable[[Tensor], Tensor]) -> float:
        """Mean distance from the reference."""
        reached = torch.cat([ends(noise) for noise in held])
        return float((reached - reference).flatten(1).norm(dim=1).mean())

    start = _solver(student, recipe, states, shape)
    untrained = error(partial(_ends, denoiser, start, start.times, False))
    weights = [
        weight for name, weight in student.predictor.named_parameters() if name == "offsets" or not recipe.static
    ]
    _train_intervals(student, weights, states, recipe, generator, progress)
    _train_endpoint(student, weights, states, recipe, generator, progress)
    student.predictor.eval().requires_grad_(False)
    trained = _solver(student, recipe, states, shape)
    errors = {
        "student": error(partial(_ends, denoiser, trained, trained.times, False)),
        "static": error(partial(_ends, denoiser, trained.static(), trained.times, False)),
        "untrained": untrained,
        "teacher": error(lambda noise: teacher(noise)[-1]),
        "ipndm": min(error(run) for run in _rivals(denoiser, trained.evaluations, first, last)),
    }
    if errors["teacher"] * 3 > untrained:
        logger.warning(
            "the teacher's error %.3g is not below a third of the untrained solver's %.3g: it has little to teach; "
            "raise extra above %d",
            errors["teacher"],
            untrained,
            recipe.extra,
        )
    logger.info("AMED with %d calls: %s", trained.evaluations, errors)
    return replace(trained, errors=errors)


def _teacher(denoiser: Denoiser, recipe: AMEDRecipe, times: Tensor, finer: int) -> Callable[[Tensor], Tensor]:
    """Runs the teacher from noise, with times some times as dense: z at the times (steps + 1, batch, ...)."""
    every = finer * (recipe.extra + 1)
    first, last = float(times[0]), float(times[-1])
    grid = time_grid(denoiser.process, every * (len(times) - 1), recipe.spacing, start=first, end=last)
    solver: Solver = IPNDM() if recipe.teacher == "ipndm" else Heun()

    def run(noise: Tensor) -> Tensor:
        output = sample(denoiser, solver=solver, times=grid, noise=noise, trajectory=True, progress=None)
        assert output.trajectory is not None
        alphas = per_sample(denoiser.process.alpha(times), output.trajectory)
        return output.trajectory[::every] / alphas

    return run


def _ends(denoiser: Denoiser, solver: Solver, times: Tensor, analytic: bool, noise: Tensor) -> Tensor:
    """Z where a solver comes out."""
    x = sample(denoiser, solver=solver, times=times, noise=noise, analytic_first=analytic, progress=None).samples
    return x / per_sample(denoiser.process.alpha(times[-1]), x)


def _rivals(denoiser: Denoiser, calls: int, first: float, last: float) -> Iterator[Callable[[Tensor], Tensor]]:
    """iPNDM-4 with a number of calls, on all spacings, with and without an analytical first step."""
    for analytic in (False, True):
        for spacing in _RIVAL_SPACINGS:
            times = time_grid(denoiser.process, calls + analytic, spacing, start=first, end=last)
            yield partial(_ends, denoiser, IPNDM(), times, analytic)


def _solver(student: Student, recipe: AMEDRecipe, states: Tensor, shape: tuple[int, ...]) -> AMED:
    """The solver that the student is now, with its averages over some of the trajectories."""
    process = student.walk.process
    times = time_of_ratio(process, student.ratios().detach())
    average = AMEDTable(*(tuple(values.tolist()) for values in student.averages(states[0, : recipe.batch])))
    table = recipe.static
    return AMED(
        process,
        times,
        average if table else copy.deepcopy(student.predictor),
        recipe.base,
        recipe.order,
        recipe.afs,
        student.features,
        None if table else shape,
        None if table else average,
    )


def _train_intervals(
    student: Student,
    weights: list[nn.Parameter],
    states: Tensor,
    recipe: AMEDRecipe,
    generator: torch.Generator,
    progress: str | None,
) -> None:
    """The published training: one step for each interval towards the teacher's state at its end."""
    descent = torch.optim.Adam(weights, recipe.learning_rate)
    for chosen in _batches(states, recipe, recipe.iterations, generator, progress, "intervals"):
        for distance in student.by_interval(states[:, chosen]):
            _set_gradients(distance.mean(), weights)
            descent.step()


def _train_endpoint(
    student: Student,
    weights: list[nn.Parameter],
    states: Tensor,
    recipe: AMEDRecipe,
    generator: torch.Generator,
    progress: str | None,
) -> None:
    """Steps on the whole run towards where the teacher ends, by the distance itself."""
    weights = [*weights, student.shares] if recipe.learn_times else weights
    descent = torch.optim.Adam(weights, recipe.learning_rate)
    total = max(1, recipe.endpoint_iterations)
    schedule = torch.optim.lr_scheduler.LambdaLR(descent, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / total))
    for chosen in _batches(states, recipe, recipe.endpoint_iterations, generator, progress, "whole runs"):
        reached = student(states[0, chosen])
        squares = (reached - states[-1, chosen]).flatten(1).square().sum(1)
        _set_gradients((squares + 1e-12).sqrt().mean(), weights)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        descent.step()
        schedule.step()


def _set_gradients(loss: Tensor, weights: list[nn.Parameter]) -> None:
    """Gradients of the solver's weights alone, the model's are not computed; what is not a number counts as 0."""
    for weight, gradient in zip(weights, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
        weight.grad = None if gradient is None else gradient.nan_to_num(0, 0, 0)


def _batches(
    states: Tensor, recipe: AMEDRecipe, count: int, generator: torch.Generator, progress: str | None, label: str
) -> Iterator[Tensor]:
    """Places of trajectories, in a new order each time that all have been used."""
    order = torch.empty(0, dtype=torch.long)
    for _ in _shown(range(count), progress, label):
        while len(order) < min(recipe.batch, states.shape[1]):
            order = torch.cat([order, torch.randperm(states.shape[1], generator=generator)])
        chosen, order = order[: recipe.batch], order[recipe.batch :]
        yield chosen.to(states.device)


def _shown(values: Sequence[T], progress: str | None, label: str) -> Iterable[T]:
    return values if progress is None else watched(values, f"{progress}: {label}")


def _check_gradients(denoiser: Denoiser, times: Tensor, noise: Tensor) -> None:
    """Refuse a model whose output says nothing about its input to autograd.

    Raises:
        RuntimeError: the output is cut off from the samples.
    """
    t = times[len(times) // 2]
    x = (per_sample(denoiser.process.sigma(t), noise) * noise).requires_grad_()
    told = t.to(noise).expand(len(noise)).clone().requires_grad_()
    output = CountedModel(denoiser.model)(x, told)
    found: tuple[Tensor | None, ...] = (None, None)
    if output.requires_grad:
        found = torch.autograd.grad(output.float().square().sum(), (x, told), allow_unused=True)
    if found[0] is None or not bool(found[0].any()):
        raise RuntimeError(
            "no gradient flows through the model to its samples, and the solver could not learn: call it without "
            "torch.no_grad() and torch.inference_mode(), and without detaching its output"
        )
    if found[1] is None or not bool(found[1].any()):
        logger.warning(
            "no gradient flows through the model to its times (it rounds them?): the middles learn by the samples alone"
        )


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(shape)
    if not shape or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in shape):
        raise ValueError(f"shape must be that of one sample, positive integers without the batch, got {shape}")
    return shape
