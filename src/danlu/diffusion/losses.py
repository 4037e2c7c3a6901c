"""Training losses of diffusion models: conditional score matching in every kind of prediction, with exact weights.

Score matching, the squared distance to the score of the noised data, cannot be computed, because that score is not
known. Conditional score matching takes the score ``-eps / sigma`` of each sample's own noise instead, and differs from
it by a number that does not depend on the model: same gradient, same minimum, a floor above 0.

Source: Scientific Spaces archive 9509; Vincent 2011; weights: arXiv:2011.13456, arXiv:2101.09258.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from danlu.diffusion.process import Process, Time, per_sample, widened
from danlu.diffusion.targets import PREDICTIONS, Denoiser, Prediction, components
from danlu.diffusion.times import TimeSampler, UniformTimes

#: In which kind the squared error is taken, or ``likelihood``, or a function of the times (batch,) that multiplies the
#: error in the model's own kind.
Weighting = Prediction | Literal["likelihood"] | Callable[[Tensor], Tensor]


def denoising_loss(
    model: Callable[..., Any],
    x0: Tensor,
    process: Process,
    prediction: Prediction = "epsilon",
    *,
    weighting: Weighting | None = None,
    times: TimeSampler | None = None,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | torch.Generator | None = None,
) -> Tensor:
    """Loss of a model that is asked for the noise, the data, or a mixture of the two, in noised samples.

    Args:
        model: called as ``model(x, t)`` with x (batch, ...) and t (batch,); returns the shape of x. Conditions are
            wrapped into it, for example by ``functools.partial``.
        x0: data (batch, ...).
        process: that noises it.
        prediction: kind of the model's output: ``epsilon``, ``sample``, ``v``, ``score`` or ``velocity``.
        weighting: kind in which the squared error is taken, if not the model's own; ``likelihood``, which is the error
            of the score times half of ``g^2``; or a function of the times (batch,) that gives the factors (batch,) of
            the error in the model's own kind. Kinds differ by a factor that depends on the time alone.
        times: what draws the times; `UniformTimes` unless given.
        t: the times (batch,) in place of drawn ones.
        noise: standard Gaussian noise of the shape of ``x0`` in place of drawn noise.
        seed: a seed, or a generator on the CPU, of what is drawn. A loop passes one generator to all its steps: a
            number draws the same each time.

    Returns:
        Loss of each sample (batch,), averaged over its elements, in float32 or better.

    Raises:
        ValueError: an unknown kind; times and noise that do not fit ``x0``; times outside the process, or at which the
            weight is not finite; nothing to draw from.

    Source: Scientific Spaces archive 9509; arXiv:2011.13456, arXiv:2202.00512, arXiv:2209.03003.
    """
    denoiser = Denoiser(model, process, prediction)
    t, noise = _drawn(x0, process, times, t, noise, seed)
    x = process.add_noise(x0, noise, t)
    p, q = components(process, t, prediction)
    target = per_sample(p, x) * widened(x0) + per_sample(q, x) * widened(noise)
    output = denoiser.predict(x, t)
    if output.shape != x.shape:
        raise ValueError(f"model must return the shape of x {tuple(x.shape)}, got {tuple(output.shape)}")
    error = (output - target).square().flatten(1).mean(1)
    if weighting is None or weighting == prediction:
        return error
    return loss_weight(process, t, prediction, weighting).to(error) * error


def loss_weight(process: Process, t: Time, prediction: Prediction, weighting: Weighting) -> Tensor:
    """Factor between the squared error of a prediction and the weighted loss.

    With ``c = p x_0 + q eps`` and ``delta = alpha q - sigma p``, two kinds of one prediction have errors in the ratio
    of their ``delta^2``, because they are read off at the same ``x_t``.

    Args:
        process: gives alpha and sigma.
        t: a time, or one for each sample.
        prediction: kind of the model's output.
        weighting: as in `denoising_loss`.

    Returns:
        A float64 tensor of the shape of ``t``.

    Raises:
        ValueError: an unknown kind, or a factor that is not finite or negative at one of the times.
    """
    if callable(weighting):
        weight = torch.as_tensor(weighting(torch.as_tensor(t)))
    else:
        kind: Prediction = "score" if weighting == "likelihood" else weighting
        if kind not in PREDICTIONS:
            raise ValueError(
                f"weighting must be one of {', '.join(PREDICTIONS)}, likelihood, or a function of the times, "
                f"got {weighting!r}"
            )
        weight = (_determinant(process, t, kind) / _determinant(process, t, prediction)).square()
        if weighting == "likelihood":
            weight = weight * process.diffusion_squared(t) / 2
    bad = ~(torch.isfinite(weight) & (weight >= 0))
    if bool(bad.any()):
        at = (torch.as_tensor(t).expand(weight.shape)[bad]).flatten()[0]
        raise ValueError(
            f"weighting {weighting!r} of a {prediction} prediction must be finite and not negative, got "
            f"{float(weight[bad].flatten()[0]):g} at t = {float(at):g}: keep the times away from the end that has no "
            "noise or no data, or take another weighting"
        )
    return weight


def csm_loss(
    model: Callable[..., Any],
    x0: Tensor,
    process: Process,
    prediction: Prediction = "epsilon",
    **options: Any,
) -> Tensor:
    """Conditional score matching ``|s(x_t, t) + eps / sigma|^2``, summed over the elements.

    It is `denoising_loss` with the errors of the score, unless ``weighting`` says otherwise, as a sum. Its expectation
    is that of `score_matching_loss` and, on top, `irreducible_loss`.

    Args:
        model: as in `denoising_loss`.
        x0: data (batch, ...).
        process: that noises it.
        prediction: kind of the model's output.
        options: of `denoising_loss`.

    Returns:
        Loss of each sample (batch,).

    Source: Scientific Spaces archive 9509; Vincent 2011.
    """
    options.setdefault("weighting", "score")
    return denoising_loss(model, x0, process, prediction, **options) * x0[0].numel()


def score_matching_loss(
    model: Callable[..., Any], x: Tensor, t: Time, process: Process, score: Tensor, prediction: Prediction = "epsilon"
) -> Tensor:
    """Squared distance to a score that is known, summed over the elements.

    Args:
        model: as in `denoising_loss`.
        x: noised samples (batch, ...).
        t: their time, or one time for each.
        process: that noised them.
        score: gradient of the log density at x and t, as `GaussianMixture.score` gives it for a mixture.
        prediction: kind of the model's output.

    Returns:
        Loss of each sample (batch,) in float32 or better.

    Raises:
        ValueError: an unknown kind, or a score of another shape than x.
    """
    if score.shape != x.shape:
        raise ValueError(f"score must have the shape of x {tuple(x.shape)}, got {tuple(score.shape)}")
    return (Denoiser(model, process, prediction).score(x, t) - widened(score)).square().flatten(1).sum(1)


def irreducible_loss(
    posterior_variance: Tensor, process: Process, t: Time, weighting: Prediction | Literal["likelihood"] = "score"
) -> Tensor:
    """What no model can predict: the floor of the loss, summed over the elements.

    For the score it is the constant between conditional score matching and score matching, ``C = (alpha^2 / sigma^4)
    E tr Cov(x_0 | x_t) = d / sigma^2 - E |score|^2``; the floor of the noise is ``sigma^2 C``, that of the data the
    variance itself. The distance of a training loss from it is what is left to learn.

    Args:
        posterior_variance: trace of ``Cov(x_0 | x_t)`` (batch,), as `GaussianMixture.posterior_variance` gives it for
            noised samples, or its mean.
        process: that noises the data.
        t: a time, or one for each.
        weighting: kind in which the error is taken.

    Returns:
        A tensor of the shape of ``posterior_variance``.

    Raises:
        ValueError: an unknown kind, or a factor that is not finite.

    Source: Scientific Spaces archive 9509.
    """
    return loss_weight(process, t, "sample", weighting).to(posterior_variance) * posterior_variance


def _determinant(process: Process, t: Time, kind: Prediction) -> Tensor:
    p, q = components(process, t, kind)
    return process.alpha(t) * q - process.sigma(t) * p


def _drawn(
    x0: Tensor,
    process: Process,
    times: TimeSampler | None,
    t: Tensor | None,
    noise: Tensor | None,
    seed: int | torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Times and noise, given or drawn, on the device of the data."""
    if x0.dim() < 2 or not len(x0):
        raise ValueError(f"x0 must be (batch, ...) with at least one sample of one axis, got shape {tuple(x0.shape)}")
    if t is not None and times is not None:
        raise ValueError("give either t or times, not both")
    if seed is None and (t is None or noise is None):
        raise ValueError("seed must be a generator or a number where t or noise is drawn, got None")
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    if t is None:
        t = (times or UniformTimes())(len(x0), process, generator)
    if tuple(t.shape) != (len(x0),):
        raise ValueError(f"t must hold one time for each of the {len(x0)} samples, got shape {tuple(t.shape)}")
    if noise is None:
        noise = torch.randn(x0.shape, generator=generator, dtype=widened(x0).dtype)
    if noise.shape != x0.shape:
        raise ValueError(f"noise must have the shape of x0 {tuple(x0.shape)}, got {tuple(noise.shape)}")
    return process.check_times(t).to(x0.device), noise.to(x0.device)
