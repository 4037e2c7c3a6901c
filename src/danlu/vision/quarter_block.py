"""Which quarter of an image an encoder sees: one block of half the side, or four of a quarter of it in the corners."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["QuarterBlockMasker", "Visible"]

NAMES = ("top-left", "top-right", "bottom-left", "bottom-right", "centre")
SPLIT = "split"


@dataclass(frozen=True)
class Visible:
    """Visible cells of a map: all crossings of some rows with some columns, 0-based and rising."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def corner(self) -> tuple[int, int]:
        """Row and column of the first visible cell."""
        return self.rows[0], self.columns[0]

    @property
    def runs(self) -> tuple[list[range], list[range]]:
        """Unbroken runs of rows and of columns; an encoder sees one block for each pair."""
        return _runs(self.rows), _runs(self.columns)


class QuarterBlockMasker:
    """Cut the visible quarter out of images, and say which cells are hidden.

    Args:
        size: side of the images in pixels, or (height, width).
        stride: pixels for each cell of the encoder's map; ``2 * stride`` must divide both sides, to halve the
            map.
        positions: of the block: names of the four corners and ``"centre"`` (rounded down to a whole cell), or
            (top, left) in pixels, multiples of ``stride``. ``("split",)`` alone shows four blocks of a quarter of the
            side, one in each corner: the same area, with hidden cells in between; ``4 * stride`` divides both sides.

    Raises:
        ValueError: sides that do not fit the stride, or positions that are unknown or not aligned to it.

    Departures: the source fixes no positions; these are a choice of ours, and ``"split"`` is an addition.

    Source: Scientific Spaces archive 9359; arXiv:2211.13228
    """

    def __init__(
        self, size: int | tuple[int, int], stride: int, positions: Sequence[str | tuple[int, int]] = NAMES
    ) -> None:
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        if stride < 1 or min(self.size) < 1:
            raise ValueError(f"size and stride must be at least 1, got {size} and {stride}")
        self.stride = stride
        self.positions = tuple(p if isinstance(p, str) else (int(p[0]), int(p[1])) for p in positions)
        for side in self.size:
            if side % (2 * stride):
                near = max(2 * stride, round(side / (2 * stride)) * 2 * stride)
                raise ValueError(
                    f"size must be a multiple of {2 * stride} pixels, so that the map of stride {stride} has an even "
                    f"number of cells to halve, got {self.size}; resize to {near}"
                )
        self.height, self.width = self.size[0] // stride, self.size[1] // stride
        if not self.positions:
            raise ValueError("positions must name at least one block, got none")
        if SPLIT in self.positions and len(self.positions) > 1:
            raise ValueError(f"positions must be ('split',) alone or blocks alone, got {self.positions}")
        self.visible = tuple(self._visible(position) for position in self.positions)

    def _visible(self, position: str | tuple[int, int]) -> Visible:
        h, w = self.height // 2, self.width // 2
        if position == SPLIT:
            if self.height % 4 or self.width % 4:
                raise ValueError(
                    f"size must be a multiple of {4 * self.stride} pixels for 'split', got {self.size} at stride "
                    f"{self.stride}"
                )
            return Visible(_ends(self.height), _ends(self.width))
        if isinstance(position, str):
            if position not in NAMES:
                raise ValueError(f"positions must be among {', '.join((*NAMES, SPLIT))}, got {position!r}")
            top = h // 2 if position == "centre" else h * position.startswith("bottom")
            left = w // 2 if position == "centre" else w * position.endswith("right")
        else:
            limits = (self.size[0] // 2, self.size[1] // 2)
            if any(p % self.stride or not 0 <= p <= limit for p, limit in zip(position, limits, strict=True)):
                raise ValueError(
                    f"a block at {position} is not aligned: top and left must be multiples of the stride "
                    f"{self.stride} in 0..{limits[0]} and 0..{limits[1]}"
                )
            top, left = position[0] // self.stride, position[1] // self.stride
        return Visible(tuple(range(top, top + h)), tuple(range(left, left + w)))

    def index(self, position: str | tuple[int, int]) -> int:
        """The number of a position.

        Raises:
            ValueError: it is none of this masker's.
        """
        if position not in self.positions:
            raise ValueError(f"position must be one of {self.positions}, got {position!r}")
        return self.positions.index(position)

    def draw(self, seed: str, count: int | None = None) -> int | Tensor:
        """Draw the number of a position, or ``count`` of them as a tensor (count,), all equally likely."""
        source = random.Random(seed)
        if count is None:
            return source.randrange(len(self.positions))
        return torch.tensor([source.randrange(len(self.positions)) for _ in range(count)], dtype=torch.long)

    def crop(self, images: Tensor, index: int) -> Tensor:
        """Cut the visible blocks out.

        Args:
            images: (batch, channels, height, width) in pixels, of this masker's size.
            index: number of the position.

        Returns:
            (blocks * batch, channels, rows, columns): the images' first blocks, then their second ones.

        Raises:
            ValueError: images of another size.
        """
        self.check(images)
        rows, columns = self.visible[index].runs
        s = self.stride
        return torch.cat(
            [images[..., r[0] * s : (r[-1] + 1) * s, c[0] * s : (c[-1] + 1) * s] for r in rows for c in columns]
        )

    def join(self, blocks: Tensor, index: int) -> Tensor:
        """Put encoded blocks side by side: the map (batch, channels, visible rows, visible columns)."""
        rows, columns = self.visible[index].runs
        parts = blocks.chunk(len(rows) * len(columns))
        lines = [torch.cat(parts[i * len(columns) : (i + 1) * len(columns)], -1) for i in range(len(rows))]
        return lines[0] if len(lines) == 1 else torch.cat(lines, -2)

    def hidden(self, index: int) -> Tensor:
        """Map of the hidden cells, (height, width) in cells, True where hidden."""
        found = torch.ones(self.height, self.width, dtype=torch.bool)
        seen = self.visible[index]
        found[torch.tensor(seen.rows)[:, None], torch.tensor(seen.columns)] = False
        return found

    def check(self, images: Tensor | Sequence[Tensor]) -> None:
        """Refuse images of another size.

        Raises:
            TypeError: no tensor.
            ValueError: another size, or a list of images of mixed sizes.
        """
        wanted = f"(batch, channels, {self.size[0]}, {self.size[1]})"
        if not isinstance(images, Tensor):
            try:
                sizes = sorted({tuple(image.shape[-2:]) for image in images})
            except (AttributeError, TypeError):
                raise TypeError(f"images must be a tensor {wanted}, got {type(images).__name__}") from None
            raise ValueError(f"images must be one tensor {wanted}, got a list of sizes {sizes}; resize or crop them")
        if images.ndim != 4 or tuple(images.shape[2:]) != self.size:
            raise ValueError(f"images must be {wanted}, got {tuple(images.shape)}; resize or crop them")


def _runs(places: tuple[int, ...]) -> list[range]:
    cuts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(places)) if b != a + 1), len(places)]
    return [range(places[a], places[b - 1] + 1) for a, b in pairwise(cuts)]


def _ends(cells: int) -> tuple[int, ...]:
    return (*range(cells // 4), *range(cells - cells // 4, cells))
