"""The parts of the mask experiments at small sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from danlu.lab import corpora, masks
from danlu.lab.claim import Context
from danlu.lab.training import Schedule

TEXT = corpora.as_bytes(tuple(f"def f(x):\n    return x + {i}\n" for i in range(400)))
CONTEXT = Context(seeds=(0,), cache=Path("unused"))
SHORT = Schedule(steps=12, batch=4, learning_rate=3e-3)


@pytest.mark.parametrize("mask", ["causal", "prefix"])
def test_a_decoder_learns_the_second_half(mask):
    value, losses = masks.fitted_decoder(mask, TEXT, TEXT, 0, SHORT, CONTEXT)
    assert len(losses) == 12
    assert value < losses[0]


@pytest.mark.parametrize("mask", ["bidirectional", "mixed_heads", "mixed_layers"])
def test_an_encoder_learns_masked_bytes(mask):
    value, losses = masks.fitted_encoder(mask, TEXT, TEXT, 0, SHORT, CONTEXT)
    assert value < losses[0]
    again = masks.fitted_encoder(mask, TEXT, TEXT, 0, SHORT, CONTEXT)
    assert (value, losses) == again


def test_windows_are_stretches_of_the_text():
    text = torch.arange(50)
    rows = corpora.windows(text, 7, 9, torch.Generator().manual_seed(0))
    assert rows.shape == (7, 9)
    assert torch.equal(rows.diff(dim=1), torch.ones(7, 8, dtype=torch.long))
