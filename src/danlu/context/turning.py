"""Rotations with their angles remembered, shared by all layers of a model that turn alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from danlu.positions.dynamic import segments
from danlu.positions.rotary import Rotary
from danlu.positions.scaling import rescaled

_FIRST_TABLE = 1024


class Turner:
    """Turns rows at positions 0, 1, 2, ... (times ``multiplier``), from a table that doubles when it runs out.

    Args:
        rotary: frequencies, layout and dims.
        multiplier: positions are multiplied by this before they turn anything.
        scaling: factor on cos and sin, so on the turned dims of both queries and keys.
    """

    def __init__(self, rotary: Rotary, multiplier: float = 1.0, scaling: float = 1.0):
        self.rotary, self.multiplier, self.scaling = rotary, multiplier, scaling
        self._table: tuple[Tensor, Tensor] | None = None
        self._constant: tuple[Any, Tensor, Tensor] | None = None

    def _angles(self, positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = self.rotary.angles(positions.double() * self.multiplier, x.device, dtype)
        return (cos, sin) if self.scaling == 1 else (cos * self.scaling, sin * self.scaling)

    def _slice(self, start: int, stop: int, x: Tensor) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            return self._angles(torch.arange(start, stop, device=x.device), x)
        table = self._table
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        if table is None or len(table[0]) < stop or table[0].device != x.device or table[0].dtype != wide:
            size = _FIRST_TABLE
            while size < stop:
                size *= 2
            table = self._table = self._angles(torch.arange(size, device=x.device), x)
        return table[0][start:stop], table[1][start:stop]

    def turn(self, x: Tensor, start: int) -> Tensor:
        """Turn rows of (..., length, head_dim) at positions start, start + 1, ..."""
        return self.rotary.apply(x, *self._slice(start, start + x.shape[-2], x))

    def turn_at(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn (batch, heads, length, head_dim) at positions (batch, length)."""
        return self.rotary.apply(x, *self._angles(positions, x))

    def turn_by(self, x: Tensor, position: float) -> Tensor:
        """Turn all rows by one position, which the multiplier does not touch."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        key = (position, x.device, dtype)
        known = self._constant if self._constant is not None and self._constant[0] == key else None
        if known is None or torch.compiler.is_compiling():
            cos, sin = self.rotary.angles(torch.tensor([position]), x.device, dtype)
            known = (key, cos * self.scaling, sin * self.scaling)
            if not torch.compiler.is_compiling():
                self._constant = known
        return self.rotary.apply(x, known[1], known[2])


class DynamicTables:
    """One ``Turner`` per factor of a dynamic method, made when first needed.

    Args:
        rotary: the model's own rotation.
        rescaling: name of the rescaling in ``danlu.positions.scaling``.
        trained_length: tokens the model was trained on.
        growth: ratio of neighbouring factors.
        options: further options of the rescaling.
    """

    def __init__(self, rotary: Rotary, rescaling: str, trained_length: int, growth: float, options: dict[str, Any]):
        self.rotary, self.rescaling, self.trained_length = rotary, rescaling, trained_length
        self.growth, self.options = growth, options
        self._turners: dict[float, Turner] = {}

    def segments(self, start: int, stop: int) -> list[tuple[int, int, float]]:
        """Runs of rows (first, last + 1, factor) that share a factor."""
        return segments(start, stop, self.trained_length, self.growth)

    def __getitem__(self, factor: float) -> Turner:
        if factor not in self._turners:
            inv_freq, scaling = rescaled(
                self.rotary.inv_freq,
                self.rescaling,
                factor=factor,
                trained_length=self.trained_length,
                **self.options,
            )
            rotary = Rotary(inv_freq, self.rotary.layout, self.rotary.start)
            self._turners[factor] = Turner(rotary, scaling=scaling)
        return self._turners[factor]
