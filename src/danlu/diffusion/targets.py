"""What a diffusion model predicts, and the exact conversions between the kinds.

Every kind is linear in data and noise, ``c = p x_0 + q eps``; with ``x_t = alpha x_0 + sigma eps`` this is a system of
two equations, and ``delta = alpha q - sigma p`` is its determinant.

Source: Scientific Spaces archives 9209 and 9497; arXiv:2011.13456, arXiv:2202.00512 (v).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from danlu.diffusion.process import Process, Time, per_sample, widened

Prediction = Literal["epsilon", "sample", "v", "score", "velocity"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)


def check_prediction(kind: str, name: str = "prediction") -> None:
    """Refuse a kind that is not one of `PREDICTIONS`."""
    if kind not in PREDICTIONS:
        raise ValueError(f"{name} must be one of {', '.join(PREDICTIONS)}, got {kind!r}")


def components(process: Process, t: Time, kind: Prediction) -> tuple[Tensor, Tensor]:
    """Coefficients p and q of a kind: the prediction is ``p x_0 + q eps``.

    Args:
        process: gives alpha and sigma.
        t: a time, or one for each sample.
        kind: ``epsilon`` (the noise), ``sample`` (the data), ``v`` = ``alpha eps - sigma x_0``, ``score`` =
            ``-eps / sigma``, or ``velocity`` = ``alpha' x_0 + sigma' eps``, the right side of the ODE.

    Returns:
        Two float64 tensors of the shape of ``t``.
    """
    check_prediction(kind)
    sigma = process.sigma(t)
    zero, one = torch.zeros_like(sigma), torch.ones_like(sigma)
    if kind == "epsilon":
        return zero, one
    if kind == "sample":
        return one, zero
    if kind == "v":
        return -sigma, process.alpha(t)
    if kind == "score":
        return zero, -1 / sigma
    return process.alpha_prime(t), process.sigma_prime(t)


def split(prediction: Tensor, x: Tensor, t: Time, process: Process, source: Prediction) -> tuple[Tensor, Tensor]:
    """Data and noise that a prediction stands for.

    Args:
        prediction: of the model, the shape of ``x``.
        x: the noised samples (batch, ...).
        t: their time, or one time for each.
        process: that noised them.
        source: kind of the prediction.

    Returns:
        Data and noise, each of the shape of ``x``, in float32 or better.

    Raises:
        ValueError: unknown kind, shapes that differ, or a kind that says nothing at this time: the noise where alpha is
            0, the data where sigma is 0.
    """
    if prediction.shape != x.shape:
        raise ValueError(f"prediction must have the shape of x {tuple(x.shape)}, got {tuple(prediction.shape)}")
    p, q = components(process, t, source)
    alpha, sigma = process.alpha(t), process.sigma(t)
    delta = alpha * q - sigma * p
    if not torch.compiler.is_compiling() and not bool((torch.isfinite(delta) & (delta != 0)).all()):
        end = "alpha" if bool((alpha == 0).any()) else "sigma"
        other = "sample, v or velocity" if end == "alpha" else "epsilon, v or velocity"
        raise ValueError(f"a prediction of kind {source!r} determines nothing where {end} is 0: use {other} there")
    p, q, alpha, sigma, delta = (per_sample(value, x) for value in (p, q, alpha, sigma, delta))
    prediction, x = widened(prediction), widened(x)
    return (q * x - sigma * prediction) / delta, (alpha * prediction - p * x) / delta


def convert(prediction: Tensor, x: Tensor, t: Time, process: Process, source: Prediction, target: Prediction) -> Tensor:
    """Turn a prediction of one kind into another, exactly.

    Args:
        prediction: of the model, the shape of ``x``.
        x: the noised samples (batch, ...).
        t: their time, or one time for each.
        process: that noised them.
        source: kind of the prediction.
        target: kind wanted.

    Returns:
        A tensor of the shape of ``x``, in float32 or better.

    Raises:
        ValueError: unknown kind, shapes that differ, or a kind that says nothing at this time.

    Source: Scientific Spaces archive 9209.
    """
    check_prediction(target, "target")
    data, noise = split(prediction, x, t, process, source)
    if target == "sample":
        return data
    if target == "epsilon":
        return noise
    p, q = components(process, t, target)
    return per_sample(p, x) * data + per_sample(q, x) * noise


@dataclass(frozen=True)
class Denoiser:
    """A model together with its process and what it predicts: gives any other kind.

    Args:
        model: called as ``model(x, t)`` with x (batch, ...) and t (batch,) in the dtype of x; returns the shape of x.
            Wrap conditions and guidance into it (``functools.partial`` serves).
        process: that its training noise came from.
        prediction: kind of its output.

    Raises:
        ValueError: unknown kind.
        TypeError: the process is none, or the model cannot be called.
    """

    model: Callable[..., Any]
    process: Process
    prediction: Prediction = "epsilon"

    def __post_init__(self) -> None:
        check_prediction(self.prediction)
        if not isinstance(self.process, Process):
            raise TypeError(f"process must be a Process such as VP() or EDM(), got {self.process!r}")
        if not callable(self.model):
            raise TypeError(f"model must be callable as model(x, t), got {type(self.model).__name__}")

    def predict(self, x: Tensor, t: Time) -> Tensor:
        """The model's own output in float32 or better: one call."""
        times = torch.as_tensor(t).to(device=x.device, dtype=x.dtype)
        return widened(self.model(x, times.expand(len(x)) if times.dim() == 0 else times))

    def _as(self, x: Tensor, t: Time, kind: Prediction) -> Tensor:
        output = self.predict(x, t)
        return output if kind == self.prediction else convert(output, x, t, self.process, self.prediction, kind)

    def components(self, x: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """Data and noise predicted for x at t: one call."""
        return split(self.predict(x, t), x, t, self.process, self.prediction)

    def sample(self, x: Tensor, t: Time) -> Tensor:
        """The data predicted for x at t."""
        return self._as(x, t, "sample")

    def epsilon(self, x: Tensor, t: Time) -> Tensor:
        """The noise predicted in x at t."""
        return self._as(x, t, "epsilon")

    def score(self, x: Tensor, t: Time) -> Tensor:
        """The gradient of the log density of x at t."""
        return self._as(x, t, "score")

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """The right side of the probability-flow ODE at x and t."""
        return self._as(x, t, "velocity")
