"""Lion and Tiger as their articles write them: one tensor, micro-step by micro-step, in the terms of m itself."""

from __future__ import annotations

import torch
from torch import Tensor


def rms(x: Tensor, by_row: bool) -> Tensor:
    return (x * x).mean(-1, keepdim=True).sqrt() if by_row else (x * x).mean().sqrt()


def tiger(
    theta: Tensor,
    gradients: list[Tensor],
    *,
    k: int = 1,
    b: float = 0.965,
    alpha: float = 1e-3,
    lam: float = 0.01,
    rule: str = "rms",
    floor: float = 0.0,
    s: float = 0.99,
    c: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Theta and m after all gradients; the mean of a window is in m, and gradients that are not finite are left out."""
    theta, m = theta.clone(), torch.zeros_like(theta)
    decayed = False
    for t, g in enumerate(gradients, 1):
        if (t - 1) % k == 0:
            decayed = False
        if torch.isfinite(g).all():
            m = (m if decayed else b * m) + (1 - b) / k * g
            decayed = True
        else:
            theta = (theta - c) * s + c
        if t % k == 0 and decayed:
            if rule == "half":
                theta = theta - 0.5 * alpha * torch.sign(m)
            elif rule == "plain":
                theta = theta - alpha * (torch.sign(m) + lam * theta)
            else:
                eta = alpha * rms(theta, rule == "row_rms").clamp(min=floor)
                theta = theta - eta * (torch.sign(m) + lam * theta)
    return theta, m


def lion(
    theta: Tensor, gradients: list[Tensor], *, b1: float, b2: float, eta: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Theta and m after all gradients; m moves after the update."""
    theta, m = theta.clone(), torch.zeros_like(theta)
    for g in gradients:
        u = torch.sign(b1 * m + (1 - b1) * g)
        theta = theta - eta * (u + lam * theta)
        m = b2 * m + (1 - b2) * g
    return theta, m
