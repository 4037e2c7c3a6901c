import pytest
import torch

from danlu.lab import digits, ladder, training
from danlu.lab.claim import Context
from danlu.lab.training import Schedule


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(training, "_MEMORY", {})
    monkeypatch.setattr(ladder, "_PRETRAINING", Schedule(steps=2, batch=8))
    monkeypatch.setattr(ladder, "_STEPS", 2)


def test_digits_are_drawn_by_seed_and_can_be_told_apart():
    images, labels = digits.draw(400, 3)
    again, _ = digits.draw(400, 3)
    assert images.shape == (400, 8, 8) and torch.equal(images, again) and set(labels.tolist()) == set(range(10))
    other, other_labels = digits.draw(400, 4)
    assert not torch.equal(images, other)
    means = torch.stack([images[labels == digit].mean(0) for digit in range(10)]).flatten(1)
    nearest = torch.cdist(other.flatten(1), means).argmin(-1)
    assert (nearest == other_labels).float().mean() > 0.6  # by chance 0.1


def test_every_method_is_scored_once_for_each_seed(tmp_path):
    scores = ladder.few_labels(Context(seeds=(0, 1), cache=tmp_path))
    names = {"linear probe", "LoRA", "full tuning", "from scratch"}
    names |= {f"{kind} r={r}" for kind in ("ladder", "no links", "pruned start") for r in (4, 8)}
    assert set(scores) == names
    assert all(len(values) == 2 and all(0 <= value <= 1 for value in values) for values in scores.values())
    again = ladder.few_labels(Context(seeds=(0, 1), cache=tmp_path))
    assert again == scores


def test_costs_are_measured_for_every_method():
    costs = ladder.step_costs(width=64, depth=3, batch=1, length=16, repeats=1)
    assert costs["LoRA"]["ratio"] == 1
    assert costs["ladder r=8"]["bytes"] < costs["LoRA"]["bytes"] < costs["full tuning"]["bytes"]
    assert costs["full tuning"]["parameters"] > costs["ladder r=8"]["parameters"] > 0
    assert all(cost["seconds"] > 0 for cost in costs.values())


def test_the_evidence_has_its_checks_tables_and_plots(tmp_path, monkeypatch):
    costs = ladder.step_costs(width=64, depth=3, batch=1, length=16, repeats=1)
    monkeypatch.setattr(ladder, "step_costs", lambda: costs)
    evidence = ladder.ladder.experiment(Context(seeds=(0,), cache=tmp_path))
    assert len(evidence.checks) == 9 and len(evidence.tables) == 2 and len(evidence.plots) == 2
    assert "right on" in " ".join(evidence.notes)
