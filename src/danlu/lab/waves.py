"""Plane waves in images and sine waves in sequences, parts of which are to be predicted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from danlu.lab.claim import Context
from danlu.lab.training import Schedule, seeded, train
from danlu.vision.interpolation import Interpolator1d

SIDE = 16
#: Radians per pixel, along x and y.
WAVES = ((0.5, 0.2), (-0.3, 0.6), (0.9, -0.4), (0.2, 0.9))


def waves(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sums of four plane waves with random phases and amplitudes.

    Args:
        count: how many.
        generator: of everything.

    Returns:
        Images (count, 1, 16, 16) and the number of the wave of the largest amplitude, (count,).
    """
    y, x = torch.meshgrid(torch.arange(float(SIDE)), torch.arange(float(SIDE)), indexing="ij")
    phases = 2 * torch.pi * torch.rand(count, len(WAVES), 1, 1, generator=generator)
    amplitudes = 0.7 * torch.randn(count, len(WAVES), 1, 1, generator=generator)
    turns = torch.stack([k * x + m * y for k, m in WAVES])
    images = (amplitudes * (turns + phases).cos()).sum(1, keepdim=True)
    return images, amplitudes.abs().flatten(1).argmax(1)


def sequence_error(fill: str, steps: int, seed: int, context: Context) -> float:
    """Train to predict the hidden half of smooth sequences, the encoder seeing the visible half alone.

    Args:
        fill: ``"[MASK]"`` or ``"interpolation"``.
        steps: of training.
        seed: of everything.
        context: for its progress bar.

    Returns:
        Squared error on hidden places of 2,000 new sequences; their variance is 1.
    """
    with seeded(seed):
        model = Sequences(interpolate=fill == "interpolation")

    def batches(generator: torch.Generator) -> dict[str, Any]:
        return {**sequences(128, generator), "targets": torch.zeros(1)}

    train(model, batches, Schedule(steps, 128, 2e-3, 0.0, 0), seed, context, fill, lambda loss, _: loss.squeeze())
    with torch.no_grad():
        return float(model(**sequences(2000, torch.Generator().manual_seed(seed + 1))).logits)


def sequences(count: int, generator: torch.Generator, length: int = 32) -> dict[str, Tensor]:
    """Sums of four sine waves of 8 to 32 places each, with half of the places of each visible."""
    periods = 8 + 24 * torch.rand(count, 4, 1, generator=generator)
    phases = 2 * torch.pi * torch.rand(count, 4, 1, generator=generator)
    values = (2 * torch.pi * torch.arange(length) / periods + phases).sin().sum(1) / 2**0.5
    places = torch.rand(count, length, generator=generator).argsort(1)[:, : length // 2].sort(1).values
    return {"values": values, "places": places}


class Sequences(nn.Module):
    """Visible places through an encoder that sees one at a time; hidden ones from the decoder's neighbourhood of 3."""

    def __init__(self, interpolate: bool, width: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(1, width), nn.GELU(), nn.Linear(width, width))
        self.decoder = nn.Sequential(nn.Conv1d(width, width, 3, padding=1), nn.GELU(), nn.Conv1d(width, 1, 1))
        self.fill = Interpolator1d()
        self.mask_token = None if interpolate else nn.Parameter(torch.zeros(width))

    def forward(self, values: Tensor, places: Tensor) -> SimpleNamespace:
        """The loss of (count, length) values with (count, visible) places, as logits (1, 1)."""
        states = self.encoder(values.gather(1, places)[..., None])
        if self.mask_token is None:
            full = self.fill(states, places, values.shape[1])
        else:
            full = self.mask_token.expand(*values.shape, -1).scatter(1, places[..., None].expand_as(states), states)
        error = (self.decoder(full.mT)[:, 0] - values).square()
        hidden = torch.ones_like(values).scatter(1, places, 0.0)
        return SimpleNamespace(logits=((error * hidden).sum() / hidden.sum()).view(1, 1))
