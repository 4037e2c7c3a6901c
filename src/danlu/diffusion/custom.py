"""A process of your own.

Source: Scientific Spaces archive 9209, which advises to choose alpha and sigma first and derive the SDE from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from danlu.diffusion.process import Process, Time, as_time


@dataclass(frozen=True)
class CustomProcess(Process):
    """A process of your own alpha and sigma; drift, diffusion and derivatives follow by differentiation.

    Args:
        alpha_of: share of the data by time, positive inside the range: a differentiable function of a float64 tensor.
        sigma_of: standard deviation of the noise by time, positive inside the range; likewise.
        t_min: time of the data, where sigma may be 0.
        t_max: time of the noise, where alpha may be 0.

    Raises:
        ValueError: the range is empty, a value is not finite or not positive, or ``log(alpha / sigma)`` does not
            decrease strictly on a grid of 1,000 times.
    """

    alpha_of: Callable[[Tensor], Tensor]
    sigma_of: Callable[[Tensor], Tensor]
    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        if not -math.inf < self.t_min < self.t_max < math.inf:
            raise ValueError(f"t_min must be below t_max, both finite, got {self.t_min} and {self.t_max}")
        times = torch.linspace(self.t_min, self.t_max, 1002, dtype=torch.float64)[1:-1]
        for name, values in (("alpha_of", self.alpha_of(times)), ("sigma_of", self.sigma_of(times))):
            if values.shape != times.shape:
                raise ValueError(
                    f"{name} must return the shape of its times {tuple(times.shape)}, got {tuple(values.shape)}"
                )
            bad = ~(torch.isfinite(values) & (values > 0))
            if bool(bad.any()):
                first = int(bad.nonzero()[0])
                raise ValueError(
                    f"{name} must be positive between t_min and t_max, got {values[first]:g} at t = {times[first]:g}"
                )
        steps = self.half_log_snr(times).diff()
        if bool((steps >= 0).any()):
            first = int((steps >= 0).nonzero()[0])
            raise ValueError(
                f"log(alpha / sigma) must decrease strictly with time, but it does not after t = {times[first]:g}: "
                "alpha must fall or sigma must grow"
            )

    def log_alpha(self, t: Time) -> Tensor:
        """Logarithm of your alpha."""
        return self.alpha(t).log()

    def alpha(self, t: Time) -> Tensor:
        """Your alpha."""
        return self.alpha_of(as_time(t))

    def sigma(self, t: Time) -> Tensor:
        """Your sigma."""
        return self.sigma_of(as_time(t))
