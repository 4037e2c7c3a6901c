"""The parts of the few-call experiment at small sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from danlu.diffusion.processes import EDM
from danlu.lab import amed as few
from danlu.lab.claim import HOLDS, HOLDS_IN_PART, Context


def test_mixtures_are_the_same_each_time_and_have_their_stated_shapes():
    assert few.mixture(2).means.norm(dim=1).tolist() == pytest.approx([1.5] * 8)
    one, two, other = few.mixture(16), few.mixture(16), few.mixture(16, seed=1)
    assert one.means.shape == (10, 16) and one.means.dtype == torch.float32
    assert torch.equal(one.means, two.means) and not torch.equal(one.means, other.means)
    deviations = one.variances.sqrt()
    assert 0.1 <= float(deviations.min()) and float(deviations.max()) <= 0.4


def test_rivals_are_given_equal_calls_and_their_best_setting(monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(few, "_SAMPLES", 50)
    denoiser = few.mixture(2).denoiser(EDM())
    noise, reference = few.held_out(denoiser, 2)
    assert noise.shape == reference.shape == (50, 2)
    found = few.rivals(denoiser, 5, noise, reference)
    assert set(found) == {
        *("DDIM", "Heun", "DPM-Solver-2", "DPM-Solver++ 2M", "DPM-Solver++ 3M", "UniPC", "UniPC 3", "iPNDM-4")
    }
    # Two calls to an interval: an odd number needs the analytical first step.
    assert "analytical start" in found["Heun"][1] and "analytical start" in found["DPM-Solver-2"][1]
    assert found["iPNDM-4"][0] < found["DDIM"][0]


def test_the_claim_judges_the_plug_in_alone(monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(few, "_SAMPLES", 40)
    monkeypatch.setattr(few, "_DIMENSIONS", (2,))
    monkeypatch.setattr(few, "LIMITS", {3: 1.0})
    made = few.trained
    seen = []

    def quick(denoiser, dimensions, calls, recipe, seed):
        from dataclasses import replace

        seen.append(recipe)
        small = dict(trajectories=128, extra=4, iterations=min(2, recipe.iterations))
        small["endpoint_iterations"] = min(40, recipe.endpoint_iterations)
        return made(denoiser, dimensions, calls, replace(recipe, **small), seed)

    monkeypatch.setattr(few, "trained", quick)
    evidence = few.amed.experiment(Context(seeds=(0,), cache=Path("unused")))
    assert [(recipe.base, recipe.iterations, recipe.endpoint_iterations > 0) for recipe in seen] == [
        ("ipndm", 0, True),
        ("amed", 79, False),
    ]
    assert evidence.verdict in (HOLDS, HOLDS_IN_PART)
    (row,) = evidence.tables[0].rows
    assert evidence.checks[0].met == (row[5] <= row[3])
