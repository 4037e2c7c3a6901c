"""Quantisers written out number by number in Python floats and dense float64 matrices; no code of the module."""

from __future__ import annotations

import math

import torch


def fsq_digit(z: float, levels: int, kind: str) -> int:
    """Digit of one number by the distance to the values at which the code changes."""
    borders = [fsq_border(k, levels, kind) for k in range(1, levels)]
    return sum(z > border for border in borders)


def fsq_border(k: int, levels: int, kind: str) -> float:
    """The z between digits k - 1 and k: where the bounded value is k - 1/2."""
    if kind == "sigmoid":
        share = (k - 0.5) / (levels - 1)
        return math.log(share / (1 - share))
    half = (levels - 1) * (1 + min(1e-3, 0.5 / (levels - 1))) / 2
    offset = 0.0 if levels % 2 else 0.5
    centred = k - 0.5 - levels // 2 + offset
    return math.atanh(centred / half) - math.atanh(offset / half)


def fsq_code(digit: int, levels: int, kind: str) -> float:
    """Code of a digit."""
    if kind == "sigmoid":
        return 2 * digit / (levels - 1) - 1
    return (digit - levels // 2) / (levels // 2)


def fsq_slope(z: float, levels: int, kind: str) -> float:
    """Derivative of the code before rounding."""
    if kind == "sigmoid":
        s = 1 / (1 + math.exp(-z))
        return (levels - 1) * s * (1 - s) / ((levels - 1) / 2)
    half = (levels - 1) * (1 + min(1e-3, 0.5 / (levels - 1))) / 2
    shift = 0.0 if levels % 2 else math.atanh(0.5 / half)
    return (1 - math.tanh(z + shift) ** 2) * half / (levels // 2)


def mixed_radix(digits: list[int], levels: list[int]) -> int:
    """Index of digits, the first one fastest, in Python ints of any size."""
    index = 0
    for digit, count in reversed(list(zip(digits, levels, strict=True))):
        index = index * count + digit
    return index


def digits_of(index: int, levels: list[int]) -> list[int]:
    """The inverse."""
    digits = []
    for count in levels:
        index, digit = divmod(index, count)
        digits.append(digit)
    return digits


def nearest(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the nearest row by all distances, float64."""
    differences = z.double()[:, None] - codebook.double()[None]
    return differences.square().sum(-1).argmin(1)


def rotation_matrix(z: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """The turn in the plane of z and e that takes the direction of z to that of e, times ``|e|/|z|``.

    Built from an orthonormal basis of the plane and the angle, not from reflections.
    """
    z, e = z.double(), e.double()
    u = z / z.norm()
    across = e - (e @ u) * u
    sine, cosine = across.norm() / e.norm(), (e @ u) / e.norm()
    n = across / across.norm()
    plane = torch.outer(u, u) + torch.outer(n, n)
    turn = torch.eye(len(z), dtype=torch.float64) - plane
    turn += cosine * plane + sine * (torch.outer(n, u) - torch.outer(u, n))
    return turn * e.norm() / z.norm()


def entropies(z: torch.Tensor, temperature: float) -> tuple[float, float]:
    """Mean entropy of the softmax over all sign vectors, and entropy of its mean, in nats."""
    bits = z.shape[1]
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * bits).view(-1, bits)
    distances = (z.double()[:, None] - signs[None]).square().sum(-1)
    p = torch.softmax(-distances / temperature, 1)
    mean = p.mean(0)
    return float(-(p * p.log()).sum(1).mean()), float(-(mean * mean.log()).sum())
