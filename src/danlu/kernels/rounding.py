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
    nearest = source.to(target.dtype)
    error = source - nearest
    # Neighbours of one sign are neighbours as integers; zero steps to the smallest subnormal of the error's sign.
    bits = nearest.view(torch.int16)
    away = (error > 0) == (nearest > 0)
    step = torch.where(away, 1, -1).to(torch.int16)
    smallest = torch.where(error > 0, 1, -32767).to(torch.int16)
    neighbour = torch.where(nearest == 0, smallest, bits + step).view(target.dtype)
    gap = (neighbour.float() - nearest.float()).abs()
    draw = torch.rand(source.shape, generator=generator, device=source.device)
    moved = (draw * gap < error.abs()) & torch.isfinite(neighbour) & torch.isfinite(nearest)
    return target.copy_(torch.where(moved, neighbour, nearest))
