"""Drawn digits: ten glyphs turned, sheared, shifted and blurred at random, read as eight rows of eight grey values."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Five columns and seven rows of each digit.
_GLYPHS = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111",
    "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)
SIDE, CLASSES = 8, 10


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw digits.

    Args:
        count: how many.
        seed: of everything.

    Returns:
        Images (count, 8, 8) in float32 and labels (count,) in 0..9.
    """
    generator = torch.Generator().manual_seed(seed)

    def spread(width: float) -> Tensor:
        return (2 * torch.rand(count, generator=generator) - 1) * width

    labels = torch.randint(CLASSES, (count,), generator=generator)
    angle, shear, right, down = spread(0.2), spread(0.2), spread(0.15), spread(0.15)
    wide, high = 1.1 + spread(0.15), 1.1 + spread(0.15)
    across = torch.stack((wide * angle.cos(), shear - high * angle.sin(), right), 1)
    along = torch.stack((wide * angle.sin(), high * angle.cos(), down), 1)
    grid = F.affine_grid(torch.stack((across, along), 1), [count, 1, SIDE, SIDE], align_corners=False)
    images = F.grid_sample(_glyphs()[labels], grid, align_corners=False)[:, 0]
    images = images * (0.7 + 0.3 * torch.rand(count, 1, 1, generator=generator))
    return images + 0.1 * torch.randn(count, SIDE, SIDE, generator=generator), labels


def _glyphs() -> Tensor:
    """The glyphs in the middle of 9 x 9 grey values."""
    drawn = torch.zeros(CLASSES, 1, 9, 9)
    for digit, rows in enumerate(_GLYPHS):
        for row, line in enumerate(rows.split()):
            drawn[digit, 0, row + 1, 2:7] = torch.tensor([float(bit) for bit in line])
    return drawn


class Reader(nn.Module):
    """A pre-norm decoder that reads a digit row by row and names it after the last.

    Args:
        classes: how many names there are.
        width: hidden size.
        depth: blocks.
    """

    def __init__(self, classes: int = CLASSES, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaModel

        self.embed = nn.Linear(SIDE, width)
        self.base: Any = LlamaModel(
            LlamaConfig(
                vocab_size=1, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth,
                num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=SIDE, pad_token_id=None,
                bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip
        self.head = nn.Linear(width, classes)

    def states(self, images: Tensor) -> Tensor:
        """Last hidden state of the last row, (count, width)."""
        state: Tensor = self.base(inputs_embeds=self.embed(images), use_cache=False).last_hidden_state[:, -1]
        return state

    def forward(self, images: Tensor) -> SimpleNamespace:
        """Logits of each image, in a host output's form."""
        return SimpleNamespace(logits=self.head(self.states(images)))


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of right names."""
    return (logits.argmax(-1) == labels).double().mean().item() if len(labels) else math.nan
