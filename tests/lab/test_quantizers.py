"""The parts of the claim on quantizers, at sizes that take no time."""

import math

import pytest
import torch

from danlu.lab import quantizers
from danlu.lab.claim import HOLDS, HOLDS_IN_PART, Context
from danlu.vision.quantizer import build_quantizer


def test_sizes_are_those_of_the_recommended_levels():
    assert [math.prod(levels) for levels in quantizers.SIZES.values()] == [15, 64, 1000, 4375]
    for size in quantizers.SIZES:
        for method in quantizers.METHODS:
            made = build_quantizer(quantizers._quantizer(size, method))
            assert made.codebook_size == (math.prod(quantizers.SIZES[size]) if method == "FSQ" else size)


@pytest.mark.parametrize("method", quantizers.METHODS)
def test_a_run_repeats_and_learns(method):
    short = quantizers.reconstruct(64, method, 0, steps=3, batch=16)
    assert short == quantizers.reconstruct(64, method, 0, steps=3, batch=16)
    longer = quantizers.reconstruct(64, method, 0, steps=40, batch=64)
    assert longer["train"] < short["train"]
    assert 0 < longer["use"] <= 1 and 1 <= longer["perplexity"] <= 64


def test_the_verdict_follows_the_written_criterion(monkeypatch):
    errors = {"FSQ": [3.5, 2.9, 1.7, 1.3], "VQ": [3.0, 2.5, 2.1, 1.9], "VQ, moving average": [4.5, 3.0, 2.3, 2.4]}
    use = {"FSQ": 0.99, "VQ": 0.28, "VQ, moving average": 0.22}

    def measured(size: int, method: str, seed: int) -> dict[str, float]:
        train = errors[method][list(quantizers.SIZES).index(size)]
        return {"train": train + seed, "test": train + 1, "use": use[method], "perplexity": 10.0}

    monkeypatch.setattr(quantizers, "reconstruct", measured)
    evidence = quantizers.fsq_against_vq.experiment(Context(seeds=(0, 1), cache=None))
    assert evidence.verdict == HOLDS and len(evidence.checks) == 6
    assert evidence.tables[0].rows[0] == pytest.approx((15, "FSQ", 4.0, 4.5, 0.99, 10.0))
    errors["VQ"][1] = 2.95
    assert quantizers.fsq_against_vq.experiment(Context(seeds=(0,), cache=None)).verdict == HOLDS_IN_PART


def test_training_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    quantizers.reconstruct(16, "FSQ", 0, steps=1, batch=4)
    assert torch.equal(torch.random.get_rng_state(), before)
