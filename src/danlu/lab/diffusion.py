"""Claims on the training of diffusion models."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from danlu.diffusion.losses import csm_loss, irreducible_loss, score_matching_loss
from danlu.diffusion.mixtures import GaussianMixture
from danlu.diffusion.processes import VP
from danlu.lab.claim import Check, Context, Evidence, Plot, Table
from danlu.lab.runner import claim
from danlu.lab.training import seeded

_BATCHES = (4, 16, 64, 256)
_STEPS, _BATCH = 1500, 256


@claim(
    name="score-matching",
    title="Conditional score matching is score matching plus a constant",
    source="archive 9509; Vincent 2011",
    statement="The loss on each sample's own noise and the loss on the true score differ by a number without the "
    "model, and estimating the true score by a ratio of two batch means instead is biased in small batches.",
    measurement="A mixture of two Gaussians on the line, noised to alpha = 0.6, sigma = 0.8, where the true score is "
    "known: both losses of four models by drawn samples; two networks trained from the same weights, one with each "
    "loss; bias of the ratio estimator and of the conditional loss by batch size.",
    seeds=(0,),
    budget=40,
)
def score_matching(context: Context) -> Evidence:
    """Compare both losses, both trained networks, and both estimators."""
    mixture, process = line_mixture(), VP()
    t = float(process.time_of(math.log(0.6 / 0.8)))
    models: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "zero": lambda x, t: 0 * x,
        "-x": lambda x, t: -x,
        "true score": lambda x, t: mixture.score(x, t, process),
        "true score + sin(3x)": lambda x, t: mixture.score(x, t, process) + torch.sin(3 * x),
    }
    seed = context.seeds[0]
    rows, gaps = [], []
    for name, model in models.items():
        matching, conditional, floor, error = both_losses(model, mixture, process, t, 400_000, seed)
        rows.append((name, matching, conditional, conditional - matching, error))
        gaps.append(abs(conditional - matching - floor) / error)
    ratio, plain = [], []
    for size in context.track(_BATCHES, description="estimators", total=len(_BATCHES)):
        ratio.append(ratio_bias(mixture, process, t, size, 40_000, seed))
        plain.append(conditional_bias(mixture, process, t, size, 40_000, seed))
    curves = {
        name: trained_errors(name == "conditional", mixture, process, t, seed, context)
        for name in ("conditional", "known score")
    }
    final = {name: curve[-1] for name, curve in curves.items()}
    sizes = [str(size) for size in _BATCHES]
    falls = [before / after for before, after in pairwise(ratio)]
    checks = (
        Check(
            "the gap of both losses is the constant for every model, within 4 standard errors",
            max(gaps) <= 4,
            f"at most {max(gaps):.1f} standard errors from {floor:.4f}",
        ),
        Check(
            "both trained networks have a mean squared error of the score below 0.01",
            max(final.values()) < 0.01,
            ", ".join(f"{name} {value:.4f}" for name, value in final.items()),
        ),
        Check(
            "the ratio estimator is biased at batch 4 by more than 10 times its bias at batch 256",
            ratio[0] > 10 * ratio[-1],
            ", ".join(f"{value:.3f} at {size}" for value, size in zip(ratio, sizes, strict=True)),
        ),
        Check(
            "its bias falls with the batch: by 2.5 to 8 times for every fourfold batch",
            all(2.5 <= fall <= 8 for fall in falls),
            ", ".join(f"{fall:.1f}" for fall in falls),
        ),
        Check(
            "the conditional loss has no bias at any batch size, within 4 standard errors",
            max(abs(bias) / error for bias, error in plain) <= 4,
            ", ".join(
                f"{bias:+.4f} +- {error:.4f} at {size}" for (bias, error), size in zip(plain, sizes, strict=True)
            ),
        ),
    )
    return Evidence(
        summary=f"Conditional and plain score matching differ by {floor:.4f} whatever the model; both train to errors "
        f"of {final['conditional']:.4f} and {final['known score']:.4f}. The ratio estimator is off by {ratio[0]:.2f} "
        f"at batch 4 and by {ratio[-1]:.3f} at 256, the conditional loss by nothing.",
        checks=checks,
        tables=(
            Table("Both losses", ("model", "score matching", "conditional", "gap", "standard error"), tuple(rows)),
            Table(
                "Bias by batch size",
                ("batch", "ratio estimator", "conditional loss", "standard error"),
                tuple((size, value, *pair) for size, value, pair in zip(_BATCHES, ratio, plain, strict=True)),
            ),
        ),
        plots=(
            Plot(
                "Bias by batch size",
                "batch size",
                "mean absolute bias",
                _BATCHES,
                {"ratio estimator": tuple(ratio), "conditional loss": tuple(abs(bias) for bias, _ in plain)},
                log_x=True,
            ),
            Plot(
                "Error of the trained score",
                "step",
                "mean squared error",
                tuple(range(100, _STEPS + 1, 100)),
                {name: tuple(curve) for name, curve in curves.items()},
            ),
        ),
        notes=("The networks see one noise level and one dimension, where the true score is known.",),
    )


def line_mixture() -> GaussianMixture:
    """The mixture on the line of this claim."""
    return GaussianMixture(
        torch.tensor([0.3, 0.7]), torch.tensor([[-2.0], [1.0]]), torch.tensor([0.25, 0.64], dtype=torch.float64)
    )


def both_losses(
    model: Callable[[Tensor, Tensor], Tensor], mixture: GaussianMixture, process: VP, t: float, count: int, seed: int
) -> tuple[float, float, float, float]:
    """Plain and conditional loss of a model that gives the score, their constant, and the standard error of the gap."""
    generator = torch.Generator().manual_seed(seed)
    x0 = mixture.draw(count, generator)
    noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    times = torch.full((count,), t, dtype=torch.float64)
    x = process.add_noise(x0, noise, times)
    plain = score_matching_loss(model, x, t, process, mixture.score(x, t, process), "score")
    conditional = csm_loss(model, x0, process, "score", t=times, noise=noise)
    floor = irreducible_loss(mixture.posterior_variance(x, t, process), process, t)
    gap = conditional - plain - floor
    return float(plain.mean()), float(conditional.mean()), float(floor.mean()), float(gap.std()) / math.sqrt(count)


def ratio_bias(mixture: GaussianMixture, process: VP, t: float, size: int, repeats: int, seed: int) -> float:
    """Mean over ``x_t`` of the absolute bias of a score estimated from batches of this size.

    The estimate is the ratio of two means over the batch, of ``p(x_t | x_0)`` times its score and of ``p(x_t | x_0)``.
    """
    generator = torch.Generator().manual_seed(seed)
    x0 = mixture.draw(32, generator)
    noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    x = process.add_noise(x0, noise, t)
    alpha, sigma = process.alpha(t), process.sigma(t)
    total = torch.zeros(len(x), dtype=torch.float64)
    chunk = max(1, 8192 // size)  # as many batches at once as stay in the cache
    rounds = repeats // chunk
    for _ in range(rounds):
        batch = alpha * mixture.draw(chunk * size, generator).reshape(chunk, 1, size)
        share = (-0.5 * ((x - batch) / sigma).square()).softmax(-1)
        total += (share * (batch - x) / sigma**2).sum(-1).sum(0)
    return float((total / (rounds * chunk) - mixture.score(x, t, process)[:, 0]).abs().mean())


def conditional_bias(
    mixture: GaussianMixture, process: VP, t: float, size: int, repeats: int, seed: int
) -> tuple[float, float]:
    """Bias of the conditional loss of the true score over batches of this size, and its standard error."""
    generator = torch.Generator().manual_seed(seed)
    x0 = mixture.draw(size * repeats // 16, generator)
    times = torch.full((len(x0),), t, dtype=torch.float64)
    losses = csm_loss(lambda x, t: mixture.score(x, t, process), x0, process, "score", t=times, seed=generator).reshape(
        -1, size
    )
    means = losses.mean(1)
    return float(means.mean()) - exact_constant(mixture, process, t), float(means.std()) / math.sqrt(len(means))


def exact_constant(mixture: GaussianMixture, process: VP, t: float) -> float:
    """The constant between both losses, for a mixture on the line, by quadrature."""
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)[:, None]
    floor = irreducible_loss(mixture.posterior_variance(x, t, process), process, t)
    return float((mixture.log_prob(x, t, process).exp() * floor).sum() * (x[1, 0] - x[0, 0]))


def trained_errors(
    conditional: bool, mixture: GaussianMixture, process: VP, t: float, seed: int, context: Context
) -> list[float]:
    """Mean squared error of a trained score, every 100 steps; both losses see the same weights and the same samples."""
    with seeded(seed):
        network = nn.Sequential(nn.Linear(1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)).double()
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS)
    generator = torch.Generator().manual_seed(seed + 1)
    held_out = process.add_noise(
        mixture.draw(4000, generator), torch.randn(4000, 1, generator=generator, dtype=torch.float64), t
    )
    truth = mixture.score(held_out, t, process)
    times = torch.full((_BATCH,), t, dtype=torch.float64)
    label = "conditional loss" if conditional else "known score"
    errors = []
    for step in context.track(range(1, _STEPS + 1), description=label, total=_STEPS):
        x0 = mixture.draw(_BATCH, generator)
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
        if conditional:
            losses = csm_loss(lambda x, t: network(x), x0, process, "score", t=times, noise=noise)
        else:
            x = process.add_noise(x0, noise, times)
            losses = score_matching_loss(
                lambda x, t: network(x), x, times, process, mixture.score(x, times, process), "score"
            )
        optimiser.zero_grad()
        losses.mean().backward()
        optimiser.step()
        rates.step()
        if step % 100 == 0:
            with torch.no_grad():
                errors.append(float((network(held_out) - truth).square().mean()))
    return errors
