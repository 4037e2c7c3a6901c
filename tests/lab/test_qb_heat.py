"""The parts of the claim on QB-Heat at small sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from danlu.lab import qb_heat, waves
from danlu.lab.claim import HOLDS, HOLDS_IN_PART, Context
from danlu.lab.training import Schedule

CONTEXT = Context(seeds=(0,), cache=Path("unused"))
SHORT = Schedule(3, 8, 2e-3, 0.0, 0)


def test_waves_solve_their_recursion_and_name_the_strongest():
    images, labels = waves.waves(300, torch.Generator().manual_seed(0))
    assert images.shape == (300, 1, 16, 16) and labels.bincount(minlength=4).min() > 40
    assert images.var().item() == pytest.approx(4 * 0.49 / 2, rel=0.1)
    # The product of (shift - 2cos k + shift back) over all four waves leaves nothing.
    left = images.double()
    for k, _ in waves.WAVES:
        left = left[..., 2:] + left[..., :-2] - 2 * torch.tensor(k, dtype=torch.float64).cos() * left[..., 1:-1]
    assert left.abs().max() < 1e-3 < images.abs().max()
    spectrum = torch.stack([
        (images[:, 0] * torch.exp(-1j * (k * torch.arange(16.0) + m * torch.arange(16.0)[:, None]))).sum((1, 2)).abs()
        for k, m in waves.WAVES
    ])  # fmt: skip
    assert (spectrum.argmax(0) == labels).float().mean() > 0.9


@pytest.mark.parametrize("fill", qb_heat.FILLS)
def test_every_fill_starts_from_the_same_encoder_and_is_given_by_the_seed(fill):
    runs = [qb_heat.pretrain(qb_heat.waves_batch, qb_heat.FILLS[fill], SHORT, 0, CONTEXT, fill)[1] for _ in range(2)]
    assert runs[0] == runs[1] and len(runs[0]) == 3
    model, _ = qb_heat.pretrain(qb_heat.waves_batch, qb_heat.FILLS[fill], Schedule(1, 4, 0.0, 0.0, 0), 0, CONTEXT, fill)
    assert all(
        torch.equal(a, b) for a, b in zip(model.backbone.parameters(), qb_heat._encoder(0).parameters(), strict=True)
    )
    corner, centre = qb_heat.hidden_error(model, qb_heat.waves_batch(torch.Generator().manual_seed(1), 50))
    assert 0.3 < corner < 3 and 0.3 < centre < 3


def test_a_probe_reads_what_is_linear_and_not_what_is_absent():
    features = torch.randn(600, 8)
    labels = features[:, :3].argmax(1)
    assert qb_heat.probe(features[:400], labels[:400], features[400:], labels[400:]) > 0.93
    noise = torch.randn(600, 8)
    assert qb_heat.probe(noise[:400], labels[:400], noise[400:], labels[400:]) < 0.5


def test_sequences_are_smooth_and_the_encoder_sees_visible_places_alone():
    drawn = waves.sequences(200, torch.Generator().manual_seed(0))
    values, places = drawn["values"], drawn["places"]
    assert values.shape == (200, 32) and places.shape == (200, 16) and (places.diff(dim=1) > 0).all()
    assert values.var().item() == pytest.approx(1, rel=0.15)
    assert values.diff(dim=1).var() < 0.3
    for interpolate in (True, False):
        model = waves.Sequences(interpolate)
        seen = []
        model.encoder.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        model(values, places)
        assert torch.equal(seen[0][..., 0], values.gather(1, places))


def test_the_verdict_follows_the_numbers():
    errors = {
        "[MASK]": (0.5, 0.001), "copy": (0.2, 0.3), "tied": (0.1, 0.2), "inverse": (0.05, 0.1), "untied": (0.02, 0.02),
        "quadratic": (0.03, 0.03),
    }  # fmt: skip
    curves = {name: (1.0, 0.5) for name in errors}
    tasks = ("waves", "waves, pooled", "digits", "digits, pooled")
    probes = {task: {"random": 0.8, "QB-Heat": 0.9, "supervised": 0.95} for task in tasks}
    found = qb_heat.evidence(errors, curves, probes, {"[MASK]": 0.3, "interpolation": 0.1})
    assert found.verdict == HOLDS and len(found.checks) == 7 and found.plots[0].x == (10.0, 20.0)
    assert found.tables[0].rows[0] == ("[MASK]", pytest.approx(0.4002), 0.5, 0.001)
    probes["digits"]["QB-Heat"] = 0.81
    found = qb_heat.evidence(errors, curves, probes, {"[MASK]": 0.3, "interpolation": 0.1})
    assert found.verdict == HOLDS_IN_PART
    assert [check.measured for check in found.checks if not check.met] == ["0.810 against 0.800"]
    errors["untied"], errors["tied"] = (0.03, 0.03), (0.3, 0.2)
    found = qb_heat.evidence(errors, curves, probes, {"[MASK]": 0.1, "interpolation": 0.3})
    assert sum(not check.met for check in found.checks) == 4
