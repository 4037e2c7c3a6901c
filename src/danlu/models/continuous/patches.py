"""Images as sequences of continuous patches, in any order, and back without loss."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["patch_order", "patchify", "token_statistics", "unpatchify"]

Order = Literal["raster", "zigzag", "spiral", "random"]
_ORDERS = ("raster", "zigzag", "spiral", "random")


def patch_order(order: Order | str, rows: int, columns: int, *, seed: int = 0) -> Tensor:
    """Which patch of a grid comes first, second, ... in a sequence.

    Args:
        order: ``raster`` (row by row), ``zigzag`` (along the anti-diagonals from the top left corner, every second one
            backwards, as JPEG reads a block), ``spiral`` (clockwise from the top left corner inwards) or ``random``
            (one permutation of all, from ``seed``). Flip the result for the opposite direction.
        rows: patches from top to bottom, >= 1.
        columns: patches from left to right, >= 1.
        seed: of ``random``.

    Returns:
        int64 (rows * columns,): entry i is the raster index ``row * columns + column`` of the i-th patch.

    Raises:
        ValueError: an unknown order, or an empty grid.

    Source: Scientific Spaces archive 10197
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"rows and columns must be at least 1, got {rows} and {columns}")
    if order == "raster":
        return torch.arange(rows * columns)
    if order == "random":
        return torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))
    if order == "zigzag":
        cells = [(row, column) for row in range(rows) for column in range(columns)]
        # Odd diagonals are read downwards, even ones upwards.
        cells.sort(key=lambda cell: (sum(cell), cell[0] if sum(cell) % 2 else cell[1]))
        return torch.tensor([row * columns + column for row, column in cells])
    if order == "spiral":
        left = torch.arange(rows * columns).view(rows, columns)
        taken = []
        while left.numel():
            taken.append(left[0])
            # With the top row gone, a quarter turn to the left puts the next side on top.
            left = left[1:].rot90()
        return torch.cat(taken)
    raise ValueError(f"order must be one of {', '.join(_ORDERS)} or a permutation, got {order!r}")


def patchify(
    images: Tensor, patch_size: int | tuple[int, int], order: Order | str | Tensor = "raster", *, seed: int = 0
) -> Tensor:
    """Cut images into patches and put these into a sequence.

    Args:
        images: (batch, channels, height, width).
        patch_size: height and width of a patch in pixels, or one number for both; they divide the image's.
        order: a name, see :func:`patch_order`, or a permutation (patches,) or (batch, patches): entry i is the raster
            index of the i-th patch.
        seed: of order ``random``.

    Returns:
        ``(batch, patches, channels * patch height * patch width)``; a token holds its channels one after the other.

    Raises:
        ValueError: a patch that does not divide the image, or an order that is no permutation.

    Source: Scientific Spaces archive 10197
    """
    if images.ndim != 4:
        raise ValueError(f"images must be (batch, channels, height, width), got shape {tuple(images.shape)}")
    batch, channels, height, width = images.shape
    high, wide, rows, columns = _grid(height, width, patch_size)
    grid = images.reshape(batch, channels, rows, high, columns, wide)
    tokens = grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * high * wide)
    index = _permutation(order, rows, columns, batch, seed).to(images.device)
    return tokens.gather(1, index[..., None].expand_as(tokens))


def unpatchify(
    tokens: Tensor,
    patch_size: int | tuple[int, int],
    size: tuple[int, int],
    order: Order | str | Tensor = "raster",
    *,
    seed: int = 0,
) -> Tensor:
    """Put the patches of :func:`patchify` together again, bit for bit.

    Args:
        tokens: (batch, patches, channels * patch height * patch width).
        patch_size: as for patchify.
        size: height and width of the images in pixels.
        order: as for patchify.
        seed: as for patchify.

    Returns:
        ``(batch, channels, height, width)``.

    Raises:
        ValueError: tokens that do not make up images of this size, or an order that is no permutation.

    Source: Scientific Spaces archive 10197
    """
    high, wide, rows, columns = _grid(*size, patch_size)
    if tokens.ndim != 3 or tokens.shape[1] != rows * columns or tokens.shape[2] % (high * wide):
        raise ValueError(
            f"tokens must be (batch, {rows * columns}, channels * {high * wide}) for images of {size[0]} x {size[1]}, "
            f"got shape {tuple(tokens.shape)}"
        )
    batch, channels = len(tokens), tokens.shape[2] // (high * wide)
    index = _permutation(order, rows, columns, batch, seed).to(tokens.device)
    raster = torch.empty_like(tokens).scatter_(1, index[..., None].expand_as(tokens), tokens)
    grid = raster.reshape(batch, rows, columns, channels, high, wide)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, *size)


def token_statistics(tokens: Tensor, *, per_dimension: bool = False) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of tokens, as a model's configuration stores them.

    Args:
        tokens: (..., token_dim), of the training set.
        per_dimension: one pair for each of a token's dimensions instead of one for all. A dimension that hardly varies
            would be blown up: its standard deviation is taken as at least 1% of the largest.

    Returns:
        Means and standard deviations, lists of length 1 or token_dim.

    Raises:
        ValueError: tokens that are all equal, or not finite.
    """
    values = tokens.double().flatten(0, -2) if per_dimension else tokens.double().reshape(-1, 1)
    mean, std = values.mean(0), values.std(0, unbiased=False)
    largest = float(std.max())
    if not (largest > 0 and math.isfinite(largest)):
        raise ValueError(f"tokens must be finite and vary, got a standard deviation of {largest}")
    return mean.tolist(), std.clamp_min(0.01 * largest).tolist()


def _grid(height: int, width: int, patch_size: int | tuple[int, int]) -> tuple[int, int, int, int]:
    """Patch height and width, rows and columns."""
    high, wide = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if high < 1 or wide < 1 or height % high or width % wide or not height or not width:
        raise ValueError(
            f"patch_size must divide the image: {height} x {width} pixels are no multiple of {high} x {wide}; pad or "
            "crop the images, or take another patch"
        )
    return high, wide, height // high, width // wide


def _permutation(order: Order | str | Tensor, rows: int, columns: int, batch: int, seed: int) -> Tensor:
    """(batch, patches) raster indices."""
    if isinstance(order, str):
        return patch_order(order, rows, columns, seed=seed).expand(batch, -1)
    count = rows * columns
    index = torch.as_tensor(order)
    if index.shape not in ((count,), (batch, count)) or index.is_floating_point():
        raise ValueError(
            f"order must be a name or integers of shape ({count},) or ({batch}, {count}), got shape "
            f"{tuple(index.shape)} of {index.dtype}"
        )
    index = index.long().expand(batch, count)
    if not torch.equal(index.sort(-1).values, torch.arange(count, device=index.device).expand(batch, count)):
        raise ValueError(f"order must hold each of 0..{count - 1} once in every row")
    return index
