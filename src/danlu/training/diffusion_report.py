"""Sampling of a trained image model, and how far each solver ends from the exact solution by its calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from danlu.diffusion.grids import Spacing
from danlu.diffusion.solvers import SampleOutput, endpoint_error, sample
from danlu.diffusion.targets import Denoiser
from danlu.training.diffusion_model import ImageModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from danlu.diffusion.amed import AMED

#: Budgets of calls, and steps of the reference.
BUDGETS = (4, 6, 8, 12, 16, 24, 32)
REFERENCE_STEPS = 150
#: Solvers that are compared besides the one that was asked for; those that draw noise have no endpoint.
COMPARED = ("ddim", "heun", "dpm++2m", "ipndm")


def sample_images(
    model: ImageModel,
    count: int,
    *,
    classes: Sequence[str] = (),
    guidance: float = 1.0,
    solver: str | AMED = "ddim",
    steps: int = 20,
    spacing: Spacing | None = None,
    seed: int = 0,
) -> tuple[SampleOutput, Denoiser, Tensor]:
    """Sample images.

    Args:
        model: trained.
        count: images, at least 1.
        classes: names, in turn; all of them where the model has classes and none is named.
        guidance: 1 samples the model; more is more typical of the class.
        solver: a name of ``danlu.diffusion.solvers.SOLVERS``, or the one of `trained_amed`, which has its own times.
        steps: of a named solver.
        spacing: of its times.
        seed: of the noise.

    Returns:
        The output of the sampler, the denoiser of these classes, and the noise (count, channels, side, side).

    Raises:
        ValueError: a number, class or solver that cannot be.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    labels = model.labels(classes, count)
    if guidance != 1 and labels is None:
        raise ValueError(f"guidance {guidance:g} needs a model that was trained with classes")
    noise = torch.randn((count, *model.shape), generator=torch.Generator().manual_seed(seed)).to(model.unet.device)
    denoiser = model.denoiser(labels, guidance)
    if not isinstance(solver, str):
        return sample(denoiser, solver=solver, times=solver.times, noise=noise), denoiser, noise
    return sample(denoiser, solver=solver, steps=steps, spacing=spacing, noise=noise, seed=seed), denoiser, noise


def trained_amed(model: ImageModel, steps: int, seed: int = 0) -> AMED:
    """The AMED solver of a model, trained on samples of no class: its times serve all classes.

    The training is short: one number for each interval instead of a network, and few trajectories.
    """
    from danlu.diffusion.amed_training import AMEDRecipe, train_amed

    recipe = AMEDRecipe(static=True, extra=9, trajectories=64, batch=32, endpoint_iterations=60)
    return train_amed(model.denoiser(), model.shape, steps, recipe=recipe, held_out=16, seed=seed)


def solver_errors(
    denoiser: Denoiser,
    noise: Tensor,
    solvers: Sequence[str],
    spacing: Spacing | None = None,
    amed: AMED | None = None,
) -> dict[str, dict[int, float]]:
    """Mean distance of each solver's end from the exact end, by calls of the model.

    Args:
        denoiser: for as many samples as there is noise.
        noise: standard normal (images, channels, side, side).
        solvers: names.
        spacing: of the times, but the reference's.
        amed: one more solver, with its own times.

    Returns:
        Distances (Euclidean, over an image in -1..1) by solver and calls. The exact end is that of Heun's method with
        150 steps.
    """
    reference = sample(
        denoiser, solver="heun", steps=REFERENCE_STEPS, noise=noise, progress="reference for the solvers"
    ).samples
    errors: dict[str, dict[int, float]] = {}
    for name in solvers:
        errors |= endpoint_error(denoiser, {name: name}, BUDGETS, noise, reference, spacing)
    if amed is not None:
        ends = sample(denoiser, solver=amed, times=amed.times, noise=noise, progress=None)
        errors["amed"] = {ends.evaluations: float((ends.samples - reference).flatten(1).norm(dim=1).mean())}
    return errors


def draw_errors(errors: Mapping[str, Mapping[int, float]]) -> Figure:
    """Error by calls, one line for each solver.

    Args:
        errors: of `solver_errors`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for name, values in errors.items():
        axes.plot(list(values), list(values.values()), marker="o", markersize=3 if len(values) > 1 else 8, label=name)
    axes.set(xscale="log", yscale="log", xlabel="calls of the network", ylabel="distance from the exact solution")
    axes.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
