"""Coefficients of AMED for several numbers of steps, as they lie in a ``scheduler_config.json``.

Source: arXiv:2312.00094.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from danlu.diffusion.amed import AMED
from danlu.diffusion.amed_steps import check_order
from danlu.diffusion.amed_table import AMEDTable, check_ratios
from danlu.diffusion.grids import time_grid
from danlu.diffusion.hosts import Host
from danlu.diffusion.networks import PassFeatures, guided, home, inner_module, network_of, sample_shape
from danlu.diffusion.process import Process

if TYPE_CHECKING:
    from danlu.diffusion.amed_predictor import Features
    from danlu.diffusion.amed_training import AMEDRecipe
    from danlu.diffusion.attachment import Attachment

Entry = dict[str, list[float]]
_NAMES = ("r", "c", "a", "times", "ratios")


class TrainedSteps:
    """The side of a scheduler that keeps coefficients in its config."""

    config: Any
    host: Host
    attachment: Attachment | None
    register_to_config: Callable[..., None]

    @property
    def trained_steps(self) -> list[int]:
        """Numbers of steps that there are coefficients for."""
        return sorted(int(steps) for steps in self.config.coefficients or {})

    def grid(self, steps: int) -> Tensor:
        """Times of the process at the ends of ``steps`` intervals (steps + 1,), from noise to data.

        Numbers of steps with coefficients keep the times that these were trained for; the others are spaced by
        ``schedule``.

        Raises:
            ValueError: steps below 1, coefficients for another process, or another number than an attached solver has.
        """
        host, config = self.host, self.config
        if self.attachment is not None:
            times = self.attachment.solver.times
            if steps != len(times) - 1:
                raise ValueError(
                    f"num_inference_steps must be {len(times) - 1}, which the attached predictor was trained for, got "
                    f"{steps}: detach it, or attach one for {steps} steps"
                )
            return times
        entry = (config.coefficients or {}).get(str(steps))
        if entry is not None:
            return times_of(entry, host.process)
        start, end = (
            default if ratio is None else float(host.process.time_of(-torch.tensor(ratio, dtype=torch.float64).log()))
            for ratio, default in ((config.ratio_max, host.start), (config.ratio_min, host.end))
        )
        return time_grid(host.process, steps, config.schedule, config.schedule_rho, start, end)

    def table_for(self, times: Tensor, ratios: Tensor) -> AMEDTable:
        """The coefficients for intervals with these ends; beside a predictor they only name its calls.

        Raises:
            ValueError: there are none, and ``untrained`` is ``refuse``.
        """
        steps = len(ratios) - 1
        if self.attachment is not None:
            solver = self.attachment.solver
            if len(times) != len(solver.times) or not torch.allclose(times, solver.times, rtol=1e-5):
                raise ValueError(f"times must be those of the attached predictor, {shown(solver.times)}")
            return solver.average or AMEDTable((0.5,) * steps)
        entry = (self.config.coefficients or {}).get(str(steps))
        if entry is not None and torch.allclose(times, times_of(entry, self.host.process), rtol=1e-5, atol=1e-6):
            return table_of(entry, steps)
        if self.config.untrained == "refuse":
            there = f"those of {', '.join(map(str, self.trained_steps))}" if self.trained_steps else "none"
            what = "steps" if entry is None else f"steps ending at noise ratios {shown(ratios)}"
            raise ValueError(
                f"no coefficients for {steps} {what} (there are {there}). Train them with scheduler.train(pipeline, "
                f"num_inference_steps={steps}), or choose the untrained midpoints with "
                "AMEDScheduler.from_config(config, untrained='midpoint')"
            )
        return AMEDTable((0.5,) * steps)

    def store(self, solver: AMED) -> None:
        """Put a solver's coefficients into the config, beside those of other numbers of steps.

        Args:
            solver: a static one, or one with averages over its samples.

        Raises:
            ValueError: it is for another process, base, order or first step, or has no averages.
        """
        self.check_solver(solver)
        entry = entry_of(solver)
        # What a config lists as left at its default, from_config leaves out.
        left = [name for name in self.config.get("_use_default_values", []) if name != "coefficients"]
        coefficients = {**(self.config.coefficients or {}), str(len(entry["r"])): entry}
        self.register_to_config(coefficients=coefficients, _use_default_values=left)

    def check_solver(self, solver: AMED) -> None:
        """Refuse a solver that was trained for another process, base, order or first step than this scheduler's."""
        _check_solver(solver, self.host.process, self.config)

    def train(
        self,
        model: Any,
        num_inference_steps: int,
        *,
        conditions: Mapping[str, Any] | None = None,
        unconditional: Mapping[str, Any] | None = None,
        guidance_scale: float = 1.0,
        feature: str | Features = "sample",
        shape: Sequence[int] | None = None,
        recipe: AMEDRecipe | None = None,
        **options: Any,
    ) -> AMED:
        """Train coefficients for a number of steps and store them. No data are needed, and the network stays as it is.

        Args:
            model: a pipeline, or its network.
            num_inference_steps: intervals.
            conditions: keyword arguments of the network, such as ``encoder_hidden_states``; tensors of one row serve
                all samples.
            unconditional: those of the other pass of guidance.
            guidance_scale: as in the pipeline; 1 for none.
            feature: what a predictor reads; see `attach`.
            shape: of one sample; the network's config tells it by default.
            recipe: how to train. By default static coefficients with this scheduler's base, first step and spacing.
            **options: of `train_amed`.

        Returns:
            The solver. One with a predictor (``static=False`` in the recipe) is for `attach`; its averages are stored.

        Raises:
            ValueError: a recipe with another base, order or first step than this scheduler's, or wrong conditions.
        """
        from danlu.diffusion.amed_training import AMEDRecipe, train_amed

        config, network = self.config, network_of(model)
        ours = {"base": config.base, "order": config.base_order, "afs": config.afs}
        if recipe is None:
            recipe = AMEDRecipe(**ours, static=True, spacing=config.schedule)
        wrong = [name for name, value in ours.items() if getattr(recipe, name) != value]
        if wrong:
            raise ValueError(
                f"recipe must have {wrong[0]}={ours[wrong[0]]!r} like the scheduler, got {getattr(recipe, wrong[0])!r}"
            )
        denoiser = self.host.denoiser(guided(network, conditions, unconditional, guidance_scale))
        features = feature
        if isinstance(feature, str) and feature != "sample":
            features = PassFeatures(inner_module(network, feature))
        try:
            with home(network) as device:
                solver = train_amed(
                    denoiser,
                    sample_shape(network) if shape is None else shape,
                    num_inference_steps,
                    recipe=recipe,
                    features=features,
                    **{"device": device, **options},
                )
        finally:
            if isinstance(features, PassFeatures):
                features.remove()
        self.store(solver)
        return solver


def entry_of(solver: AMED) -> Entry:
    """What is written of a solver: its (average) coefficients, and the intervals that they are for.

    Raises:
        ValueError: a predictor without averages.
    """
    table = solver.static().coefficients
    assert isinstance(table, AMEDTable)
    ends = {"times": solver.times.tolist(), "ratios": solver.ratios.tolist()}
    return {"r": list(table.r), "c": list(table.c), "a": list(table.a), **ends}


def table_of(entry: Mapping[str, Sequence[float]], steps: int | str) -> AMEDTable:
    """The coefficients of an entry.

    Raises:
        ValueError: something is missing, or of another length than the number of steps asks for.
    """
    missing = [name for name in _NAMES if name not in entry]
    if missing:
        raise ValueError(f"coefficients of {steps} steps lack {', '.join(missing)}")
    table = AMEDTable(tuple(entry["r"]), tuple(entry["c"]), tuple(entry["a"]))
    ends = {len(check_ratios(entry["ratios"])), len(entry["times"])}
    if str(len(table)) != str(steps) or ends != {len(table) + 1}:
        raise ValueError(
            f"coefficients of {steps} steps must hold {steps} numbers each and one more of times and ratios, got "
            f"{len(table)} and {', '.join(map(str, sorted(ends)))}"
        )
    return table


def times_of(entry: Mapping[str, Sequence[float]], process: Process) -> Tensor:
    """The times that an entry is for.

    Raises:
        ValueError: it was trained for another process.
    """
    times, ratios = (torch.tensor(entry[name], dtype=torch.float64) for name in ("times", "ratios"))
    check_process(process, times, ratios)
    return times


def check_process(process: Process, times: Tensor, ratios: Tensor) -> None:
    """Refuse times at which a process does not have these noise ratios."""
    inside = bool(((times >= process.t_min - 1e-6) & (times <= process.t_max + 1e-6)).all())
    found = process.noise_ratio(times)
    if not inside or not torch.allclose(found, ratios, rtol=1e-4, atol=0):
        raise ValueError(
            f"the coefficients of {len(ratios) - 1} steps were trained for another process: there sigma / alpha at "
            f"times {shown(times)} was {shown(ratios)}, for this {type(process).__name__} it is {shown(found)}"
        )


def _check_solver(solver: AMED, process: Process, config: Any) -> None:
    """Refuse a solver for another process, or with another base, order or first step than a scheduler's config.

    Raises:
        ValueError: what differs.
    """
    check_process(process, solver.times, solver.ratios)
    ours = {"base": config.base, "order": check_order(config.base, config.base_order), "afs": config.afs}
    theirs = {"base": solver.base, "order": check_order(solver.base, solver.order), "afs": solver.afs}
    wrong = [f"{name}={theirs[name]!r} (here {ours[name]!r})" for name in ours if ours[name] != theirs[name]]
    if wrong:
        raise ValueError(f"the solver was trained with {', '.join(wrong)}: make the scheduler with the same")


def shown(values: Tensor) -> str:
    """Numbers for a message."""
    return "[" + ", ".join(f"{value:.4g}" for value in values.tolist()) + "]"
