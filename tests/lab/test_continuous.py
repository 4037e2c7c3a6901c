"""The parts of the claims on continuous tokens, at tiny sizes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from danlu.lab import continuous
from danlu.lab.claim import Context
from danlu.lab.continuous_models import Readout, decoder, draw_code, turning_points, unroll, valid_turns
from danlu.lab.training import Schedule


def circle(*degrees):
    angles = torch.tensor([degrees]) * math.pi / 180
    return 1.5 * torch.stack([angles.cos(), angles.sin()], -1)


def test_data_turns_by_sixty_degrees_and_almost_always_counts_as_right():
    right, left = valid_turns(turning_points(4000, torch.Generator().manual_seed(0)))
    assert float(right.float().mean()) > 0.995
    assert left == pytest.approx(0.5, abs=0.02)


def test_wrong_turns_and_wrong_radii_do_not_count():
    assert valid_turns(circle(170, 230, 290, 350)) == (torch.tensor([True]), 1.0)
    assert valid_turns(circle(10, -50, -110, -170))[1] == 0.0
    for tokens in (circle(0, 60, 150, 210), circle(0, 60, 60, 120), 1.25 * circle(0, 60, 120, 180)):
        right, left = valid_turns(tokens)
        assert not right.any() and left is None


def test_unrolling_feeds_each_token_before_the_next():
    readout = Readout(decoder(0, token_dim=2), 2, 0).eval()
    tokens = unroll(readout, readout, 3, 4, lambda answer: answer)
    with torch.no_grad():
        assert torch.allclose(readout(patches=tokens), tokens, atol=1e-6)
    assert not torch.allclose(tokens[:, 0], tokens[:, 1])


def test_codes_are_drawn_by_their_probabilities():
    book = torch.tensor([[0.0], [1.0]])
    logits = torch.tensor([[0.0, math.log(3.0)]]).expand(4000, 2)
    drawn = draw_code(book, torch.Generator().manual_seed(0), logits)
    assert float(drawn.mean()) == pytest.approx(0.75, abs=0.02)


def small(monkeypatch, tmp_path: Path) -> Context:
    monkeypatch.setattr(continuous, "_TURNS", Schedule(steps=20, batch=8))
    monkeypatch.setattr(continuous, "_DIGITS", Schedule(steps=2, batch=4))
    monkeypatch.setattr(continuous, "_STEPS", (1, 20))
    monkeypatch.setattr(continuous, "_ROWS", 50)
    monkeypatch.setattr(continuous, "_REPEATS", 1)
    monkeypatch.setattr(continuous, "_CODES", (4, 8))
    return Context(seeds=(0,), cache=tmp_path)


def test_the_experiment_on_turns_runs_and_repeats(monkeypatch, tmp_path):
    context = small(monkeypatch, tmp_path)
    first = continuous.continuous_autoregression.experiment(context)
    assert first == continuous.continuous_autoregression.experiment(context)
    assert len(first.checks) == 3 and len(first.tables[0].rows) == 5


@pytest.mark.slow
def test_the_experiment_on_digits_runs(monkeypatch, tmp_path):
    evidence = continuous.continuous_against_discrete.experiment(small(monkeypatch, tmp_path))
    assert [row[0] for row in evidence.tables[0].rows] == ["continuous", "4 codes", "8 codes", "training digits"]
    assert evidence.tables[0].rows[1][3] > evidence.tables[0].rows[2][3] > 0
