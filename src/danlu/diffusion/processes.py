"""The processes of the literature.

Source: Scientific Spaces archives 9209, 9280 and 9497; arXiv:2011.13456, arXiv:2206.00364, arXiv:2209.03003.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from danlu.diffusion.custom import CustomProcess
from danlu.diffusion.process import Process, Time, as_time, per_sample

__all__ = [
    "EDM",
    "VE",
    "VP",
    "Cosine",
    "CustomProcess",
    "Process",
    "RectifiedFlow",
    "SubVP",
    "Time",
    "as_time",
    "per_sample",
]


@dataclass(frozen=True)
class VP(Process):
    """Variance preserving: ``alpha = exp(-B/2)``, ``sigma = sqrt(1 - exp(-B))`` with ``B = b0 t + (b1 - b0) t^2 / 2``.

    Args:
        beta_min: b0, the rate at t = 0; at least 0.
        beta_max: b1, the rate at t = 1; above 0 and at least ``beta_min``.

    Source: arXiv:2011.13456; the continuous limit of DDPM, arXiv:2006.11239.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min = 0.0
    t_max = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta_min <= self.beta_max or not 0 < self.beta_max < math.inf:
            raise ValueError(f"0 <= beta_min <= beta_max must hold, got {self.beta_min} and {self.beta_max}")

    @property
    def t_end(self) -> float:
        """Smallest time at which solvers evaluate a model by default."""
        return 1e-3

    def beta(self, t: Time) -> Tensor:
        """Rate at which noise comes in."""
        return self.beta_min + (self.beta_max - self.beta_min) * as_time(t)

    def log_alpha(self, t: Time) -> Tensor:
        """``-B/2``."""
        t = as_time(t)
        return -0.5 * t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    def sigma(self, t: Time) -> Tensor:
        """``sqrt(1 - alpha^2)``, without the cancellation near the data."""
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def alpha_prime(self, t: Time) -> Tensor:
        """Derivative of alpha by time."""
        return -0.5 * self.beta(t) * self.alpha(t)

    def sigma_prime(self, t: Time) -> Tensor:
        """Derivative of sigma by time: infinite at t = 0."""
        return 0.5 * self.beta(t) * (2 * self.log_alpha(t)).exp() / self.sigma(t)

    def drift(self, t: Time) -> Tensor:
        """``-beta / 2``."""
        return -0.5 * self.beta(t)

    def diffusion_squared(self, t: Time) -> Tensor:
        """Beta: closed, because the general formula is infinity times zero at t = 0."""
        return self.beta(t)

    def time_of(self, half_log_snr: Time) -> Tensor:
        """The time at which ``log(alpha / sigma)`` has this value."""
        # B = -2 log alpha = log(1 + exp(-2 lambda)).
        fall = -2 * as_time(half_log_snr)
        return self._time_of_rate(torch.logaddexp(torch.zeros_like(fall), fall))

    def _time_of_rate(self, total: Tensor) -> Tensor:
        """The time at which the rate has summed up to ``B = total``: the root of the quadratic that does not cancel."""
        slope = self.beta_max - self.beta_min
        total = total.clamp_max((self.beta_min + self.beta_max) / 2)
        divisor = self.beta_min + (self.beta_min**2 + 2 * slope * total).sqrt()
        return (2 * total / divisor.clamp_min(torch.finfo(total.dtype).tiny)).clamp(0, 1)


@dataclass(frozen=True)
class SubVP(VP):
    """Sub-VP: the drift of `VP`, less noise on the way: ``sigma = 1 - exp(-B)``.

    Source: arXiv:2011.13456.
    """

    def sigma(self, t: Time) -> Tensor:
        """``1 - alpha^2``."""
        return -torch.expm1(2 * self.log_alpha(t))

    def sigma_prime(self, t: Time) -> Tensor:
        """Derivative of sigma by time."""
        return self.beta(t) * (2 * self.log_alpha(t)).exp()

    def diffusion_squared(self, t: Time) -> Tensor:
        """``beta (1 - exp(-2B))``."""
        return self.beta(t) * -torch.expm1(4 * self.log_alpha(t))

    def time_of(self, half_log_snr: Time) -> Tensor:
        """The time at which ``log(alpha / sigma)`` has this value."""
        # sigma / alpha = 1 / alpha - alpha = 2 sinh(B / 2).
        return self._time_of_rate(2 * torch.asinh((-as_time(half_log_snr)).exp() / 2))


@dataclass(frozen=True)
class VE(Process):
    """Variance exploding: ``alpha = 1``, ``sigma = sigma_min (sigma_max / sigma_min)^t``.

    At t = 0 the sample is the data with noise of ``sigma_min``. Published code leaves that noise out of the data and
    starts the SDE at 0, where its kernel has the variance ``sigma^2 - sigma_min^2``; here kernel and SDE agree.

    Args:
        sigma_min: noise at t = 0, above 0.
        sigma_max: noise at t = 1, above ``sigma_min``.

    Source: arXiv:2011.13456.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min = 0.0
    t_max = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"0 < sigma_min < sigma_max must hold, got {self.sigma_min} and {self.sigma_max}")

    def log_alpha(self, t: Time) -> Tensor:
        """Zero."""
        return torch.zeros_like(as_time(t))

    def sigma(self, t: Time) -> Tensor:
        """Geometric in time."""
        return (math.log(self.sigma_min) + as_time(t) * math.log(self.sigma_max / self.sigma_min)).exp()

    def alpha_prime(self, t: Time) -> Tensor:
        """Zero."""
        return torch.zeros_like(as_time(t))

    def sigma_prime(self, t: Time) -> Tensor:
        """Derivative of sigma by time."""
        return self.sigma(t) * math.log(self.sigma_max / self.sigma_min)

    def time_of(self, half_log_snr: Time) -> Tensor:
        """The time at which ``log(alpha / sigma)`` has this value."""
        ratio = math.log(self.sigma_max / self.sigma_min)
        return ((-as_time(half_log_snr) - math.log(self.sigma_min)) / ratio).clamp(0, 1)


@dataclass(frozen=True)
class EDM(Process):
    """``alpha = 1``, ``sigma = t``: time is the noise.

    Args:
        t_min: noise at which sampling ends, above 0.
        t_max: noise at which sampling starts, above ``t_min``.

    Source: arXiv:2206.00364.
    """

    t_min: float = 0.002
    t_max: float = 80.0

    def __post_init__(self) -> None:
        if not 0 < self.t_min < self.t_max < math.inf:
            raise ValueError(f"0 < t_min < t_max must hold, got {self.t_min} and {self.t_max}")

    def log_alpha(self, t: Time) -> Tensor:
        """Zero."""
        return torch.zeros_like(as_time(t))

    def sigma(self, t: Time) -> Tensor:
        """The time itself."""
        return as_time(t)

    def alpha_prime(self, t: Time) -> Tensor:
        """Zero."""
        return torch.zeros_like(as_time(t))

    def sigma_prime(self, t: Time) -> Tensor:
        """One."""
        return torch.ones_like(as_time(t))

    def time_of(self, half_log_snr: Time) -> Tensor:
        """The time at which ``log(alpha / sigma)`` has this value."""
        return (-as_time(half_log_snr)).exp().clamp(self.t_min, self.t_max)


@dataclass(frozen=True)
class RectifiedFlow(Process):
    """Straight lines from data to noise: ``alpha = 1 - t``, ``sigma = t``.

    Drift and diffusion of its SDE are infinite at t = 1; its ODE is not.

    Source: Scientific Spaces archive 9497; arXiv:2209.03003, arXiv:2210.02747.
    """

    t_min = 0.0
    t_max = 1.0

    def log_alpha(self, t: Time) -> Tensor:
        """``log(1 - t)``."""
        return torch.log1p(-as_time(t))

    def sigma(self, t: Time) -> Tensor:
        """The time itself."""
        return as_time(t)

    def alpha(self, t: Time) -> Tensor:
        """``1 - t``."""
        return 1 - as_time(t)

    def alpha_prime(self, t: Time) -> Tensor:
        """Minus one."""
        return -torch.ones_like(as_time(t))

    def sigma_prime(self, t: Time) -> Tensor:
        """One."""
        return torch.ones_like(as_time(t))

    def time_of(self, half_log_snr: Time) -> Tensor:
        """The time at which ``log(alpha / sigma)`` has this value."""
        return torch.sigmoid(-as_time(half_log_snr))


@dataclass(frozen=True)
class Cosine(Process):
    """``alpha = cos(pi t / 2)``, ``sigma = sin(pi t / 2)``: the trigonometric path between data and noise.

    Source: arXiv:2102.09672, without its small offset at the data.
    """

    t_min = 0.0
    t_max = 1.0

    def log_alpha(self, t: Time) -> Tensor:
        """Logarithm of the cosine."""
        return self.alpha(t).log()

    def alpha(self, t: Time) -> Tensor:
        """``cos(pi t / 2)``, by the sine of the rest, which is exactly 0 at t = 1."""
        return torch.sin(math.pi / 2 * (1 - as_time(t)))

    def sigma(self, t: Time) -> Tensor:
        """``sin(pi t / 2)``."""
        return torch.sin(math.pi / 2 * as_time(t))

    def alpha_prime(self, t: Time) -> Tensor:
        """Derivative of alpha by time."""
        return -math.pi / 2 * self.sigma(t)

    def sigma_prime(self, t: Time) -> Tensor:
        """Derivative of sigma by time."""
        return math.pi / 2 * self.alpha(t)

    def time_of(self, half_log_snr: Time) -> Tensor:
        """The time at which ``log(alpha / sigma)`` has this value."""
        return 2 / math.pi * torch.atan((-as_time(half_log_snr)).exp())
