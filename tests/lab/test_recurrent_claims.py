"""The parts of the experiments on linear recurrent units, at small sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from danlu.lab import recurrent
from danlu.lab.claim import HOLDS, HOLDS_IN_PART, Context
from danlu.lab.training import Schedule

CONTEXT = Context(seeds=(0,), cache=Path("unused"))


def test_targets_are_the_input_a_hundred_steps_before():
    x = torch.arange(256.0)[None, :, None]
    y = recurrent.delayed(x)
    assert y.shape == (1, 256) and y[0, :100].isnan().all()
    assert torch.equal(y[0, 100:], x[0, :156, 0])


def test_a_wire_without_gamma_starts_louder_and_keeps_gamma_at_one():
    schedule = Schedule(steps=2, batch=4)
    losses = {name: recurrent.delay_losses(start, schedule, CONTEXT) for name, start in recurrent._STARTS.items()}
    assert losses["ring, no gamma"][0] > 3 * losses["ring, gamma"][0]
    assert losses["ring, gamma"] == recurrent.delay_losses(recurrent._STARTS["ring, gamma"], schedule, CONTEXT)
    unit = recurrent.Wire(0.9, 0.999, False).unit
    assert not unit.gamma_log.any() and not unit.gamma_log.requires_grad


def test_delay_evidence_follows_its_thresholds():
    good = dict(zip(recurrent._STARTS, ([2.0] + 29 * [0.4], [9.0] + 29 * [0.5], 30 * [0.9], 30 * [0.95]), strict=True))
    assert recurrent.delay_evidence(good).verdict == HOLDS
    assert recurrent.delay_evidence(good | {"ring, gamma": [2.0] + 29 * [0.7]}).verdict == HOLDS_IN_PART


@pytest.mark.parametrize("name", list(recurrent._STEPS))
def test_a_reader_depends_on_the_order_of_the_pixels_and_learns(name):
    model = recurrent.reader(name, 0)
    images, labels = recurrent.enlarged(6, 3)
    assert images.shape == (6, 16, 16) and labels.shape == (6,)
    assert not torch.allclose(model(images).logits, model(images.flip(2)).logits, atol=1e-4)
    shares, accuracies = recurrent.reading_curve(name, 4, 0, CONTEXT, tests=2, size=20)
    assert shares == [0.5, 1.0] and all(0 <= value <= 1 for value in accuracies)
    assert (shares, accuracies) == recurrent.reading_curve(name, 4, 0, CONTEXT, tests=2, size=20)


def test_reading_evidence_follows_its_thresholds():
    costs = recurrent.step_costs(0, repeats=2)
    assert set(costs) == set(recurrent._STEPS) and min(costs.values()) > 0
    curves = {"LRU": ([0.5, 1.0], [0.5, 0.95]), "attention": ([0.5, 1.0], [0.2, 0.5])}
    assert recurrent.reading_evidence(costs, curves).verdict == HOLDS
    assert recurrent.reading_evidence(costs, curves | {"LRU": ([0.5, 1.0], [0.5, 0.8])}).verdict == HOLDS_IN_PART
