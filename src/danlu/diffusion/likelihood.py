"""Log-likelihood of a diffusion model: the probability-flow ODE carries data to noise and counts how volume changes.

``log p(x) = log p_T(x_T) + int div v dt`` along the solution of ``dx / dt = v(x, t)`` from the data up. Divergences are
exact for few dimensions, else estimated by random probes that stay the same for the whole solution.

Source: Scientific Spaces archives 9228 and 9280; arXiv:2011.13456, arXiv:1810.01367 (probes).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from danlu.diffusion.divergence import DensityFlow, probe_vectors
from danlu.diffusion.grids import Spacing, time_grid
from danlu.diffusion.processes import Process
from danlu.diffusion.solvers import as_denoiser
from danlu.diffusion.steps import CountedModel
from danlu.diffusion.targets import Denoiser, Prediction, split
from danlu.progress import watched

#: Solvers of torchdiffeq that choose their steps by the tolerance, and those that take a number of steps.
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2")
FIXED = ("euler", "midpoint", "heun3", "rk4")
#: Share of a process's time at which the integral starts where the data itself has no noise.
_SMALLEST = 1e-5


@dataclass(frozen=True)
class LogLikelihood:
    """What a likelihood run gave.

    Args:
        log_prob: in nats, (batch,).
        standard_error: of ``log_prob`` by the spread of the probes (batch,); None with exact divergences or one probe.
        latents: the noise that the samples map to (batch, ...), at the last time.
        evaluations: calls of the model, counted; each comes with one vector-Jacobian product for every probe, or for
            every dimension with exact divergences.
        t_min: time at which the density is: the data has the noise of this time.
    """

    log_prob: Tensor
    standard_error: Tensor | None
    latents: Tensor
    evaluations: int
    t_min: float


def log_likelihood(
    model: Callable[..., Any] | Denoiser,
    x: Tensor,
    process: Process | None = None,
    prediction: Prediction | None = None,
    *,
    solver: str = "dopri5",
    steps: int | None = None,
    spacing: Spacing | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    divergence: Literal["exact", "hutchinson"] | None = None,
    probes: int = 1,
    seed: int | torch.Generator | None = None,
    start: float | None = None,
    end: float | None = None,
    prior: Callable[[Tensor], Tensor] | None = None,
    gradient: bool = False,
    progress: str | None = "likelihood",
) -> LogLikelihood:
    """Log density of samples under a diffusion model.

    Steps of adaptive solvers are common to the batch and fine enough for each of its samples: the error norm is the
    largest of the samples' own, so that batch mates change a result within the tolerance only. The model must treat
    samples independently (no batch normalisation in training mode).

    Args:
        model: called as ``model(x, t)``, see `sample`; or a `Denoiser`.
        x: data (batch, ...), float32 or float64.
        process: that the model was trained with.
        prediction: what the model predicts, ``epsilon`` unless given.
        solver: of torchdiffeq: ``dopri5``, ``dopri8``, ``bosh3``, ``adaptive_heun`` or ``fehlberg2``, by tolerance;
            ``rk4``, ``heun3``, ``midpoint`` or ``euler``, by ``steps``.
        steps: intervals of a solver that does not choose them.
        spacing: of these steps, see `time_grid`.
        rtol: relative tolerance, above 0.
        atol: absolute tolerance, above 0.
        divergence: ``exact``, by one vector-Jacobian product for each dimension, or ``hutchinson``, by ``probes``;
            exact up to 64 dimensions unless given.
        probes: how many random signs estimate a divergence, at least 1; from 2 on there is a standard error.
        seed: of the probes.
        start: time of the data. Unless given, the process's first time, or 1e-5 of its range after it where it has no
            noise there. The result is the density of data with this much noise.
        end: time of the prior, ``t_max`` unless given.
        prior: log density (batch,) of samples at ``end``; ``N(0, sigma^2 I)`` unless given, which where alpha is not 0
            there is a small approximation.
        gradient: keep the graph of every step, to differentiate by x or the weights of the model.
        progress: label of the progress bar; None for none.

    Returns:
        The log densities with the latents and the counted calls.

    Raises:
        ValueError: arguments out of range or that exclude each other.
        TypeError: x is no floating point tensor.
        FloatingPointError: the model gave a value that is not finite, or no step is small enough; names the time.
        ImportError: torchdiffeq is missing.

    Source: Scientific Spaces archive 9228; arXiv:2011.13456.
    """
    denoiser = as_denoiser(model, process, prediction)
    path = denoiser.process
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() < 2 or x.numel() < 1:
        raise ValueError(f"x must be (batch, ...) with at least one sample, got shape {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x must be finite")
    if rtol <= 0 or atol <= 0:
        raise ValueError(f"rtol and atol must be above 0, got {rtol} and {atol}")
    times = _times(path, solver, steps, spacing, start, end)
    for time in times[[0, -1]]:
        # Solvers come close to an end without touching it, where a prediction that says nothing gives large nonsense.
        split(x[:1], x[:1], time, path, denoiser.prediction)
    with torch.inference_mode(False):
        x = x.clone() if x.is_inference() else x
        x = x if x.dtype == torch.float64 else x.float()
        vectors, exact = probe_vectors(x, divergence, probes, seed)
        counted = CountedModel(denoiser.model)
        # Fixed steps are where they were asked for; adaptive ones go where the model is smoothest.
        ratios = path.noise_ratio(times)
        smooth = solver in ADAPTIVE and bool(torch.isfinite(ratios).all()) and bool((ratios > 0).all())
        places = ratios.asinh() if smooth else times
        watched_denoiser = Denoiser(counted, path, denoiser.prediction)
        flow = DensityFlow(watched_denoiser, vectors, exact, gradient, smooth, float(times[-1]))
        bar = _Bar(progress, float(times[0]), float(times[-1]))
        flow.watch = bar.reach
        try:
            latents, change = _solve(flow, x, places, solver, rtol, atol)
        finally:
            bar.close()
        if prior is None:
            scale = float(path.sigma(times[-1]))
            last = -0.5 * (latents.flatten(1) / scale).square().sum(1)
            last = last - latents[0].numel() * (math.log(scale) + 0.5 * math.log(2 * math.pi))
        else:
            last = prior(latents)
            if last.shape != x.shape[:1]:
                raise ValueError(f"prior must return shape {tuple(x.shape[:1])}, got {tuple(last.shape)}")
        estimates = last[:, None] + change
    error = estimates.std(1) / estimates.shape[1] ** 0.5 if estimates.shape[1] > 1 else None
    return LogLikelihood(estimates.mean(1), error, latents, counted.calls, float(times[0]))


def bits_per_dim(log_prob: Tensor, dimensions: int, levels: int = 256, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Bits for each dimension of quantised data, from the log density of its dequantised form.

    A value k of ``levels`` belongs to the cell ``low + (high - low) (k + u) / levels`` with u uniform in 0..1: evaluate
    the density on samples with such a u. For 8 bits in -1..1 the result is ``-log p / (d ln 2) + 7``.

    Args:
        log_prob: in nats (batch,).
        dimensions: of a sample, at least 1.
        levels: of the quantised data, at least 2.
        low: lower end of the scaled data.
        high: upper end, above ``low``.

    Returns:
        Bits for each dimension (batch,): an upper bound on average.

    Raises:
        ValueError: an argument out of range.
    """
    if dimensions < 1 or levels < 2:
        raise ValueError(f"dimensions must be at least 1 and levels at least 2, got {dimensions} and {levels}")
    if not high > low:
        raise ValueError(f"high must be above low, got {high} and {low}")
    return -log_prob / (dimensions * math.log(2)) + math.log2(levels / (high - low))


class _Bar:
    """A progress bar over a time that a solver moves through at its own pace."""

    def __init__(self, label: str | None, first: float, last: float) -> None:
        self._first, self._width = first, last - first
        self._ticks: Any = None if label is None else watched(range(101), label)
        self._done = 0

    def reach(self, time: float) -> None:
        """Say which time is reached."""
        while self._ticks is not None and self._done <= 100 * (time - self._first) / self._width and self._done < 100:
            next(self._ticks)
            self._done += 1

    def close(self) -> None:
        """Take the bar away."""
        if self._ticks is not None:
            self._ticks.close()


def _times(
    process: Process, solver: str, steps: int | None, spacing: Spacing | None, start: float | None, end: float | None
) -> Tensor:
    """Times from data to noise: the ends for adaptive solvers, all for the others."""
    if solver not in ADAPTIVE and solver not in FIXED:
        raise ValueError(f"solver must be one of {', '.join(ADAPTIVE + FIXED)}, got {solver!r}")
    if start is None:
        start = process.t_min
        if float(process.sigma(start)) == 0:
            start += _SMALLEST * (process.t_max - process.t_min)
    if solver in FIXED:
        if steps is None:
            raise ValueError(f"solver {solver!r} does not choose its steps: give steps")
        return time_grid(process, steps, spacing, start=end, end=start).flip(0)
    if steps is not None or spacing is not None:
        raise ValueError(f"steps and spacing must not be given: {solver!r} chooses them by rtol and atol")
    return time_grid(process, 1, "uniform", start=end, end=start).flip(0)


def _largest(state: tuple[Tensor, ...]) -> Tensor:
    """Norm of scaled errors: the root mean square of each sample's coordinates or log densities, largest of all."""
    return torch.stack([part.flatten(1).square().mean(1).amax() for part in state]).amax().sqrt()


def _solve(
    flow: DensityFlow, x: Tensor, places: Tensor, solver: str, rtol: float, atol: float
) -> tuple[Tensor, Tensor]:
    """Latents and the integral of the divergence (batch, estimates)."""
    try:
        import torchdiffeq
    except ImportError as error:
        raise ImportError('log_likelihood needs torchdiffeq: pip install "danlu[diffusion]"') from error
    places = places.to(device=x.device, dtype=torch.float32 if x.device.type == "mps" else torch.float64)
    state = (x, x.new_zeros(len(x), 1 if flow.exact else len(flow.vectors)))
    if solver in ADAPTIVE:
        # Without a step to the last place the solver would call the model beyond it and interpolate.
        options: dict[str, Any] = {"norm": _largest, "dtype": places.dtype, "step_t": places[-1:]}
    else:
        options = {"grid_constructor": lambda function, state, ends: places}
    settings: dict[str, Any] = {"method": solver, "rtol": rtol, "atol": atol, "options": options}
    ends = places[[0, -1]]
    try:
        with torch.set_grad_enabled(flow.gradient):
            latents, change = torchdiffeq.odeint(flow, state, ends, **settings)
    except AssertionError as error:
        raise FloatingPointError(
            f"no step is small enough at t = {flow.reached:g}: {error}; raise rtol and atol, or use float64"
        ) from error
    return latents[-1], change[-1]
