"""One-step solvers of a diffusion process, and what a solver sees of a sampling run.

A solver moves samples from time ``t`` to an earlier time ``u`` by the data ``x_0`` and the noise ``eps`` that the model
predicts. In the coordinates ``x / alpha`` and ``sigma / alpha`` every process has the same probability-flow ODE,
``d(x / alpha) = eps d(sigma / alpha)``, and a solver written in them gives the same samples for all.

Source: Scientific Spaces archives 9181, 9209, 9228 and 9280; arXiv:2010.02502 (DDIM), arXiv:2206.00364 (Heun),
arXiv:2206.00927 (DPM-Solver-2), arXiv:2210.05475 (analytic first step).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from danlu.diffusion.processes import Process, per_sample
from danlu.diffusion.targets import Denoiser


class CountedModel:
    """A model whose calls are counted, whose input has the dtype of its weights and whose output is checked.

    Args:
        model: called as ``model(x, t)``.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        #: Calls so far.
        self.calls = 0
        #: Where the run is, for messages.
        self.place = ""
        self._model = model
        home = home_of(model)
        self._dtype = None if home is None else home[1]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The output of the model: one call."""
        self.calls += 1
        if self._dtype is not None:
            # Times stay in float32 or better: bfloat16 has no 999.
            t = t.to(torch.promote_types(self._dtype, torch.float32))
        output = self._model(x if self._dtype is None else x.to(self._dtype), t)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"model must return a tensor, got {type(output).__name__}: wrap it, for instance as "
                "lambda x, t: model(x, t).sample"
            )
        if output.shape != x.shape:
            raise ValueError(f"model must return the shape of its input {tuple(x.shape)}, got {tuple(output.shape)}")
        self.check(output, f"the model's output of call {self.calls}", float(t.detach().flatten()[0]))
        return output

    def check(self, values: Tensor, name: str, time: float) -> None:
        """Refuse values that are not finite, by the place where they came up."""
        if bool(torch.isfinite(values).all()):
            return
        wrong = int((~torch.isfinite(values)).flatten(1).any(1).sum())
        raise FloatingPointError(f"{name} is not finite in {wrong} of {len(values)} samples{self.place}, t = {time:g}")


class Walk:
    """A sampling run as a solver sees it: the times, the counted model, the noise.

    Args:
        denoiser: the model with its process.
        times: strictly decreasing float64 times (steps + 1,).
        generator: of the noise of stochastic solvers.
        analytic_first: answer the first call by the exact answer for data of unit variance instead of the model.
    """

    def __init__(
        self, denoiser: Denoiser, times: Tensor, generator: torch.Generator | None = None, analytic_first: bool = False
    ) -> None:
        self.process: Process = denoiser.process
        self.times = times
        #: Of the noise of stochastic solvers.
        self.generator = generator
        self.model = CountedModel(denoiser.model)
        self._analytic = analytic_first
        self._denoiser = Denoiser(self.model, denoiser.process, denoiser.prediction)

    @property
    def intervals(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of neighbouring times, the later first."""
        for step, (t, u) in enumerate(zip(self.times[:-1], self.times[1:], strict=True)):
            self.model.place = f" at step {step + 1} of {len(self.times) - 1}"
            yield t, u

    def components(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Data and noise that the model sees in ``x`` at ``t``: one call."""
        if self._analytic:
            self._analytic = False
            alpha, sigma = self.process.alpha(t), self.process.sigma(t)
            total = alpha**2 + sigma**2
            return per_sample(alpha / total, x) * x, per_sample(sigma / total, x) * x
        return self._denoiser.components(x, t)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """Right side of the probability-flow ODE at ``x`` and ``t``: one call."""
        if not self._analytic:
            return self._denoiser.velocity(x, t)
        data, noise = self.components(x, t)
        return per_sample(self.process.alpha_prime(t), x) * data + per_sample(self.process.sigma_prime(t), x) * noise

    def noise_like(self, x: Tensor) -> Tensor:
        """Fresh standard normal noise.

        Raises:
            ValueError: the run has no generator.
        """
        if self.generator is None:
            raise ValueError("give a seed: this solver draws noise")
        return draw_noise(tuple(x.shape), self.generator, x.dtype, x.device)


class Solver(ABC):
    """A way from noise to data. Subclass it to bring your own."""

    #: Calls of the model in one interval; the last interval may take fewer.
    calls: ClassVar[int] = 1

    @abstractmethod
    def integrate(self, walk: Walk, x: Tensor) -> Iterator[Tensor]:
        """Yield the samples at every time of ``walk.times`` but the first.

        Args:
            walk: times, model and noise of the run.
            x: samples at the first time (batch, ...), float32 or float64.
        """


@dataclass(frozen=True)
class Euler(Solver):
    """Euler steps of the probability-flow ODE in the process's own time.

    For `RectifiedFlow` it equals `DDIM`.

    Source: Scientific Spaces archive 9228.
    """

    def integrate(self, walk: Walk, x: Tensor) -> Iterator[Tensor]:
        """One call in each interval."""
        for t, u in walk.intervals:
            x = x + per_sample(u - t, x) * walk.velocity(x, t)
            yield x


@dataclass(frozen=True)
class DDIM(Solver):
    """``x_u = alpha_u x_0 + sqrt(sigma_u^2 - s^2) eps + s z``: DDIM, and ancestral sampling at ``eta = 1``.

    ``s = eta sigma_u sqrt(1 - snr_t / snr_u)`` with ``snr = (alpha / sigma)^2``. ``eta = 0`` is Euler's step in
    ``x / alpha`` and ``sigma / alpha``; ``eta = 1`` draws from the Bayes posterior of ``x_u`` given ``x_t`` and the
    predicted data, which is DDPM with its smaller variance. Legal where alpha is 0, if the prediction is.

    Args:
        eta: share of the posterior's noise, 0..1.

    Source: Scientific Spaces archive 9181; arXiv:2010.02502.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in 0..1, got {self.eta}")

    def integrate(self, walk: Walk, x: Tensor) -> Iterator[Tensor]:
        """One call in each interval."""
        process = walk.process
        for t, u in walk.intervals:
            data, noise = walk.components(x, t)
            if self.eta:
                # 1 - snr_t / snr_u without cancellation, and right where either ratio is 0 or infinite.
                share = self.eta**2 * -torch.expm1(2 * (process.half_log_snr(t) - process.half_log_snr(u)))
                noise = per_sample((1 - share).sqrt(), x) * noise + per_sample(share.sqrt(), x) * walk.noise_like(x)
            x = straight(process, data, noise, u)
            yield x


@dataclass(frozen=True)
class EulerMaruyama(Solver):
    """Euler-Maruyama steps of a reverse SDE with the marginals of the process.

    ``dx = [f x - (g^2 + l^2) / 2 score] dt + l dw`` backwards in time with ``l = noise_scale g``: 1 is the reverse SDE,
    0 the probability-flow ODE (`Euler`).

    Args:
        noise_scale: at least 0.

    Source: Scientific Spaces archives 9209 and 9228; arXiv:2011.13456.
    """

    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.noise_scale < float("inf"):
            raise ValueError(f"noise_scale must be finite and at least 0, got {self.noise_scale}")

    def integrate(self, walk: Walk, x: Tensor) -> Iterator[Tensor]:
        """One call in each interval."""
        process = walk.process
        squares = self.noise_scale**2 * process.diffusion_squared(walk.times[:-1])
        if not bool(torch.isfinite(squares).all()):
            where = float(walk.times[:-1][~torch.isfinite(squares)][0])
            raise ValueError(
                f"times must not hold {where:g} for EulerMaruyama: the SDE of {type(process).__name__} is infinite "
                "there; start below it, or take DDIM(eta=1)"
            )
        for (t, u), square in zip(walk.intervals, squares, strict=True):
            data, noise = walk.components(x, t)
            sigma = process.sigma(t)
            # velocity - l^2 / 2 score, and score = -noise / sigma.
            drift = (
                per_sample(process.alpha_prime(t), x) * data
                + per_sample(process.sigma_prime(t) + square / (2 * sigma), x) * noise
            )
            x = x + per_sample(u - t, x) * drift
            if self.noise_scale:
                x = x + per_sample((square * (t - u)).sqrt(), x) * walk.noise_like(x)
            yield x


@dataclass(frozen=True)
class Midpoint(Solver):
    """DPM-Solver-2: a step by the noise predicted at a time between, ``sigma / alpha`` at ``m = u^r t^(1 - r)``.

    The direction is ``eps_m / (2r) + (1 - 1 / (2r)) eps_t``: of second order for every r, the noise at the middle alone
    for ``r = 1/2``, and `Heun` for ``r = 1``. Where no such time exists, from alpha = 0 or to sigma = 0, the step is
    DDIM's and takes one call.

    Args:
        r: place of the time between, in 0..1 without 0.

    Source: arXiv:2206.00927.
    """

    r: float = 0.5
    calls = 2

    def __post_init__(self) -> None:
        if not 0 < self.r <= 1:
            raise ValueError(f"r must be above 0 and at most 1, got {self.r}")

    def integrate(self, walk: Walk, x: Tensor) -> Iterator[Tensor]:
        """Two calls in each interval."""
        for t, u in walk.intervals:
            x = _two_stages(walk, x, t, u, self.r)
            yield x


@dataclass(frozen=True)
class Heun(Solver):
    """Heun's steps in ``x / alpha`` and ``sigma / alpha``: by the mean of the noises predicted at both ends.

    From alpha = 0 or to sigma = 0 the step is DDIM's and takes one call.

    Source: arXiv:2206.00364.
    """

    calls = 2

    def integrate(self, walk: Walk, x: Tensor) -> Iterator[Tensor]:
        """Two calls in each interval."""
        for t, u in walk.intervals:
            x = _two_stages(walk, x, t, u, 1.0)
            yield x


def straight(process: Process, data: Tensor, noise: Tensor, u: Tensor) -> Tensor:
    """Where data and noise that stay as they are lead to at time ``u``: DDIM's step."""
    return per_sample(process.alpha(u), data) * data + per_sample(process.sigma(u), data) * noise


def along(process: Process, x: Tensor, noise: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """A step of ``x / alpha`` from t to u in the direction of a noise; alpha must not be 0 at t."""
    alpha_ratio = process.alpha(u) / process.alpha(t)
    return per_sample(alpha_ratio, x) * x + per_sample(process.sigma(u) - alpha_ratio * process.sigma(t), x) * noise


def _two_stages(walk: Walk, x: Tensor, t: Tensor, u: Tensor, r: float) -> Tensor:
    process = walk.process
    data, noise = walk.components(x, t)
    late, early = process.half_log_snr(t), process.half_log_snr(u)
    if not bool(torch.isfinite(late) & torch.isfinite(early)):
        return straight(process, data, noise, u)
    middle = u if r == 1 else process.time_of(late + r * (early - late))
    _, between = walk.components(straight(process, data, noise, middle), middle)
    return along(process, x, noise + (between - noise) / (2 * r), t, u)


def draw_noise(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normal noise on a device, drawn where its generator lives."""
    return torch.randn(shape, generator=generator, dtype=dtype, device=generator.device).to(device)


def home_of(model: Any) -> tuple[torch.device, torch.dtype] | None:
    """Device and dtype of a module's weights, or None for what has none."""
    if not isinstance(model, nn.Module):
        return None
    return next(((weight.device, weight.dtype) for weight in model.parameters() if weight.is_floating_point()), None)
