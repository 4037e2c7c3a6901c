"""Fill a feature map outwards from a visible block, by learned linear steps that all places and images share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Extrapolator", "LinearExtrapolator"]

MODES = ("tied", "inverse", "untied")
STEPS = ("recursive", "oneshot", "exp")
ORDERS = ("xy", "yx", "mean")
#: Above it the inverse of a step has lost half the digits of float32.
MAX_CONDITION = 1e4

#: Values beyond an edge, nearest first: (the block, its axis, from its end or its start, how many) -> list.
Walk = Callable[[Tensor, int, bool, int], list[Tensor]]


class Extrapolator(nn.Module):
    """What both orders share: checks, float32 arithmetic, and the way over the map."""

    def __init__(self, channels: int, steps: str, order: str) -> None:
        super().__init__()
        if isinstance(channels, bool) or not isinstance(channels, int):
            raise TypeError(f"channels must be a whole number, got {channels!r}")
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        check_choice("steps", steps, STEPS)
        check_choice("order", order, ORDERS)
        self.channels, self.steps, self.order = channels, steps, order

    def _matrix(self) -> nn.Parameter:
        return nn.Parameter(torch.zeros(self.channels, self.channels))

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """Follow the model to its device, but stay in float32: in bfloat16 small updates of I + A would be lost."""
        kept = {name: parameter.data for name, parameter in self.named_parameters()}
        super()._apply(fn, *args, **kwargs)
        for name, parameter in self.named_parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = kept[name].to(parameter.device)
        return self

    def forward(self, block: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
        """Fill the map around a block.

        Args:
            block: visible features, (batch, channels, rows, columns), any floating dtype; the steps are taken in
                float32, or float64 where block and matrices are.
            top: row of the map that the block's first row is, 0-based.
            left: the same for columns.
            height: rows of the map.
            width: columns of the map.

        Returns:
            The map (batch, channels, height, width) in the dtype of ``block``, equal to it where it is visible.

        Raises:
            ValueError: another number of channels, a block that does not lie in the map, or (``"inverse"``) a step that
                cannot be inverted.
        """
        if block.ndim != 4 or block.shape[1] != self.channels:
            raise ValueError(f"block must be (batch, {self.channels}, rows, columns), got {tuple(block.shape)}")
        rows, columns = block.shape[2:]
        if not (0 <= top <= height - rows and 0 <= left <= width - columns and rows and columns):
            raise ValueError(
                f"block of {rows} x {columns} cells at row {top}, column {left} must lie inside the map of "
                f"{height} x {width} cells"
            )
        across, along = (left, width - columns - left), (top, height - rows - top)
        with torch.autocast(block.device.type, enabled=False):
            wide = torch.promote_types(block.dtype, torch.float32)
            cells = block.movedim(1, -1).to(wide)
            x, y = self._walks(wide)
            filled = []
            if self.order != "yx":
                filled.append(_extend(_extend(cells, 2, x, *across), 1, y, *along))
            if self.order != "xy":
                filled.append(_extend(_extend(cells, 1, y, *along), 2, x, *across))
            full = filled[0] if len(filled) == 1 else (filled[0] + filled[1]) / 2
        return full.movedim(-1, 1).to(block.dtype)

    def _walks(self, dtype: torch.dtype) -> tuple[Walk, Walk]:
        raise NotImplementedError

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        raise NotImplementedError

    def commutator_penalty(self) -> Tensor:
        """``|AB - BA|^2 / (|A|^2 |B|^2)`` in the Frobenius norm, from 0 (the order does not matter) to 2.

        The mean over all pairs of a horizontal and a vertical matrix where steps are untied; 0 for zero matrices.
        """
        found = []
        for a, b in self._pairs():
            scale = a.square().sum() * b.square().sum()
            found.append((a @ b - b @ a).square().sum() / scale.clamp_min(torch.finfo(scale.dtype).tiny))
        return torch.stack(found).mean()

    def _neighbours(self, maps: Tensor, axis: int) -> Tensor:
        if maps.ndim != 4 or maps.shape[1] != self.channels:
            raise ValueError(f"maps must be (batch, {self.channels}, height, width), got {tuple(maps.shape)}")
        if self.steps == "exp":
            raise ValueError(
                "fit needs steps='recursive' or 'oneshot': what it finds is the step, and exp needs its logarithm"
            )
        return maps.detach().double().cpu().movedim(1 + axis, 0).movedim(2, -1)


class LinearExtrapolator(Extrapolator):
    r"""Features beyond a block by a first-order system with matrices that all places and images share.

        z_x = A z,  z_y = B z:   z(x+1, y) = (I + A) z(x, y),   z(x, y+1) = (I + B) z(x, y)

    One visible neighbour gives the next cell. Starts at A = B = 0, which repeats the edge of the block. Every solution
    of the system solves ``z_xx + S z_yy = 0`` with ``S = -A^2 (B^2)^-1``, the anisotropic Laplace equation.

    Args:
        channels: C of the map.
        mode: the step of -1. ``"tied"``: I - A, the literal reading of the equation, which misses the inverse by A^2
            per step; ``"inverse"``: (I + A)^-1; ``"untied"``: I + A' with matrices of its own, four in all.
        steps: n steps. ``"recursive"``: (I + A)^n; ``"oneshot"``: I + nA, and (I + nA)^-1 backwards with
            ``"inverse"``; ``"exp"``: exp(nA), with which tied and inverse are the same.
        order: ``"xy"`` fills the block's rows first and then all columns, ``"yx"`` the other way, ``"mean"`` averages
            both. All are equal where A and B commute.
        max_norm: cap on the spectral norm of every single step, above 0; n steps grow at most by its n-th power. With
            ``"oneshot"`` it is refused. Costs a singular value decomposition per step matrix.

    Raises:
        ValueError: an unknown option.

    Departures: the source names neither the step back nor the order; the sign and shape of both are options here.

    Source: Scientific Spaces archive 9359; arXiv:2211.13228
    """

    def __init__(
        self,
        channels: int,
        mode: str = "untied",
        steps: str = "recursive",
        order: str = "xy",
        max_norm: float | None = None,
    ) -> None:
        super().__init__(channels, steps, order)
        check_choice("mode", mode, MODES)
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be above 0 or None, got {max_norm}; 1.05 lets four steps grow by a fifth")
        if max_norm is not None and steps == "oneshot":
            raise ValueError("max_norm needs steps='recursive' or 'exp': with 'oneshot' growth is linear already")
        self.mode, self.max_norm = mode, max_norm
        self.a, self.b = self._matrix(), self._matrix()
        self.a_back: nn.Parameter | None = self._matrix() if mode == "untied" else None
        self.b_back: nn.Parameter | None = self._matrix() if mode == "untied" else None

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"{self.channels}, mode={self.mode!r}, steps={self.steps!r}, order={self.order!r}"

    def _walks(self, dtype: torch.dtype) -> tuple[Walk, Walk]:
        return self._axis("A", self.a, self.a_back, dtype), self._axis("B", self.b, self.b_back, dtype)

    def _axis(self, name: str, forward: Tensor, back: Tensor | None, dtype: torch.dtype) -> Walk:
        forward = forward.to(dtype)
        backward = -forward if back is None else back.to(dtype)
        eye = torch.eye(self.channels, dtype=dtype, device=forward.device)
        if self.steps == "oneshot":
            inverted = partial(_inverse, name) if self.mode == "inverse" else None
            return partial(_walk_oneshot, forward, backward, eye, inverted)
        if self.steps == "exp":
            ahead, behind = torch.linalg.matrix_exp(forward), torch.linalg.matrix_exp(backward)
        else:
            ahead = eye + forward
            behind = _inverse(name, ahead) if self.mode == "inverse" else eye + backward
        return partial(_walk_recursive, self._capped(ahead), self._capped(behind))

    def _capped(self, step: Tensor) -> Tensor:
        if self.max_norm is None:
            return step
        return step * (self.max_norm / torch.linalg.matrix_norm(step, 2)).clamp_max(1)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        if self.a_back is None or self.b_back is None:
            return [(self.a, self.b)]
        return [(a, b) for a in (self.a, self.a_back) for b in (self.b, self.b_back)]

    def anisotropy(self) -> Tensor:
        """S of ``z_xx + S z_yy = 0`` that the forward matrices imply, (channels, channels)."""
        return -torch.linalg.solve(self.b @ self.b, self.a @ self.a, left=False)

    @torch.no_grad()
    def fit(self, maps: Tensor) -> LinearExtrapolator:
        """Set the matrices by least squares on all neighbouring cells of whole maps.

        Args:
            maps: (batch, channels, height, width) with at least 2 rows and columns. Exact for a map that the system
                generates and whose cells span all channels; else the best, and of the smallest norm, in that sense.

        Returns:
            The module itself.

        Raises:
            ValueError: another number of channels, a map of one row or column, or ``steps="exp"``.
        """
        for axis, forward, back in ((2, self.a, self.a_back), (1, self.b, self.b_back)):
            line = self._neighbours(maps, axis)
            if len(line) < 2:
                raise ValueError(f"maps must have at least 2 rows and columns, got {tuple(maps.shape[2:])}")
            here, there = line[:-1].reshape(-1, self.channels), line[1:].reshape(-1, self.channels)
            forward.copy_(least_squares(here, there - here))
            if back is not None:
                back.copy_(least_squares(there, here - there))
        return self


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a value that is not among the known ones.

    Raises:
        ValueError: it is not.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _extend(cells: Tensor, axis: int, walk: Walk, before: int, after: int) -> Tensor:
    """Lengthen (batch, rows, columns, channels) along an axis by so many cells on each side."""
    start, end = walk(cells, axis, False, before), walk(cells, axis, True, after)
    parts = [torch.stack(start[::-1], axis)] if start else []
    parts.append(cells)
    if end:
        parts.append(torch.stack(end, axis))
    return torch.cat(parts, axis) if len(parts) > 1 else cells


def _walk_recursive(
    ahead: Tensor, behind: Tensor, cells: Tensor, axis: int, forwards: bool, count: int
) -> list[Tensor]:
    edge, step = cells.select(axis, -1 if forwards else 0), (ahead if forwards else behind).mT
    found = []
    for _ in range(count):
        edge = edge @ step
        found.append(edge)
    return found


def _walk_oneshot(
    ahead: Tensor, behind: Tensor, eye: Tensor, inverted: Any, cells: Tensor, axis: int, forwards: bool, count: int
) -> list[Tensor]:
    edge = cells.select(axis, -1 if forwards else 0)
    if inverted is not None and not forwards:
        return [edge @ inverted(eye + n * ahead).mT for n in range(1, count + 1)]
    change = edge @ (ahead if forwards else behind).mT if count else edge
    return [edge + n * change for n in range(1, count + 1)]


def _inverse(name: str, step: Tensor) -> Tensor:
    inverse, failed = torch.linalg.inv_ex(step)
    with torch.no_grad():
        condition = torch.linalg.matrix_norm(step, 1) * torch.linalg.matrix_norm(inverse, 1)
    if failed or not condition <= MAX_CONDITION:
        raise ValueError(
            f"the condition of I + {name} must be at most {MAX_CONDITION:g} with mode='inverse', got "
            f"{float(condition):.3g} (1-norm); train at a lower rate, or use mode='untied'"
        )
    return inverse


def least_squares(inputs: Tensor, outputs: Tensor) -> Tensor:
    """M with outputs = M inputs for rows of both."""
    return torch.linalg.lstsq(inputs, outputs, driver="gelsd").solution.mT
