"""The parts of the claim on auxiliary tasks, at sizes that take no time."""

import pytest
import torch

from danlu.lab import multitask
from danlu.lab.claim import VERDICTS, Context


def test_descent_ends_near_the_constrained_optimum_and_control_keeps_the_loss(monkeypatch):
    monkeypatch.setattr(multitask, "TIME", 40)
    a, b = torch.randn(2, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = torch.zeros(10, dtype=torch.float64)
    distance, ratio, curve = multitask.descend(start, a, b, 0.05, drift=0.0)
    assert distance < 0.1 and 1.0001 < ratio < 1.1
    assert curve[0] == 1 and curve[-1] > 1.0001
    distance, ratio, _ = multitask.descend(start, a, b, 0.05, drift=10.0)
    assert distance < 1e-6 and ratio == pytest.approx(1, abs=1e-9)
    with pytest.raises(ValueError, match="start must lead to a conflict"):
        multitask.descend(start, a, a, 0.05, drift=0.0)


def test_the_published_rule_falls_short_in_some_problems():
    wrong, worst = multitask.published_rule(60)
    assert 0.1 < wrong < 0.4 and worst > 0.05


def test_digits_are_drawn_from_readable_fonts_and_by_seed():
    digits = multitask.Digits(0)
    assert digits.glyphs.shape[1:] == (10, 32, 32) and len(digits.glyphs) >= 15
    flat = digits.glyphs.flatten(2)
    assert (flat.sum(2) > 20).all()
    middle = flat.mean(0)  # a glyph is nearer to the mean of its digit than to any other
    assert (torch.cdist(flat, middle).argmin(2) == torch.arange(10)).float().mean() > 0.8
    pictures, labels = digits.draw(7)
    again, _ = multitask.Digits(0).draw(7)
    assert pictures.shape == (7, 256) and labels.max() < 10
    assert torch.equal(pictures, again)


def test_the_claim_runs_through(monkeypatch, tmp_path):
    changes = {"PRETRAINING": 40, "FINE_TUNING": 10, "TESTED": 100, "TIME": 15, "RATES": (0.2, 0.1, 0.05)}
    for name, value in changes.items():
        monkeypatch.setattr(multitask, name, value)
    monkeypatch.setattr(multitask, "_TIMES", (0.4, 5, 15))
    evidence = multitask.primary_auxiliary.experiment(Context((0, 1), tmp_path))
    assert evidence.verdict in VERDICTS
    assert [row[0] for row in evidence.tables[1].rows] == [
        "before",
        "main task alone",
        "primary/auxiliary",
        "with drift control",
        "sum of losses",
    ]
