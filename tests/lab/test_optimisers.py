"""Parts of the claims on Tiger and Lion, at sizes that take no time."""

import math

import pytest
import torch

from danlu.lab import optimiser_runs, optimisers, printed
from danlu.lab.claim import Context
from danlu.lab.measuring import peak_bytes


def test_printed_digits_repeat_and_can_be_told_apart():
    pixels, labels = printed.printed_digits(400, 1)
    again, _ = printed.printed_digits(400, 1)
    assert torch.equal(pixels, again) and pixels.shape == (400, 64)
    assert set(labels.tolist()) == set(range(10))
    # Nearest class mean is far better than chance (0.1), so that pixels say something about labels.
    means = torch.stack([pixels[labels == digit].mean(0) for digit in range(10)])
    test, truth = printed.printed_digits(400, 2)
    assert (torch.cdist(test, means).argmin(1) == truth).float().mean() > 0.5
    assert not torch.equal(pixels, printed.printed_digits(400, 3)[0])


@pytest.mark.parametrize("name", ["Tiger", "sign momentum", "Lion", "AdamW"])
def test_a_few_steps_are_taken_and_repeat(name):
    rate = optimisers._GRIDS[name][2]
    first, second = (
        optimiser_runs.held_out_loss(optimiser_runs.optimiser(name, rate), 16, 0, steps) for steps in (3, 30)
    )
    assert second < first
    assert second == optimiser_runs.held_out_loss(optimiser_runs.optimiser(name, rate), 16, 0, 30)


def test_overflow_shrinks_until_it_fits():
    shrunk = optimiser_runs.overflow_curve(torch.float16, "shrink", 0, steps=60, wide=280.0)
    skipped = optimiser_runs.overflow_curve(torch.float16, "skip", 0, steps=3, wide=280.0)
    assert not math.isfinite(shrunk[0]) and math.isfinite(shrunk[-1])
    assert not any(map(math.isfinite, skipped))


def test_memory_is_counted():
    assert 8000 <= peak_bytes(lambda: torch.zeros(1000).add(1)) < 8100
    tiger, adam = (optimiser_runs.window_bytes(name, 64, 2, 2) for name in ("Tiger", "AdamW"))
    assert tiger["state"] == tiger["parameters"] and adam["state"] == 2 * adam["parameters"]
    assert tiger["peak"] < 1.2 * (2 * tiger["parameters"] + tiger["largest"])
    assert adam["peak"] > 4 * adam["parameters"]


def test_byte_models_train(monkeypatch):
    text = torch.randint(8, (4000,), generator=torch.Generator().manual_seed(0))
    for name in ("Tiger", "AdamW"):
        assert optimiser_runs.byte_loss(name, 1e-2, text, text.repeat(5), 0, windows=2, length=16) < 6


def test_accumulation_is_exact():
    assert optimiser_runs.accumulation_gap(0, windows=3, micro_batches=4) < 1e-14


def test_the_scale_claim_writes_its_evidence(monkeypatch, tmp_path):
    monkeypatch.setattr(optimisers, "_WIDTHS", (8, 16))
    monkeypatch.setattr(optimisers, "_STEPS", 2)
    evidence = optimisers.tiger_scale.experiment(Context(seeds=(0,), cache=tmp_path))
    assert len(evidence.checks) == 3 and len(evidence.tables[0].rows) == 8
