"""Diffusion written out: schedules by name, mixtures by ``torch.distributions`` and Bayes, integrals by quadrature."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

#: alpha and sigma of a time, in plain formulas.
SCHEDULES = {
    "VP": (
        lambda t: torch.exp(-(0.1 * t + 19.9 * t**2 / 2) / 2),
        lambda t: torch.sqrt(1 - torch.exp(-(0.1 * t + 19.9 * t**2 / 2))),
    ),
    "SubVP": (
        lambda t: torch.exp(-(0.1 * t + 19.9 * t**2 / 2) / 2),
        lambda t: 1 - torch.exp(-(0.1 * t + 19.9 * t**2 / 2)),
    ),
    "VE": (lambda t: 0 * t + 1, lambda t: 0.01 * 5000**t),
    "EDM": (lambda t: 0 * t + 1, lambda t: 1 * t),
    "RectifiedFlow": (lambda t: 1 - t, lambda t: 1 * t),
    "Cosine": (lambda t: torch.cos(t * math.pi / 2), lambda t: torch.sin(t * math.pi / 2)),
}


def derivative(function, t: Tensor) -> Tensor:
    """Of a function of each time, by reverse-mode differentiation."""
    t = t.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(t).sum(), t, allow_unused=True)
    return torch.zeros_like(t) if slope is None else slope


def noised_mixture(weights, means, covariances, alpha: float, sigma: float):
    """The distribution of ``alpha x_0 + sigma eps`` for a mixture with full covariances."""
    means = torch.as_tensor(means, dtype=torch.float64)
    covariances = torch.as_tensor(covariances, dtype=torch.float64)
    noise = sigma**2 * torch.eye(means.shape[1], dtype=torch.float64)
    return torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.as_tensor(weights, dtype=torch.float64)),
        torch.distributions.MultivariateNormal(alpha * means, alpha**2 * covariances + noise),
    )


def autograd_score(distribution, x: Tensor) -> Tensor:
    """Gradient of the log density."""
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(distribution.log_prob(x).sum(), x)[0]


def posterior(weights, means, covariances, alpha: float, sigma: float, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of ``x_0`` given one ``x_t``, by conditioning the joint Gaussian of every component."""
    weights, means, covariances = np.asarray(weights, float), np.asarray(means, float), np.asarray(covariances, float)
    log_share, centres, spreads = [], [], []
    for weight, mean, covariance in zip(weights, means, covariances, strict=True):
        total = alpha**2 * covariance + sigma**2 * np.eye(len(x))
        offset = x - alpha * mean
        gain = alpha * covariance @ np.linalg.inv(total)
        centres.append(mean + gain @ offset)
        spreads.append(covariance - gain @ (alpha * covariance))
        log_share.append(
            math.log(weight) - 0.5 * np.linalg.slogdet(total)[1] - 0.5 * offset @ np.linalg.solve(total, offset)
        )
    share = np.exp(np.array(log_share) - np.logaddexp.reduce(log_share))
    mean = sum(s * c for s, c in zip(share, centres, strict=True))
    second = sum(s * (v + np.outer(c, c)) for s, c, v in zip(share, centres, spreads, strict=True))
    return mean, second - np.outer(mean, mean)


def mixture_integrals(weights, means, deviations, alpha: float, sigma: float, model) -> dict[str, float]:
    """Score matching, conditional score matching and their difference for a mixture on the line, by quadrature.

    Args:
        weights: of the components.
        means: of the components.
        deviations: standard deviations of the components.
        alpha: share of the data.
        sigma: noise.
        model: the score as a function of an array.
    """
    weights, means, deviations = (np.asarray(values, float) for values in (weights, means, deviations))
    x = np.linspace(-30, 30, 600_001)
    scale = np.sqrt(alpha**2 * deviations**2 + sigma**2)
    part = weights / scale / math.sqrt(2 * math.pi)
    joint = part * np.exp(-0.5 * ((x[:, None] - alpha * means) / scale) ** 2)
    density = joint.sum(1)
    score = (joint * (alpha * means - x[:, None]) / scale**2).sum(1) / np.maximum(density, 1e-300)
    step = x[1] - x[0]
    sm = float((density * (score - model(x)) ** 2).sum() * step)
    fisher = float((density * score**2).sum() * step)
    nodes, masses = np.polynomial.hermite_e.hermegauss(80)
    masses = masses / masses.sum()
    csm = 0.0
    for weight, mean, deviation in zip(weights, means, deviations, strict=True):
        x0, noise = np.meshgrid(mean + deviation * nodes, nodes, indexing="ij")
        error = (-noise / sigma - model(alpha * x0 + sigma * noise)) ** 2
        csm += float(weight * (masses[:, None] * masses * error).sum())
    return {"sm": sm, "csm": csm, "constant": 1 / sigma**2 - fisher}
