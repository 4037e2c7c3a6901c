"""The parts of the growth claim, at sizes that take no time."""

from __future__ import annotations

import pytest
import torch

from danlu.lab import growth
from danlu.lab.claim import Context
from danlu.lab.runner import _CLAIMS


def test_batches_predict_the_next_byte():
    text = torch.arange(2000).remainder(251).to(torch.uint8)
    batch = growth.draw(text)(torch.Generator().manual_seed(0))
    assert batch["input_ids"].shape == batch["targets"].shape == (growth.BATCH, growth.WINDOW)
    assert torch.equal(batch["input_ids"][:, 1:], batch["targets"][:, :-1])
    windows = growth.held_out(text, 8)
    assert windows.shape == (8, growth.WINDOW + 1) and len(set(windows[:, 0].tolist())) == 8


def test_loss_is_the_mean_over_all_targets():
    model = growth.llama(32, 0)
    windows = torch.randint(256, (70, growth.WINDOW + 1), generator=torch.Generator().manual_seed(0))
    expected = model(windows, labels=windows).loss
    assert growth.loss(model, windows) == pytest.approx(expected.item(), rel=1e-5)


def test_cost_counts_matrices_but_not_the_table():
    model = growth.llama(32, 0)
    assert growth.cost_of(model) == 2 * (4 * 32 * 32 + 3 * 32 * 96) + 256 * 32
    first = model.model.embed_tokens.weight.detach().clone()
    assert torch.equal(growth.llama(32, 0).model.embed_tokens.weight, first)


def test_the_small_schedule_stays_up():
    steady = growth.Steady(steps=100, warmup=10)
    assert [steady.factor(step) for step in (0, 4, 9, 50, 99)] == [0.1, 0.5, 1.0, 1.0, 1.0]


def test_curves_are_read_off_between_their_points():
    line = growth._timed([float(i) for i in range(120)], 0.5, 10.0)
    assert line == [(25.0, 29.5), (55.0, 89.5)]
    assert growth._read_off(line, 40.0) == 59.5
    assert growth._read_off(line, 24.0) is None and growth._read_off(line, 56.0) is None


def test_the_whole_claim_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(growth, "BUDGETS", (10, 20))
    monkeypatch.setattr(growth, "_SMOOTH", 2)
    text = torch.randint(97, 110, (20000,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    monkeypatch.setattr(growth, "texts", lambda: (text, text[:6000]))
    few = growth.held_out(text, 64)
    monkeypatch.setattr(growth, "held_out", lambda _: few)
    claim = _CLAIMS["growth"]
    evidence = claim.experiment(Context((0,), tmp_path))
    assert evidence.checks[0].met, evidence.checks[0]
    rows = {row[0]: row[1:] for row in evidence.tables[0].rows}
    assert rows["grown, 6"][:2] == (10, 6) and rows["grown, 12"][:2] == (20, 12)
    assert rows["scratch, 20"][:3] == (0, 20, 20) and rows["small, 6 more"][:2] == (16, 0)
    cost = growth.cost_of(growth.llama(32, 0)) / growth.cost_of(growth.llama(64, 0))
    assert rows["grown, 6"][2] == round(10 * cost + 6) and rows["small, 6 more"][2] == round(16 * cost)
    again = claim.experiment(Context((0,), tmp_path))
    assert again.tables == evidence.tables
    steps, compute = evidence.plots
    assert set(compute.lines) == {"scratch, 10", "scratch, 20", "small 10, then grown", "small 20, then grown"}
    assert all(any(value is not None for value in line) for line in (*steps.lines.values(), *compute.lines.values()))
