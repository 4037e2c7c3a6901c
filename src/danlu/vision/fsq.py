"""Finite scalar quantisation: bound every channel, round it, and read the digits as one index. No codebook, no loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from danlu.vision.quantizer import Quantizer, QuantizerOutput, require, working

#: Recommended levels by number of codes that they stand in for (the paper's table, and two smaller ones).
RECOMMENDED: dict[int, tuple[int, ...]] = {
    2**4: (5, 3),
    2**6: (8, 8),
    2**8: (8, 6, 5),
    2**9: (8, 8, 8),
    2**10: (8, 5, 5, 5),
    2**11: (8, 8, 6, 5),
    2**12: (7, 5, 5, 5, 5),
    2**14: (8, 8, 8, 6, 5),
    2**16: (8, 8, 8, 5, 5, 5),
}
#: Beyond this float32 cannot tell neighbouring levels of one channel.
MOST_LEVELS = 2**20
#: Rows of a table that are worth building at once.
_LARGEST_TABLE = 2**24
# Vectors that share a row: kernels over an inner axis of 4 channels alone are several times slower.
_TOGETHER = 64


class FSQ(Quantizer):
    """Finite scalar quantisation: each of d channels is bounded and rounded to one of its L levels.

    With ``c = (L - 1)/2``, the bounded value, digit and code of a channel are

    - ``tanh``: ``b = tanh(z + shift) h + c``, ``h = (L - 1)(1 + eps)/2``, ``shift = atanh(1/(2h))`` for even L and 0
      for odd L; digit ``k = round(b)``, code ``(k - floor(L/2)) / floor(L/2)``. The value 0 is the middle of a code for
      every L; even L have one code more below zero than above.
    - ``sigmoid``: ``b = (L - 1) sigmoid(z)``; digit ``k = round(b)``, code ``(k - c)/c``. Symmetric for every L; for
      even L, 0 is the border between two codes.

    For odd L, ``sigmoid`` at 2z gives the digits of ``tanh`` at z. The index is ``sum_j k_j w_j``, ``w_j`` the product
    of the levels before j (the first channel moves fastest), in int64 from the rounded numbers: a bijection onto
    ``0..prod(L) - 1`` for every list of levels, with no table. Gradients pass the rounding unchanged and end at the
    bound: ``(1 - tanh^2) h / floor(L/2)`` and ``2 s (1 - s)``. Training and evaluation give the same numbers.

    Departures from the source: ``eps = min(1e-3, 1/(2 (L - 1)))``, since 1e-3 leaves the range from L = 1001 on;
    ``atanh`` and ``1 + eps`` where the paper's code has ``tan`` and ``1 - eps``; codes of ``sigmoid`` are in [-1, 1],
    not in [0, 1].

    Args:
        levels: levels per channel, ints from 2 to 2**20, product at most 2**63. At least 5 each is recommended.
        dim: length of the vectors; where it is not ``len(levels) * num_codebooks``, a linear map leads in and one out.
        num_codebooks: groups of channels with an index each.
        bound: ``tanh``, ``sigmoid``, or ``auto``: ``sigmoid`` where L = 2, ``tanh`` elsewhere.
        channel_dim: axis of the vectors, see :class:`danlu.vision.quantizer.Quantizer`.
        noise: share of values that are not rounded in training but get noise of the width of a level, in (0, 1]; None:
            none. Indices are always of the rounded values.
        seed: of the noise.

    Raises:
        TypeError: levels are not ints.
        ValueError: levels or their product out of range, L = 2 with ``bound="tanh"``, or another option out of range.

    Source: Scientific Spaces archive 9826; arXiv:2309.15505; noise: arXiv:2411.19842
    """

    table: Tensor

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        num_codebooks: int = 1,
        bound: Literal["auto", "tanh", "sigmoid"] = "auto",
        channel_dim: int = -1,
        noise: float | None = None,
        seed: int = 0,
    ) -> None:
        levels = _checked(levels)
        if isinstance(num_codebooks, bool) or not isinstance(num_codebooks, int) or num_codebooks < 1:
            raise ValueError(f"num_codebooks must be an int >= 1, got {num_codebooks!r}")
        if bound not in ("auto", "tanh", "sigmoid"):
            raise ValueError(f"bound must be 'auto', 'tanh' or 'sigmoid', got {bound!r}")
        if bound == "tanh" and 2 in levels:
            raise ValueError(
                f"levels must be at least 3 with bound='tanh', got {levels}; 'auto' takes sigmoid where L = 2"
            )
        if noise is not None and not 0 < noise <= 1:
            raise ValueError(f"noise must be None or in (0, 1], got {noise}; 0.5 is usual")
        width = len(levels) * num_codebooks
        super().__init__(width if dim is None else dim, (math.prod(levels),) * num_codebooks, channel_dim)
        self.levels = levels
        self.bound_kind = bound
        self.noise = noise
        self.seed = seed
        self._constants = _constants(levels, bound)
        self._generators: dict[torch.device, torch.Generator] = {}
        self.register_buffer("table", self._make_table(torch.float32, None), persistent=False)
        self.projected = self.dim != width
        self.project_in: nn.Module = nn.Linear(self.dim, width) if self.projected else nn.Identity()
        self.project_out: nn.Module = nn.Linear(width, self.dim) if self.projected else nn.Identity()

    @classmethod
    def from_codebook_size(cls, size: int, **options: Any) -> FSQ:
        """FSQ with the recommended levels for about ``size`` codes.

        Args:
            size: 2**4, 2**6, 2**8 to 2**12, 2**14 or 2**16, without 2**13; the product of the levels is a little less
                (a little more at 2**12).
            options: of the class.

        Raises:
            ValueError: another size.
        """
        if size not in RECOMMENDED:
            raise ValueError(
                f"size must be one of {', '.join(map(str, RECOMMENDED))}, got {size}; or give levels yourself"
            )
        return cls(RECOMMENDED[size], **options)

    @property
    def config(self) -> dict[str, Any]:
        """See the base class."""
        return {
            "kind": "fsq",
            "levels": list(self.levels),
            "dim": self.dim,
            "num_codebooks": self.num_codebooks,
            "bound": self.bound_kind,
            "channel_dim": self.channel_dim,
            "noise": self.noise,
            "seed": self.seed,
        }

    @property
    def codebook(self) -> Tensor:
        """All codes in the order of their indices, float32 (codebook_size, len(levels)), made when asked for.

        Raises:
            ValueError: more than 2**24 codes; ``decode`` the indices you need.
        """
        if self.codebook_size > _LARGEST_TABLE:
            raise ValueError(f"a table of {self.codebook_size} codes is too large, at most 2**24; decode what you need")
        return self._codes(torch.arange(self.codebook_size, device=self.table.device))

    def bound(self, z: Tensor) -> Tensor:
        """Bounded channels in units of levels from the middle code: what is rounded, with its gradient.

        Args:
            z: channels (..., len(levels)), after ``project_in``.

        Returns:
            The bounded values, float32 or float64; ``tanh`` maps 0 to 0.
        """
        z = working(z)
        scale, shift, height, middle, centre, _ = self._table_like(z)[:, : len(self.levels)]
        return torch.addcmul(shift, z, scale).tanh() * height + (middle - centre)

    def digits(self, indices: Tensor) -> Tensor:
        """Digits of indices of one codebook, first channel first.

        Args:
            indices: integers in 0..codebook_size - 1, any shape.

        Returns:
            int64 (*shape, len(levels)), digit j in 0..levels[j] - 1.

        Raises:
            TypeError: indices are not integers.
            ValueError: an index out of range.
        """
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise TypeError(f"indices must be integers, got {indices.dtype}")
        self._check_range(indices[..., None])
        return self._digits(indices.long(), torch.int64)

    def _quantise(self, z: Tensor) -> QuantizerOutput:
        inside = self.project_in(z)
        channels = working(inside)
        rows, table = self._in_rows(channels)
        codes, rounded = _Round.apply(rows, table)
        indices = self._indices(rounded, z.shape)
        codes = codes.view(channels.shape)
        used = codes
        if self.noise is not None and self.training:
            used = codes + self._noise(rows.detach(), rounded, table, self.noise).view(channels.shape)
        quantized = self.project_out(used.to(inside.dtype)).to(z.dtype)
        plain = used is codes and not self.projected
        loss = self._losses(channels, codes)
        return QuantizerOutput(quantized, indices, quantized if plain else codes.to(z.dtype), loss)

    def _losses(self, channels: Tensor, codes: Tensor) -> Tensor:
        return codes.new_zeros((), dtype=torch.float32)

    def _find(self, z: Tensor) -> Tensor:
        rows, table = self._in_rows(working(self.project_in(z)))
        return self._indices(_bounded(rows, table).round_(), z.shape)

    def _look_up(self, indices: Tensor, dtype: torch.dtype | None) -> Tensor:
        inside = self.project_out.weight.dtype if isinstance(self.project_out, nn.Linear) else dtype or torch.float32
        codes = self._codes(indices, inside).flatten(-2)
        return self.project_out(codes).to(dtype or inside)

    def _in_rows(self, channels: Tensor) -> tuple[Tensor, Tensor]:
        """Channels as (rows, several vectors), and the constants beside them."""
        width = len(self.levels)
        vectors = channels.numel() // width
        together = next(count for count in (_TOGETHER, 16, 4, 1) if vectors % count == 0)
        rows = channels.reshape(vectors // together, together * width)
        return rows, self._table_like(channels)[:, : together * width]

    def _make_table(self, dtype: torch.dtype, device: torch.device | None) -> Tensor:
        return torch.tensor(self._constants, dtype=dtype, device=device).repeat(1, _TOGETHER)

    def _table_like(self, channels: Tensor) -> Tensor:
        return self.table if channels.dtype == self.table.dtype else self._make_table(channels.dtype, channels.device)

    def _indices(self, rounded: Tensor, shape: torch.Size) -> Tensor:
        # at most 2**20 each: their sum is finite unless one is NaN, whose integer would be arbitrary
        require(rounded.sum().isfinite(), "z must not be NaN; look for an overflow or 0/0 before the quantizer")
        # float32 holds every integer of a small codebook exactly, and is faster
        kind = torch.float32 if self.codebook_size <= 2**24 else torch.int64
        *digits, last = rounded.view(*shape[:-1], self.num_codebooks, len(self.levels)).unbind(-1)
        index = last.to(kind, copy=True)
        for levels, digit in zip(reversed(self.levels[:-1]), reversed(digits), strict=True):
            index.mul_(levels).add_(digit.to(kind))
        return index.long()

    def _digits(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        digits = torch.empty(*indices.shape, len(self.levels), dtype=dtype, device=indices.device)
        for j, levels in enumerate(self.levels[:-1]):
            above = torch.div(indices, levels, rounding_mode="trunc")
            digits[..., j] = torch.sub(indices, above, alpha=levels)
            indices = above
        digits[..., -1] = indices
        return digits

    def _codes(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        digits = self._digits(indices, torch.float64 if dtype == torch.float64 else torch.float32)
        rows, table = self._in_rows(digits)
        return rows.sub_(table[4]).div_(table[5]).view(digits.shape).to(dtype)

    def _noise(self, rows: Tensor, rounded: Tensor, table: Tensor, share: float) -> Tensor:
        """What to add to codes so that some are bounded values with uniform noise of one level instead."""
        generator = self._generators.get(rows.device)
        if generator is None:
            generator = self._generators[rows.device] = torch.Generator(rows.device).manual_seed(self.seed)
        draws = torch.rand((2, *rows.shape), generator=generator, device=rows.device, dtype=rows.dtype)
        noisy = _bounded(rows, table) + draws[0] - 0.5
        return torch.where(draws[1] < share, (noisy - rounded) / table[5], torch.zeros_like(rows))

    def _apply(self, fn: Any, recurse: bool = True) -> FSQ:
        """Constants follow the device but keep their precision, whatever the model is cast to."""
        super()._apply(fn, recurse)
        self.table = self._make_table(torch.float32, self.table.device)
        return self


class _Round(torch.autograd.Function):
    """Codes and rounded values of rows; backward as if nothing had been rounded."""

    @staticmethod
    def forward(rows: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        rounded = _bounded(rows, table).round_()
        return (rounded - table[4]).div_(table[5]), rounded

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        rows, table = ctx.saved_tensors
        scale, shift, height, _, _, half = table
        bounded = torch.addcmul(shift, rows, scale).tanh()
        return grad * (1 - bounded.square()) * (scale * height / half), None


def _bounded(rows: Tensor, table: Tensor) -> Tensor:
    # in place: fresh memory costs more than the arithmetic
    scale, shift, height, middle, _, _ = table
    return torch.addcmul(shift, rows, scale).tanh_().mul_(height).add_(middle)


def _constants(levels: Sequence[int], bound: str) -> list[list[float]]:
    """Six rows: ``b = tanh(scale z + shift) height + middle``, ``code = (round(b) - centre)/half``."""
    columns = []
    for count in levels:
        middle = (count - 1) / 2
        if bound == "sigmoid" or count == 2:  # sigmoid(z) = (1 + tanh(z/2))/2
            columns.append((0.5, 0.0, middle, middle, middle, middle))
        else:
            height = middle * (1 + min(1e-3, 0.5 / (count - 1)))
            shift = 0.0 if count % 2 else math.atanh(0.5 / height)
            columns.append((1.0, shift, height, middle, float(count // 2), float(count // 2)))
    return [list(row) for row in zip(*columns, strict=True)]


def _checked(levels: Sequence[int]) -> tuple[int, ...]:
    checked = tuple(levels)
    if not checked:
        raise ValueError("levels must hold at least one number, got none")
    for count in checked:
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"levels must be ints, got {count!r}")
        if not 2 <= count <= MOST_LEVELS:
            raise ValueError(f"levels must be from 2 to 2**20 each, got {count}")
    if math.prod(checked) > 2**63:
        raise ValueError(
            f"levels {checked} give {math.prod(checked)} codes, at most 2**63 fit an index; use num_codebooks"
        )
    return checked
