"""Stochastic rounding to half precision: what rounding loses on average is nothing."""

from __future__ import annotations

import torch
from torch import Tensor


def stochastic_round_(target: Tensor, source: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Write ``source`` into ``target``, rounding up or down at random so that the expected result is ``source``.

    An entry between two neighbours of the target's type goes to the nearer one more often, in proportion to the
    distance. Values that the type holds exactly are copied, and so are infinities and NaN. An entry beyond the largest
    finite value becomes infinite, as with ordinary rounding, and one below it never does.

    Args:
        target: bfloat16 or float16, any shape; written in place.
        source: float32 of the same shape.
        generator: on the device of ``target``; none means the global state.

    Returns:
        ``target``.

    Raises:
        TypeError: other dtypes.
        ValueError: shapes that differ.

    Source: Gupta et al., arXiv:1502.02551.
    """
    if target.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"target must be bfloat16 or float16, got {target.dtype}")
    if source.dtype != torch.float32:
        raise TypeError(f"source must be float32, got {source.dtype}")
    if target.shape != source.shape:
        raise ValueError(f"source must have the shape of target {tuple(target.shape)}, got {tuple(source.shape)}")
    draw = torch.rand(source.shape, generator=generator, device=source.device)
    return target.copy_(rounded(source, target.dtype, draw))


def rounded(source: Tensor, dtype: torch.dtype, draw: Tensor) -> Tensor:
    """What ``stochastic_round_`` writes, given its draws: float32 in, half precision out, without checks.

    Args:
        source: float32, any shape.
        dtype: bfloat16 or float16.
        draw: uniform in [0, 1), the shape of ``source``.

    Returns:
        A new tensor.
    """
    nearest = source.to(dtype)
    error = source - nearest
    # Neighbours of one sign are neighbours as integers; zero steps to the smallest subnormal of the error's sign.
    up = error > 0
    step = (up == (nearest > 0)).to(torch.int16) * 2 - 1
    smallest = up.logical_not().to(torch.int16) * -32768 + 1
    neighbour = torch.where(nearest == 0, smallest, nearest.view(torch.int16) + step).view(dtype)
    gap = (neighbour.float() - nearest.float()).abs()
    moved = (draw * gap < error.abs()) & torch.isfinite(neighbour) & torch.isfinite(nearest)
    return torch.where(moved, neighbour, nearest)
