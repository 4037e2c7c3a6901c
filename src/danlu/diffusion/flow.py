"""Flow matching: the loss that teaches a network the derivative of a path, and the exact answer for a data set.

Convention: t = 0 is the data, t = 1 the prior; a velocity points from data to prior, for the straight line
``x_1 - x_0`` (noise minus data), and sampling integrates it from 1 down to 0. So do diffusers' flow-matching
schedulers, which tell the network 1000 t. Code in which t = 1 is the data has the opposite sign: see `FlowNetwork`.

Source: Scientific Spaces archives 9497 and 9379; arXiv:2209.03003, arXiv:2210.02747.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from danlu.diffusion.couplings import Coupling
from danlu.diffusion.paths import LinearPath, Path, ScaledPath
from danlu.diffusion.process import Process, Time, per_sample, widened
from danlu.diffusion.steps import Solver, Walk, draw_noise, home_of
from danlu.diffusion.times import TimeSampler, UniformTimes

#: Called as ``model(x, t)`` with x (batch, ...) and t (batch,); returns the shape of x.
VelocityModel = Callable[..., Any]


def flow_matching_loss(
    model: VelocityModel,
    x0: Tensor,
    x1: Tensor | None = None,
    t: Tensor | None = None,
    *,
    path: Path | None = None,
    coupling: Coupling | None = None,
    times: TimeSampler | None = None,
    weighting: Callable[[Tensor], Tensor] | None = None,
    condition: Mapping[str, Any] | None = None,
    seed: int | torch.Generator | None = None,
) -> Tensor:
    """Squared distance between the network's velocity and the derivative of the path.

    Its minimum is the mean derivative at each point, which carries the prior to the data. The minimum is not 0: what is
    left is the spread of the derivatives at one point, which depends on path and coupling, so that losses of different
    couplings say nothing about each other. For `LinearPath` and a Gaussian prior it is `denoising_loss` of
    ``RectifiedFlow()`` with prediction ``velocity``.

    Args:
        model: called as ``model(x, t, **condition)`` with t (batch,) in the times of the path; returns the shape of x.
        x0: data (batch, ...).
        x1: of the prior, the shape of ``x0``; drawn from the standard Gaussian unless given.
        t: the times (batch,) in place of drawn ones.
        path: `LinearPath` unless given.
        coupling: reorders data and prior within the batch, such as `MinibatchOT`; None leaves pairs as they are.
        times: what draws the times; ``UniformTimes()`` unless given, for large networks ``LogitNormalTimes()``, and
            `ShiftedTimes` for large images.
        weighting: factors (batch,) of the loss by the times (batch,).
        condition: keyword arguments of the model.
        seed: a seed, or a generator on the CPU, of what is drawn. A loop passes one generator to all its steps.

    Returns:
        Loss of each sample (batch,), averaged over its elements, in float32 or better.

    Raises:
        ValueError: shapes that differ, times outside the path, a path with wrong ends, or nothing to draw from.
        TypeError: data that is not floating-point.

    Source: Scientific Spaces archive 9497; arXiv:2209.03003, arXiv:2210.02747.
    """
    path = LinearPath() if path is None else path
    if x0.dim() < 2 or not len(x0):
        raise ValueError(f"x0 must be (batch, ...) with at least one sample of one axis, got shape {tuple(x0.shape)}")
    if t is not None and times is not None:
        raise ValueError("give either t or times, not both")
    if seed is None and (t is None or x1 is None or coupling is not None):
        raise ValueError("seed must be a generator or a number where t, x1 or a coupling is drawn, got None")
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    if x1 is None:
        x1 = draw_noise(tuple(x0.shape), generator, widened(x0).dtype, x0.device)  # type: ignore[arg-type]
    if t is None:
        t = (times or UniformTimes())(len(x0), path.clock, generator)
    if tuple(t.shape) != (len(x0),):
        raise ValueError(f"t must hold one time for each of the {len(x0)} samples, got shape {tuple(t.shape)}")
    if coupling is not None:
        x0, x1 = coupling(x0, x1, generator)  # type: ignore[arg-type]
    x, velocity = path.sample(x0, x1, t)
    loss = (predict(model, x, t, condition) - velocity).square().flatten(1).mean(1)
    if weighting is None:
        return loss
    factors = torch.as_tensor(weighting(t)).to(loss)
    if factors.shape != loss.shape:
        raise ValueError(f"weighting must return shape {tuple(loss.shape)}, got {tuple(factors.shape)}")
    return factors * loss


def predict(model: VelocityModel, x: Tensor, t: Tensor, condition: Mapping[str, Any] | None = None) -> Tensor:
    """The model's velocity in float32 or better; x goes in in the type of its weights, times in float32 or better.

    Raises:
        TypeError: the model returns no tensor.
        ValueError: the model returns another shape.
    """
    home = home_of(model)
    dtype = x.dtype if home is None else home[1]
    times = t.to(device=x.device, dtype=torch.promote_types(dtype, torch.float32))
    output = model(x.to(dtype), times, **(condition or {}))
    if not isinstance(output, Tensor):
        raise TypeError(f"model must return a tensor, got {type(output).__name__}: wrap it in FlowNetwork")
    if output.shape != x.shape:
        raise ValueError(f"model must return the shape of x {tuple(x.shape)}, got {tuple(output.shape)}")
    return widened(output)


@dataclass(frozen=True)
class ShiftedTimes:
    """Times pushed towards the prior, ``s t / (1 + (s - 1) t)``: images with more pixels need more noise.

    The network is told the shifted time, because it is the time.

    Args:
        shift: s, above 0; 3 is usual for latents of a million pixels.
        times: sampler whose times are shifted.

    Raises:
        ValueError: a shift that is not above 0; a path whose times are not 0..1.

    Source: arXiv:2403.03206.
    """

    shift: float
    times: TimeSampler = field(default_factory=UniformTimes)

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift must be above 0 and finite, got {self.shift}")

    def __call__(self, count: int, process: Process, generator: torch.Generator | None = None) -> Tensor:
        """Draw times."""
        if (process.t_min, process.t_max) != (0, 1):
            raise ValueError(f"shifted times need a path from 0 to 1, got {process.t_min:g} to {process.t_max:g}")
        t = self.times(count, process, generator)
        return self.shift * t / (1 + (self.shift - 1) * t)


@dataclass(frozen=True)
class RK4(Solver):
    """The classical Runge-Kutta method of fourth order in the process's own time: for the pairs of a reflow.

    Four calls in each interval, one of them at its end: the velocity must be finite at the last time.
    """

    calls: ClassVar[int] = 4

    def integrate(self, walk: Walk, x: Tensor) -> Iterator[Tensor]:
        """Four calls in each interval."""
        for t, u in walk.intervals:
            middle, step = (t + u) / 2, per_sample(u - t, x)
            first = walk.velocity(x, t)
            second = walk.velocity(x + step / 2 * first, middle)
            third = walk.velocity(x + step / 2 * second, middle)
            last = walk.velocity(x + step * third, u)
            x = x + step / 6 * (first + 2 * (second + third) + last)
            yield x


def dataset_velocity(
    x: Tensor,
    t: Time,
    data: Tensor,
    path: ScaledPath | None = None,
    *,
    weights: Tensor | None = None,
    prior_log_prob: Callable[[Tensor], Tensor] | None = None,
    chunk: int = 256,
) -> Tensor:
    """What the best network would answer if the data were exactly these samples.

    ``v*(x, t) = sum_i w_i f_t(x | x_0i)``: the derivatives of the trajectories through x, weighted by how probable each
    is, ``w_i ~ p_t(x | x_0i) p_0(i)``, with the softmax of the log densities. The coupling is the independent one.

    Args:
        x: points (batch, ...).
        t: a time, or one for each point, at which the prior has a share.
        data: samples (count, ...).
        path: any path that is linear in the prior; `LinearPath` unless given.
        weights: of the samples (count,), positive; equal unless given.
        prior_log_prob: log density of the prior, (n, ...) to (n,); standard Gaussian unless given.
        chunk: samples of the data at a time; the work needs memory for batch * chunk points.

    Returns:
        A tensor of the shape of x, in float32 or better.

    Raises:
        ValueError: shapes that do not fit, weights that are not positive, a time without a share of the prior, or a
            point that no trajectory reaches.

    Source: Scientific Spaces archives 9379 and 9497.
    """
    path = LinearPath() if path is None else path
    if data.shape[1:] != x.shape[1:] or not len(data):
        raise ValueError(
            f"data must be (count, ...) with samples of shape {tuple(x.shape[1:])}, got {tuple(data.shape)}"
        )
    if weights is not None and (weights.shape != data.shape[:1] or not bool((weights > 0).all())):
        raise ValueError(f"weights must be {len(data)} positive numbers, got shape {tuple(weights.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    x = widened(x)
    total = torch.zeros_like(x)
    mass = x.new_zeros(len(x))
    top = x.new_full((len(x),), -math.inf)
    for start in range(0, len(data), chunk):
        part = data[start : start + chunk].to(x)
        points = x.repeat_interleave(len(part), 0)
        sources = part.repeat(len(x), *[1] * (x.dim() - 1))
        at = t.repeat_interleave(len(part)) if isinstance(t, Tensor) and t.dim() else t
        score = path.conditional_log_prob(points, sources, at, prior_log_prob).view(len(x), -1)
        if weights is not None:
            score = score + weights[start : start + chunk].to(x).log()
        velocities = path.conditional_velocity(points, sources, at).view(len(x), len(part), -1)
        new = torch.maximum(top, score.amax(1))
        # A point that no trajectory has reached yet: nothing to rescale, and no difference of infinities.
        shift = torch.where(torch.isfinite(new), new, torch.zeros_like(new))
        share, old = (score - shift[:, None]).exp(), (top - shift).exp()
        total = per_sample(old, x) * total + torch.einsum("bn,bnd->bd", share, velocities).view_as(x)
        mass, top = old * mass + share.sum(1), new
    if bool((mass == 0).any()):
        lost = int((mass == 0).nonzero()[0])
        raise ValueError(f"no trajectory from data to prior reaches x[{lost}] at this time: its density is 0")
    return total / per_sample(mass, x)
