"""The parts of the claim on reflow, at sizes that take no time."""

import math

import pytest
import torch

from danlu.diffusion.couplings import Pairs
from danlu.diffusion.reflow import distill, distilled_steps, reflow
from danlu.lab import flow
from danlu.lab.claim import Context


def test_the_ring_has_eight_modes_and_near_counts_them():
    mixture = flow.ring()
    assert torch.allclose(mixture.means.norm(dim=1), torch.full((8,), 3.0, dtype=torch.float64))
    assert flow.near(mixture.draw(500, 0), mixture) > 0.97
    assert flow.near(torch.zeros(5, 2), mixture) == 0


def test_the_exact_flow_goes_from_the_middle_at_the_end_of_time():
    x = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    velocity = flow.exact_flow(flow.ring())(x, torch.ones(2))
    assert velocity.dtype == torch.float32 and torch.allclose(velocity, x, atol=1e-6)  # the mean of the data is 0


def test_batches_keep_pairs_and_repeat_by_seed():
    x0 = torch.arange(50.0)[:, None].expand(50, 2)
    first, again = (list(flow.batches(Pairs(x0, -x0), 2, 3)) for _ in range(2))
    assert all(torch.equal(a, b) for one, two in zip(first, again, strict=True) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(a, -b) and a.shape == (512, 2) for a, b in first)


def test_networks_start_alike_and_learn(tmp_path, monkeypatch):
    monkeypatch.setattr(flow, "_BATCH", 128)
    generator = torch.Generator().manual_seed(0)
    x1 = torch.randn(400, 2, generator=generator)
    pairs, context = Pairs(2 * x1 + 1, x1), Context(seeds=(0,), cache=tmp_path)
    early = flow.fit(pairs, reflow, 1, 0, context)
    late = flow.fit(pairs, reflow, 100, 0, context)
    one = flow.fit(pairs, distill, 100, 0, context)
    assert distilled_steps(one) == 1 and distilled_steps(late) is None

    def error(net):
        with torch.no_grad():
            return float((x1 - net(x1, torch.ones(400)) - pairs.x0).square().mean())

    assert error(one) < error(late) < error(early) / 5
    assert not late.training
    twin = flow.fit(pairs, reflow, 1, 0, context)
    assert all(torch.equal(a, b) for a, b in zip(early.parameters(), twin.parameters(), strict=True))


def test_the_claim_runs_small(tmp_path, monkeypatch):
    sizes = {"_PAIRS": 300, "_SOLVER_STEPS": 6, "_TRAINING": 80, "_HELD_OUT": 200, "_BATCH": 64}
    for name, value in sizes.items():
        monkeypatch.setattr(flow, name, value)
    evidence = flow.reflow_claim.experiment(Context(seeds=(0,), cache=tmp_path))
    assert len(evidence.checks) == 3
    bend = dict(evidence.tables[1].rows)
    assert bend[flow.SECOND] < bend[flow.FIRST] == pytest.approx(2.1, abs=0.4)
    costs = dict(evidence.tables[2].rows)
    assert costs["pairs"] < costs["independent"] == pytest.approx(2 + 9 + 2 * 0.09, abs=1.5)
    by_steps = {(row[0], row[1]): row[2] for row in evidence.tables[0].rows}
    assert by_steps[flow.SECOND, 1] < by_steps[flow.FIRST, 1] / 5 and len(by_steps) == 12
    assert all(math.isfinite(value) for value in by_steps.values())
