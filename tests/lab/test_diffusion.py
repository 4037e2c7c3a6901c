"""Parts of the claims on training diffusion models, at small sizes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from danlu.diffusion.processes import VP
from danlu.lab import diffusion
from danlu.lab.claim import Context

PROCESS = VP()
TIME = float(PROCESS.time_of(math.log(0.6 / 0.8)))


def test_the_constant_is_the_known_one():
    assert abs(diffusion.exact_constant(diffusion.line_mixture(), PROCESS, TIME) - 0.84164979) < 1e-8


def test_the_gap_of_both_losses_is_the_constant_for_a_wrong_model():
    matching, conditional, floor, error = diffusion.both_losses(
        lambda x, t: -x, diffusion.line_mixture(), PROCESS, TIME, 20_000, seed=0
    )
    assert abs(conditional - matching - floor) < 4 * error < 0.1
    assert abs(matching - 0.23313021) < 0.02 and abs(conditional - 1.07478) < 0.05


def test_the_ratio_estimator_is_biased_in_small_batches_only():
    mixture = diffusion.line_mixture()
    small, large = (diffusion.ratio_bias(mixture, PROCESS, TIME, size, 4000, seed=0) for size in (4, 64))
    assert 0.1 < small < 0.3 and large < 0.03
    bias, error = diffusion.conditional_bias(mixture, PROCESS, TIME, 4, 4000, seed=0)
    assert abs(bias) < 4 * error


@pytest.mark.parametrize("conditional", [True, False])
def test_training_lowers_the_error_and_follows_the_seed(conditional, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(diffusion, "_STEPS", 200)
    context = Context(seeds=(0,), cache=tmp_path)
    runs = [
        diffusion.trained_errors(conditional, diffusion.line_mixture(), PROCESS, TIME, 0, context) for _ in range(2)
    ]
    assert runs[0] == runs[1] and len(runs[0]) == 2
    assert runs[0][-1] < 0.1
    assert torch.isfinite(torch.tensor(runs[0])).all()
