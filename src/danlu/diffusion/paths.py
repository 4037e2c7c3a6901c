"""Conditional trajectories from data to a prior: what a flow is made of.

An ODE between two distributions takes two steps. Choose a trajectory ``phi_t(x_0, x_1)`` from each sample of the data
(t = 0) to a sample of the prior (t = 1); then train a network on its derivative by time. The network that does this
best carries the prior to the data, whatever trajectory and prior were chosen.

Source: Scientific Spaces archives 9497 and 9379; arXiv:2209.03003, arXiv:2210.02747.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from danlu.diffusion.process import Process, Time, as_time, per_sample, widened
from danlu.diffusion.processes import Cosine, RectifiedFlow

_TOLERANCE = 1e-4


class Path(ABC):
    """A trajectory ``phi_t(x_0, x_1)`` from data at the first time to a prior at the last.

    For the transport to be exact, ``phi`` must be differentiable in time, and invertible in ``x_1`` where ``x_0`` and t
    are fixed.

    Source: Scientific Spaces archive 9497.
    """

    @property
    def clock(self) -> Process:
        """A process with the times of this path: its range is the legal range, and samplers of times draw from it."""
        return RectifiedFlow()

    def sample(self, x0: Tensor, x1: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """The point at time t, and its derivative by time, which a network learns.

        Args:
            x0: data (batch, ...).
            x1: of the prior, the shape of ``x0``.
            t: a time, or one for each sample (batch,).

        Returns:
            Two tensors of the shape of ``x0`` in float32 or better.

        Raises:
            TypeError: samples that are not floating-point.
            ValueError: shapes that differ, a time outside the path, or a path that does not start at ``x_0`` and end
                at ``x_1``.
        """
        if x0.shape != x1.shape:
            raise ValueError(f"x1 must have the shape of x0 {tuple(x0.shape)}, got {tuple(x1.shape)}")
        for name, value in (("x0", x0), ("x1", x1)):
            if not value.is_floating_point():
                raise TypeError(f"{name} must be floating-point, got {value.dtype}: convert it, images to -1..1")
        return self._at(widened(x0), widened(x1), self._times(x0, t))

    @abstractmethod
    def _at(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Point and derivative; the input is checked, the times are float64."""

    def _times(self, x: Tensor, t: Time) -> Tensor:
        times = as_time(t)
        if times.dim() > 1 or (times.dim() == 1 and len(times) != len(x)):
            raise ValueError(
                f"t must be one time or one for each of the {len(x)} samples, got shape {tuple(times.shape)}"
            )
        return times if torch.compiler.is_compiling() else self.clock.check_times(times)


class ScaledPath(Path):
    """A path that is linear in the prior: ``x_t = mu_t(x_0) + s_t x_1``.

    The prior need not be Gaussian: with density ``p_1``, the density of ``x_t`` around one ``x_0`` is
    ``p_1((x_t - mu_t) / s_t) / s_t^d``.

    Source: Scientific Spaces archive 9379.
    """

    @abstractmethod
    def parts(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``mu_t(x_0)``, ``s_t`` and their derivatives by time, shaped to broadcast with ``x0``."""

    def _at(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        mean, scale, mean_prime, scale_prime = self.parts(x0, t)
        return mean + scale * x1, mean_prime + scale_prime * x1

    def conditional_velocity(self, x: Tensor, x0: Tensor, t: Time) -> Tensor:
        """Derivative at ``x`` of the one trajectory that passes through ``x`` at time t and comes from ``x0``.

        Args:
            x: points (batch, ...).
            x0: data, the shape of ``x``.
            t: a time, or one for each sample, at which the prior has a share.

        Returns:
            ``mu_t' + (s_t' / s_t) (x - mu_t)``, the shape of ``x``.

        Raises:
            ValueError: shapes that differ, or a time where ``s_t`` is 0.
        """
        mean, scale, mean_prime, scale_prime = self._parts_inside(x, x0, t)
        return mean_prime + scale_prime / scale * (widened(x) - mean)

    def conditional_log_prob(
        self, x: Tensor, x0: Tensor, t: Time, prior_log_prob: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Log density of ``x`` at time t around the data ``x0``.

        Args:
            x: points (batch, ...).
            x0: data, the shape of ``x``.
            t: a time, or one for each sample, at which the prior has a share.
            prior_log_prob: log density of the prior: (batch, ...) to (batch,); standard Gaussian unless given.

        Returns:
            Nats (batch,).

        Raises:
            ValueError: shapes that differ, or a time where ``s_t`` is 0.
        """
        mean, scale, _, _ = self._parts_inside(x, x0, t)
        log_prob = (prior_log_prob or gaussian_log_prob)((widened(x) - mean) / scale)
        if log_prob.shape != x.shape[:1]:
            raise ValueError(f"prior_log_prob must return shape ({len(x)},), got {tuple(log_prob.shape)}")
        return log_prob - x[0].numel() * scale.log().flatten()

    def _parts_inside(self, x: Tensor, x0: Tensor, t: Time) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if x.shape != x0.shape:
            raise ValueError(f"x0 must have the shape of x {tuple(x.shape)}, got {tuple(x0.shape)}")
        parts = self.parts(widened(x0), self._times(x, t))
        if bool((parts[1] <= 0).any()):
            raise ValueError("t must be above the first time of the path: at it, every point is the data itself")
        return parts


@dataclass(frozen=True)
class ProcessPath(ScaledPath):
    """The path of a diffusion process, ``alpha(t) x_0 + sigma(t) x_1``, over the times of the process.

    With a Gaussian prior, the best network is the right side of the process's probability-flow ODE. Processes that keep
    some data at their last time (VP) or end with noise that is not 1 (VE, EDM) start sampling from
    ``process.prior_std()`` times the prior.

    Args:
        process: gives alpha and sigma.

    Source: Scientific Spaces archive 9497; arXiv:2210.02747.
    """

    process: Process

    def __post_init__(self) -> None:
        if not isinstance(self.process, Process):
            raise TypeError(f"process must be a Process such as VP() or Cosine(), got {self.process!r}")

    @property
    def clock(self) -> Process:
        """The process."""
        return self.process

    def parts(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``alpha x_0``, ``sigma`` and their derivatives."""
        process = self.process
        coefficients = (process.alpha(t), process.sigma(t), process.alpha_prime(t), process.sigma_prime(t))
        alpha, sigma, alpha_prime, sigma_prime = (per_sample(value, x0) for value in coefficients)
        return alpha * x0, sigma, alpha_prime * x0, sigma_prime


@dataclass(frozen=True)
class LinearPath(ProcessPath):
    """The straight line ``(1 - t) x_0 + t x_1`` with the constant derivative ``x_1 - x_0``: a rectified flow.

    Source: Scientific Spaces archive 9497; arXiv:2209.03003.
    """

    process: Process = field(default_factory=RectifiedFlow, init=False)


@dataclass(frozen=True)
class TrigonometricPath(ProcessPath):
    """The arc ``cos(pi t / 2) x_0 + sin(pi t / 2) x_1``.

    Source: Scientific Spaces archive 9497.
    """

    process: Process = field(default_factory=Cosine, init=False)


class AffinePath(ScaledPath):
    """A path of your own that is linear in the prior, ``mu(x_0, t) + s(t) x_1``; derivatives are automatic.

    Args:
        mu: called as ``mu(x0, t)`` with times that broadcast with x0; ``mu(x0, 0) = x0`` and ``mu(x0, 1) = 0``,
            which is checked on the first samples that come.
        s: called with times; ``s(0) = 0``, ``s(1) = 1``, increasing.

    Raises:
        ValueError: ``s`` does not run from 0 to 1 or does not increase; on first use, ``mu`` has other ends.

    Source: Scientific Spaces archive 9379.
    """

    def __init__(self, mu: Callable[[Tensor, Tensor], Tensor], s: Callable[[Tensor], Tensor]) -> None:
        self.mu, self.s = mu, s
        self._known_ends = False
        times = torch.linspace(0, 1, 1001, dtype=torch.float64)
        scales = s(times)
        if scales.shape != times.shape:
            raise ValueError(f"s must return the shape of its times {tuple(times.shape)}, got {tuple(scales.shape)}")
        if not (abs(scales[0]) <= _TOLERANCE and abs(scales[-1] - 1) <= _TOLERANCE):
            raise ValueError(f"s must be 0 at t = 0 and 1 at t = 1, got {scales[0]:g} and {scales[-1]:g}")
        if bool((scales.diff() <= 0).any()):
            first = int((scales.diff() <= 0).nonzero()[0])
            raise ValueError(f"s must increase with time, but it does not after t = {times[first]:g}")

    def parts(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``mu`` and ``s`` with their derivatives."""
        if not self._known_ends and not torch.compiler.is_compiling():
            for time, end in ((0.0, x0), (1.0, torch.zeros_like(x0))):
                _check_end(
                    "mu(x0, t)", self.mu(x0, torch.full((), time, dtype=x0.dtype, device=x0.device)), end, x0, time
                )
            self._known_ends = True
        shaped = per_sample(t, x0)
        values, slopes = _by_time(lambda time: (self.mu(x0, time), self.s(time)), shaped)
        return *values, *slopes


class CustomPath(Path):
    """Any path of your own: the general construction. Its derivative by time is automatic.

    Args:
        phi: called as ``phi(x0, x1, t)`` with times that broadcast with x0; each sample may depend on its own time
            alone. ``phi(x0, x1, 0) = x0`` and ``phi(x0, x1, 1) = x1``, which is checked on the first samples that come.

    Raises:
        ValueError: on first use, ``phi`` returns another shape or has other ends.

    Source: Scientific Spaces archive 9497.
    """

    def __init__(self, phi: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.phi = phi
        self._known_ends = False

    def _at(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if not self._known_ends and not torch.compiler.is_compiling():
            size = torch.maximum(x0.abs(), x1.abs())
            for time, end in ((0.0, x0), (1.0, x1)):
                at = torch.full((), time, dtype=x0.dtype, device=x0.device)
                _check_end("phi(x0, x1, t)", self.phi(x0, x1, at), end, size, time)
            self._known_ends = True
        shaped = per_sample(t, x0)
        return _by_time(lambda time: self.phi(x0, x1, time), shaped)


def gaussian_log_prob(x: Tensor) -> Tensor:
    """Log density of the standard Gaussian: (batch, ...) to nats (batch,)."""
    flat = x.flatten(1)
    return -0.5 * (flat.square().sum(1) + flat.shape[1] * math.log(2 * math.pi))


def _by_time(function: Callable[[Tensor], Any], t: Tensor) -> tuple[Any, Any]:
    """Value and derivative by time, by forward-mode differentiation."""
    value, slope = torch.func.jvp(function, (t,), (torch.ones_like(t),))  # type: ignore[misc]
    return value, slope


def _check_end(name: str, value: Tensor, end: Tensor, size: Tensor, time: float) -> None:
    """Refuse a path that is not where it must be at one of its ends, within 1e-4 of the size of its samples."""
    if value.shape != end.shape:
        raise ValueError(f"{name} must return the shape of x0 {tuple(end.shape)}, got {tuple(value.shape)}")
    distance = float((value - end).detach().abs().max()) if end.numel() else 0.0
    if not distance <= _TOLERANCE * max(1.0, float(size.abs().max()) if size.numel() else 1.0):
        raise ValueError(
            f"{name} must be {'x0' if time == 0 else 'x1 (0 for mu)'} at t = {time:g}, but differs by {distance:g}; "
            "time runs from the data at 0 to the prior at 1"
        )
