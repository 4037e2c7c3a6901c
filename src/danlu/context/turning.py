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
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}  # one per device: layers may live on several
        self._constants: dict[Any, tuple[Tensor, Tensor]] = {}

    def _angles(self, positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary.angles(positions.double() * self.multiplier, x.device, _wide(x))
        return (cos, sin) if self.scaling == 1 else (cos * self.scaling, sin * self.scaling)

    def _slice(self, start: int, stop: int, x: Tensor) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            return self._angles(torch.arange(start, stop, device=x.device), x)
        key = (x.device, _wide(x))
        table = self._tables.get(key)
        if table is None or len(table[0]) < stop:
            size = _FIRST_TABLE
            while size < stop:
                size *= 2
            table = self._tables[key] = self._angles(torch.arange(size, device=x.device), x)
        return table[0][start:stop], table[1][start:stop]

    def turn(self, x: Tensor, start: int) -> Tensor:
        """Turn rows of (..., length, head_dim) at positions start, start + 1, ..."""
        return self.rotary.apply(x, *self._slice(start, start + x.shape[-2], x))

    def turn_at(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn (batch, heads, length, head_dim) at positions (batch, length)."""
        return self.rotary.apply(x, *self._angles(positions, x))

    def turn_by(self, x: Tensor, position: float) -> Tensor:
        """Turn all rows by one position, which the multiplier does not touch."""
        key = (x.device, _wide(x), position)
        known = None if torch.compiler.is_compiling() else self._constants.get(key)
        if known is None:
            cos, sin = self.rotary.angles(torch.tensor([position]), x.device, _wide(x))
            known = (cos * self.scaling, sin * self.scaling)
            if not torch.compiler.is_compiling():
                self._constants[key] = known
        return self.rotary.apply(x, *known)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
