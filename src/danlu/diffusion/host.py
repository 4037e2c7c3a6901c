"""A process together with the way a host's model is spoken to.

Source: Scientific Spaces archive 9209; arXiv:2206.00364 (preconditioning).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from danlu.diffusion.process import Process, Time, as_time, per_sample
from danlu.diffusion.processes import EDM
from danlu.diffusion.targets import Denoiser, Prediction


@dataclass(frozen=True)
class Host:
    """A process together with how a host's model is spoken to.

    Args:
        process: that the model was trained on.
        prediction: kind of what `output` returns.
        timesteps: what the model is told about a time t: ``time`` (t itself; an index for a table), ``scaled`` (t times
            ``factor``), ``log`` (a quarter of the logarithm of the noise) or ``arc`` (its arctangent by pi / 2).
        factor: of ``scaled``.
        sigma_data: of a preconditioned model, whose input is ``x / sqrt(t^2 + sigma_data^2)`` and whose output is added
            to a share of x; None without preconditioning.
        sign: of a preconditioned model's output, 1 or -1.
        learned_variance: whether the model's output has a second half of channels, a variance, that is left out.
        start: largest time to sample from.
        end: smallest time to sample to, with noise left.
    """

    process: Process
    prediction: Prediction
    timesteps: Literal["time", "scaled", "log", "arc"] = "time"
    factor: float = 1.0
    sigma_data: float | None = None
    sign: int = 1
    learned_variance: bool = False
    start: float = math.nan
    end: float = math.nan

    def __post_init__(self) -> None:
        for name, default in (("start", self.process.t_max), ("end", self.process.t_end)):
            if math.isnan(getattr(self, name)):
                object.__setattr__(self, name, default)

    @property
    def scales_input(self) -> bool:
        """Whether the model's input is not the sample itself."""
        return self.sigma_data is not None

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise that sampling starts from; 1 where the process keeps the variance."""
        return self.process.prior_std() if isinstance(self.process, EDM) else 1.0

    def timestep(self, t: Time) -> Tensor:
        """What the model is told at time t."""
        t = as_time(t)
        if self.timesteps == "log":
            return t.log() / 4
        if self.timesteps == "arc":
            return 2 / math.pi * t.atan()
        return t * self.factor

    def time(self, timestep: Time) -> Tensor:
        """The time at which the model is told this timestep."""
        timestep = as_time(timestep)
        if self.timesteps == "log":
            return (4 * timestep).exp()
        if self.timesteps == "arc":
            return (math.pi / 2 * timestep).tan()
        return timestep / self.factor

    def input(self, x: Tensor, t: Time) -> Tensor:
        """What the model is given for the sample x (batch, ...) at time t: x unless it is preconditioned."""
        if self.sigma_data is None:
            return x
        return x / per_sample((as_time(t) ** 2 + self.sigma_data**2).sqrt(), x)

    def output(self, raw: Tensor, x: Tensor, t: Time) -> Tensor:
        """The model's output as a prediction of the kind `prediction`.

        Args:
            raw: what the model returned (batch, channels, ...).
            x: the sample, before `input`.
            t: its time, or one for each.
        """
        if self.learned_variance and raw.dim() > 1 and raw.shape[1] == 2 * x.shape[1]:
            raw = raw.chunk(2, 1)[0]
        if self.sigma_data is None:
            return raw
        t, data = as_time(t), self.sigma_data
        total = t**2 + data**2
        return per_sample(data**2 / total, x) * x + per_sample(self.sign * t * data / total.sqrt(), x) * raw.to(x.dtype)

    def denoiser(self, model: Callable[[Tensor, Tensor], Tensor]) -> Denoiser:
        """The model as a `Denoiser` of the process.

        Args:
            model: called as ``model(input, timesteps)`` with timesteps (batch,); returns the raw output.
        """

        def call(x: Tensor, t: Tensor) -> Tensor:
            return self.output(model(self.input(x, t), self.timestep(t).to(x.dtype)), x, t)

        return Denoiser(call, self.process, self.prediction)
