"""AMED-Solver and AMED-Plugin as a solver of any process: learned middles of the intervals, for a few model calls.

Source: Scientific Spaces archive 9881; arXiv:2312.00094.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from danlu.diffusion.amed_predictor import FEATURES, AMEDPredictor, Captured, Features, pooled
from danlu.diffusion.amed_steps import AMEDStepper, Base, check_order
from danlu.diffusion.amed_table import AMEDTable, Coefficients, check_length, check_ratios
from danlu.diffusion.grids import check_grid
from danlu.diffusion.process import Process, per_sample
from danlu.diffusion.steps import Solver, Walk

__all__ = ["AMED", "AMEDPredictor", "AMEDTable", "Captured", "pooled"]


@dataclass(frozen=True, eq=False)
class AMED(Solver):
    """A trained solver: coefficients for the intervals of one grid of times of one process.

    ``danlu.sample(model, process, solver=amed, ...)`` runs it with ``amed.evaluations`` calls of the
    model: two for each interval, one less with the analytical first step.

    Args:
        process: that the model was trained with.
        times: strictly decreasing times of the process (intervals + 1,), where noise and data are both left.
        coefficients: an `AMEDTable` (the same for all samples) or an `AMEDPredictor` (by features of each sample).
        base: see `AMEDStepper`.
        order: of the bases that have one.
        afs: whether the first direction is the analytical one.
        features: of a predictor: ``sample``, the data that the model predicts, or a callable such as `Captured`.
        shape: of one sample that the predictor was trained for; None where it does not matter.
        average: coefficients averaged over samples, for pipelines that cannot give each sample a time of its own.
        errors: what training measured, by name.

    Raises:
        ValueError: times at which sigma / alpha is 0 or infinite, another number of coefficients than intervals, an
            unknown base or order.

    Source: Scientific Spaces archive 9881; arXiv:2312.00094.
    """

    process: Process
    times: Tensor
    coefficients: AMEDTable | AMEDPredictor
    base: Base = "amed"
    order: int | None = None
    afs: bool = True
    features: str | Features = "sample"
    shape: tuple[int, ...] | None = None
    average: AMEDTable | None = None
    errors: Mapping[str, float] = field(default_factory=dict)

    calls = 2

    def __post_init__(self) -> None:
        times = check_grid(self.times, self.process).detach().cpu()
        object.__setattr__(self, "times", times)
        check_order(self.base, self.order)
        ratios = check_ratios(self.ratios)
        for table in (self.coefficients, self.average):
            if isinstance(table, AMEDTable):
                check_length(len(table), ratios)
        if isinstance(self.coefficients, AMEDPredictor) and self.coefficients.intervals not in (None, len(times) - 1):
            raise ValueError(
                f"the predictor is for {self.coefficients.intervals} intervals, but {len(times)} times make "
                f"{len(times) - 1}"
            )
        if self.features != "sample" and not callable(self.features):
            raise ValueError(f"features must be 'sample' or a callable, got {self.features!r}")

    @property
    def ratios(self) -> Tensor:
        """Noise ratios sigma / alpha at the times, float64."""
        return self.process.noise_ratio(self.times)

    @property
    def evaluations(self) -> int:
        """Calls of the model in one run."""
        return 2 * (len(self.times) - 1) - int(self.afs)

    def stepper(self) -> AMEDStepper:
        """A new walk from noise to data, for loops that call the model themselves."""
        return AMEDStepper(self.ratios, self.lookup, self.base, self.order, self.afs)

    def static(self) -> AMED:
        """The same solver with its average coefficients for all samples: it needs no features.

        Raises:
            ValueError: no averages are known.
        """
        if isinstance(self.coefficients, AMEDTable):
            return self
        if self.average is None:
            raise ValueError("average must be given to make a predictor static; train_amed measures it")
        return replace(self, coefficients=self.average)

    def lookup(self, interval: int, z: Tensor, epsilon: Tensor | None) -> Coefficients:
        """Coefficients of an interval for samples z, in whose start the model predicted the noise epsilon."""
        if isinstance(self.coefficients, AMEDTable):
            return self.coefficients(interval, z, epsilon)
        return predicted(self.coefficients, self.features, self.ratios, interval, z, epsilon)

    def integrate(self, walk: Walk, x: Tensor) -> Iterator[Tensor]:
        """Two calls in each interval, the first one with `afs` excepted."""
        self._check(walk, x)
        alphas = self.process.alpha(self.times)
        stepper = self.stepper()
        z = stepper.begin(x / per_sample(alphas[0], x))
        for interval, _ in enumerate(walk.intervals):
            while not stepper.done and stepper.interval == interval:
                t = time_of_ratio(self.process, stepper.time)
                _, noise = walk.components(per_sample(self.process.alpha(t), z) * z, t)
                z = stepper.advance(z, noise)
                if walk.model.calls != stepper.calls:
                    raise ValueError("analytic_first must be off: AMED has an analytical first step of its own (afs)")
            yield per_sample(alphas[interval + 1], z) * z

    def save(self, folder: str | Path) -> Path:
        """Write ``amed_config.json``, and ``amed.safetensors`` with the weights of a predictor; returns the folder."""
        from danlu.diffusion.amed_files import write_amed

        return write_amed(self, folder)

    @classmethod
    def load(cls, folder: str | Path, process: Process | None = None, features: str | Features | None = None) -> AMED:
        """Read what `save` wrote.

        Args:
            folder: that it was written to.
            process: to check against the one it was trained for; needed where that has functions or tables of its own.
            features: the callable, if the predictor was trained with one.

        Raises:
            FileNotFoundError: no solver there.
            ValueError: a damaged file, another format, another process, or features missing.
        """
        from danlu.diffusion.amed_files import read_amed

        return read_amed(folder, process, features)

    def _check(self, walk: Walk, x: Tensor) -> None:
        if walk.times.shape != self.times.shape or not torch.allclose(walk.times, self.times, rtol=1e-5, atol=0):
            raise ValueError(
                f"times must be those that the solver was trained for, {_shown(self.times)}, got {_shown(walk.times)}: "
                "pass times=amed.times instead of steps"
            )
        ratios = walk.process.noise_ratio(walk.times)
        if not torch.allclose(ratios, self.ratios, rtol=1e-4, atol=0):
            raise ValueError(
                f"process must be the one that the solver was trained for, {self.process!r}, got {walk.process!r}: "
                f"sigma / alpha at its times is {_shown(ratios)} instead of {_shown(self.ratios)}"
            )
        if isinstance(self.coefficients, AMEDPredictor) and self.shape not in (None, tuple(x.shape[1:])):
            raise ValueError(
                f"samples must have the shape that the predictor was trained for, {self.shape}, got "
                f"{tuple(x.shape[1:])}: train again, or take amed.static()"
            )


def predicted(
    predictor: AMEDPredictor,
    features: str | Features,
    ratios: Tensor,
    interval: int,
    z: Tensor,
    epsilon: Tensor | None,
) -> Coefficients:
    """Coefficients by a predictor: it sees zeros where the analytical first step saved the call."""
    if epsilon is None:
        seen = torch.zeros(len(z), FEATURES, device=z.device)
    else:
        data = (z - per_sample(ratios[interval], z) * epsilon).detach()
        seen = pooled(data if isinstance(features, str) else features(data))
        if len(seen) != len(z):
            raise ValueError(f"features must have one row for each of {len(z)} samples, got {len(seen)}")
    return predictor(interval, seen, ratios[interval], ratios[interval + 1])


def time_of_ratio(process: Process, ratio: Tensor) -> Tensor:
    """The time at which sigma / alpha has this value, with its derivative for every process, bisected ones too."""
    log_snr = -ratio.log()
    time = process.time_of(log_snr.detach())
    if not log_snr.requires_grad:
        return time
    slope = process.drift(time) - process.sigma_prime(time) / process.sigma(time)
    return time + (log_snr - log_snr.detach()) / slope.detach()


def default_ends(process: Process) -> tuple[float, float]:
    """First and last time of a grid: the process's own, or where sigma / alpha is 80 or 0.002 if need be."""
    first, last = process.t_max, process.t_end
    if not math.isfinite(float(process.noise_ratio(first))):
        first = float(process.time_of(-math.log(80.0)))
    if not float(process.noise_ratio(last)) > 0:
        last = float(process.time_of(-math.log(0.002)))
    return first, last


def _shown(values: Tensor) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values.tolist()) + ")"
