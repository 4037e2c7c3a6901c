"""Rotary position embedding: the only place in the library that rotates queries and keys."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

logger = logging.getLogger("danlu.positions")

Layout = Literal["half", "interleaved"]

# One block of rows stays in the second-level cache between the three passes over it (elements, not bytes).
_BLOCK_ELEMENTS = 1 << 18


def inverse_frequencies(dim: int, base: float = 10000.0) -> Tensor:
    """Give the angular frequencies `base ** (-2 i / dim)` of plain rotary embedding.

    Args:
        dim: number of rotated dims, even, at least 2.
        base: the base of the geometric series, finite and greater than 1.

    Returns:
        float64 tensor of shape (dim / 2,), radians per position, on the CPU.

    Raises:
        ValueError: `dim` is odd or below 2, or `base` is not a finite number above 1.

    Source: Scientific Spaces archive 8265; arXiv:2104.09864.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be an even number of at least 2, got {dim}")
    if not (math.isfinite(base) and base > 1):
        raise ValueError(f"base must be a finite number greater than 1, got {base}")
    # an explicit device: hosts build models under a default device that holds no numbers
    return float(base) ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)


def interleaved_to_half(x: Tensor) -> Tensor:
    """Reorder the last axis from pairs (2i, 2i+1) to pairs (i, i + dim/2).

    Args:
        x: tensor of shape (..., dim), `dim` even.

    Returns:
        Tensor of the same shape: vector entries, or rows of a transposed projection weight, in the half layout.

    Raises:
        ValueError: the last axis is odd.
    """
    _require_even(x)
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def half_to_interleaved(x: Tensor) -> Tensor:
    """Reorder the last axis from pairs (i, i + dim/2) to pairs (2i, 2i+1); the inverse of `interleaved_to_half`.

    Args:
        x: tensor of shape (..., dim), `dim` even.

    Returns:
        Tensor of the same shape in the interleaved layout.

    Raises:
        ValueError: the last axis is odd.
    """
    _require_even(x)
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def _require_even(x: Tensor) -> None:
    if x.shape[-1] % 2:
        raise ValueError(f"the last axis must be even to hold pairs, got {x.shape[-1]}")


@dataclass(frozen=True, eq=False)
class Rotary:
    """A rotation of some dims of a head by angles proportional to the position.

    Attributes:
        inv_freq: (dim / 2,) float64 on the CPU, radians per position; frequencies may already be rescaled.
        layout: "half" pairs dims (i, i + dim/2), "interleaved" pairs dims (2i, 2i + 1).
        start: first rotated dim of the head; dims outside [start, start + dim) pass through.

    Source: Scientific Spaces archive 8265; arXiv:2104.09864.
    """

    inv_freq: Tensor
    layout: Layout = "half"
    start: int = 0

    def __post_init__(self) -> None:
        if self.layout not in ("half", "interleaved"):
            raise ValueError(f'layout must be "half" or "interleaved", got {self.layout!r}')
        if self.inv_freq.ndim != 1 or not self.inv_freq.numel() or not bool(torch.isfinite(self.inv_freq).all()):
            raise ValueError(f"inv_freq must be a non-empty vector of finite numbers, got {self.inv_freq}")
        if self.start < 0:
            raise ValueError(f"start must be 0 or more, got {self.start}")
        # float64 on the CPU, so that angles stay exact for positions in the millions
        object.__setattr__(self, "inv_freq", self.inv_freq.detach().to("cpu", torch.float64))

    @property
    def dim(self) -> int:
        """Number of rotated dims."""
        return 2 * self.inv_freq.numel()

    def angles(
        self, positions: Tensor, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Give the cosines and sines of the rotation at each position.

        Args:
            positions: (...) integers or reals, in tokens, any sign.
            device: where the result lives; default: where `positions` lives.
            dtype: type of the result; the angles themselves are always built in float64.

        Returns:
            (cos, sin), each of shape (*positions.shape, dim / 2).
        """
        device = positions.device if device is None else device
        # some accelerators have no float64: build on the CPU there
        where = positions.device if positions.device.type in ("cpu", "cuda") else torch.device("cpu")
        angle = positions.to(where, torch.float64)[..., None] * self.inv_freq.to(where)
        return angle.cos().to(device, dtype), angle.sin().to(device, dtype)

    def apply(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate `x` by angles computed before; use it where several tensors share their positions.

        Args:
            x: (..., length, head_dim).
            cos: (length, dim / 2) or (batch, length, dim / 2), from `angles`.
            sin: like `cos`.

        Returns:
            Tensor like `x`; the arithmetic is float32, or float64 where `x` is float64.

        Raises:
            ValueError: the head is smaller than start + dim, or lengths disagree.
        """
        if x.shape[-1] < self.start + self.dim:
            raise ValueError(
                f"head_dim must be at least start + dim = {self.start + self.dim} for this Rotary, got {x.shape[-1]}"
            )
        if cos.shape[-2] not in (1, x.shape[-2]) or cos.shape[-1] * 2 != self.dim:
            raise ValueError(
                f"cos must be (length, dim / 2) or (batch, length, dim / 2) with length {x.shape[-2]} "
                f"and dim / 2 = {self.dim // 2}, got {tuple(cos.shape)}"
            )
        if cos.ndim == 3:
            shape = (cos.shape[0], *[1] * (x.ndim - 3), *cos.shape[1:])
            cos, sin = cos.reshape(shape), sin.reshape(shape)
        if torch.compiler.is_compiling():
            return _rotate_traced(x, cos, sin, self.layout, self.start)
        if torch.is_grad_enabled() and x.requires_grad:
            return _Rotate.apply(x, cos, sin, self.layout, self.start)
        return _rotate(x, cos, sin, self.layout, self.start)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate `x` to its positions.

        Args:
            x: (..., length, head_dim).
            positions: (length,) or (batch, length), or (1,) for one position shared by all rows; integers or reals,
                any sign.

        Returns:
            Tensor like `x`; the arithmetic is float32, or float64 where `x` is float64.

        Raises:
            ValueError: the head is smaller than start + dim, or lengths disagree.
        """
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return self.apply(x, *self.angles(positions, x.device, dtype))


class _Rotate(torch.autograd.Function):
    """Rotation whose gradient is the rotation by the opposite angle: nothing of size x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, start: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.where = layout, start
        return _rotate(x, cos, sin, layout, start)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        # `apply` again, so that a second derivative is right too
        return _Rotate.apply(grads[0], cos, -sin, *ctx.where), None, None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, start: int) -> Tensor:
    work = x if x.dtype == torch.float64 else x.float()
    cos, sin = cos.to(work.dtype), sin.to(work.dtype)
    out = torch.empty_like(work)
    half = cos.shape[-1]
    stop = start + 2 * half
    if start:
        out[..., :start] = work[..., :start]
    if stop < x.shape[-1]:
        out[..., stop:] = work[..., stop:]
    source, target = work[..., start:stop], out[..., start:stop]
    if layout == "interleaved" and _pairs_are_complex(source) and _pairs_are_complex(target):
        pairs = torch.view_as_complex(source.unflatten(-1, (half, 2)))
        torch.mul(pairs, torch.complex(cos, sin), out=torch.view_as_complex(target.unflatten(-1, (half, 2))))
        return out.to(x.dtype)
    cos2 = torch.cat((cos, cos), -1) if layout == "half" else cos.repeat_interleave(2, -1)
    rows = x.shape[-2]
    step = max(1, _BLOCK_ELEMENTS * rows // max(x.numel(), 1))
    for first in range(0, rows, step):
        block = slice(first, first + step)
        from_block, to_block = source[..., block, :], target[..., block, :]
        angle_block = block if cos.shape[-2] > 1 else slice(None)
        torch.mul(from_block, cos2[..., angle_block, :], out=to_block)
        (x1, x2), (y1, y2) = _pairs(from_block, layout), _pairs(to_block, layout)
        y1.addcmul_(x2, sin[..., angle_block, :], value=-1)
        y2.addcmul_(x1, sin[..., angle_block, :])
    return out.to(x.dtype)


def _rotate_traced(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, start: int) -> Tensor:
    """Say the same as `_rotate` in plain differentiable operations, for a compiler to fuse."""
    work = x if x.dtype == torch.float64 else x.float()
    stop = start + 2 * cos.shape[-1]
    x1, x2 = _pairs(work[..., start:stop], layout)
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    rotated = torch.cat((y1, y2), -1) if layout == "half" else torch.stack((y1, y2), -1).flatten(-2)
    return torch.cat((work[..., :start], rotated, work[..., stop:]), -1).to(x.dtype)


def _pairs(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    if layout == "half":
        return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x[..., 0::2], x[..., 1::2]


def _pairs_are_complex(x: Tensor) -> bool:
    """Tell whether adjacent pairs can be viewed as complex numbers without a copy."""
    return (
        x.device.type == "cpu"
        and x.stride(-1) == 1
        and x.storage_offset() % 2 == 0
        and all(stride % 2 == 0 for stride in x.stride()[:-1])
    )
