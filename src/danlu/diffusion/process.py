"""Gaussian diffusion processes: one object that knows alpha and sigma, and everything that follows from the two.

A process noises a sample as ``x_t = alpha(t) x_0 + sigma(t) eps`` with ``eps ~ N(0, I)``; time grows from data to
noise. From alpha and sigma follow the half log signal-to-noise ratio ``log(alpha / sigma)``, the forward SDE
``dx = f x dt + g dw`` with ``f = alpha' / alpha`` and ``g^2 = (sigma^2)' - 2 f sigma^2``, and the probability-flow ODE.

Source: Scientific Spaces archives 9209 and 9280; arXiv:2011.13456, arXiv:2206.00364.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

Time = float | Tensor


def as_time(t: Time) -> Tensor:
    """Time as a tensor of the widest float its device has: float32 would lose sigma near the data."""
    # A Python float must not pass through the default float32 on its way.
    tensor = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def widened(x: Tensor) -> Tensor:
    """The tensor in float32 or better, in which everything of a sampler and a loss is computed."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def per_sample(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient, 0-d or (batch,), shaped and cast to multiply ``x`` of shape (batch, ...)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    coefficient = coefficient.to(device=x.device, dtype=dtype)
    return coefficient if coefficient.dim() == 0 else coefficient.reshape(-1, *[1] * (x.dim() - 1))


class Process(ABC):
    """A Gaussian path from data at ``t_min`` to noise at ``t_max``.

    Every coefficient takes a time (a float, 0-d or (batch,) tensor) and returns a float64 tensor of its shape. A
    subclass gives ``log_alpha`` and ``sigma``; the rest follows, with derivatives by forward-mode differentiation
    unless it has closed forms.

    Source: Scientific Spaces archive 9209.
    """

    #: Legal range of time.
    t_min: float
    t_max: float

    @property
    def t_end(self) -> float:
        """Smallest time at which solvers evaluate a model by default."""
        return self.t_min

    @abstractmethod
    def log_alpha(self, t: Time) -> Tensor:
        """Logarithm of the share of the data that is left: ``-inf`` where nothing is."""

    @abstractmethod
    def sigma(self, t: Time) -> Tensor:
        """Standard deviation of the noise."""

    def alpha(self, t: Time) -> Tensor:
        """Share of the data that is left."""
        return self.log_alpha(t).exp()

    def alpha_prime(self, t: Time) -> Tensor:
        """Derivative of alpha by time."""
        return _derivative(self.alpha, t)

    def sigma_prime(self, t: Time) -> Tensor:
        """Derivative of sigma by time."""
        return _derivative(self.sigma, t)

    def half_log_snr(self, t: Time) -> Tensor:
        """Half the logarithm of the signal-to-noise ratio, ``log(alpha / sigma)``: strictly decreasing."""
        return self.log_alpha(t) - self.sigma(t).log()

    def noise_ratio(self, t: Time) -> Tensor:
        """``sigma / alpha``: the standard deviation of the noise in ``x / alpha``."""
        return self.sigma(t) * (-self.log_alpha(t)).exp()

    def drift(self, t: Time) -> Tensor:
        """Drift f of the forward SDE ``dx = f x dt + g dw``."""
        return self.alpha_prime(t) / self.alpha(t)

    def diffusion_squared(self, t: Time) -> Tensor:
        """Diffusion coefficient of the forward SDE, squared: ``g^2``."""
        sigma = self.sigma(t)
        return 2 * sigma * (self.sigma_prime(t) - self.drift(t) * sigma)

    def time_of(self, half_log_snr: Time) -> Tensor:
        """The time at which ``log(alpha / sigma)`` has this value; values outside the process give its nearest end.

        By bisection to the last bits unless a process knows better.
        """
        wanted = as_time(half_log_snr)
        low, high = torch.full_like(wanted, self.t_min), torch.full_like(wanted, self.t_max)
        for _ in range(64):
            middle = (low + high) / 2
            earlier = self.half_log_snr(middle) > wanted
            low, high = torch.where(earlier, middle, low), torch.where(earlier, high, middle)
        return (low + high) / 2

    def add_noise(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """Noised samples ``alpha x_0 + sigma eps``.

        Args:
            x0: data (batch, ...).
            noise: of the shape of ``x0``.
            t: a time, or one for each sample.

        Returns:
            Samples of the shape of ``x0``, in float32 or better.
        """
        # A 0-d coefficient would let bfloat16 samples win over its own type.
        return per_sample(self.alpha(t), x0) * widened(x0) + per_sample(self.sigma(t), x0) * widened(noise)

    def prior_std(self) -> float:
        """Standard deviation of the noise that sampling starts from: sigma at the last time."""
        return float(self.sigma(self.t_max))

    def check_times(self, t: Time, name: str = "t") -> Tensor:
        """The times as a tensor, once they are known to be finite and inside the process.

        Raises:
            ValueError: a time is outside ``t_min..t_max`` or not a number.
        """
        times = as_time(t)
        # Times come back from float32 arithmetic: the last float32 digits outside an end are the end.
        slack = 1e-6 * (self.t_max - self.t_min)
        inside = (times >= self.t_min - slack) & (times <= self.t_max + slack)
        if not bool(inside.all()):
            wrong = times[~inside].flatten()[0] if times.dim() else times
            raise ValueError(
                f"{name} must be in {self.t_min:g}..{self.t_max:g} for {type(self).__name__}, got {float(wrong):g}"
            )
        return times.clamp(self.t_min, self.t_max)


def _derivative(function: Callable[[Time], Tensor], t: Time) -> Tensor:
    t = as_time(t)
    return torch.func.jvp(function, (t,), (torch.ones_like(t),))[1]
