"""The parts of the depth experiment at small sizes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from danlu.lab import corpora
from danlu.lab import deepnorm as depth
from danlu.lab.claim import HOLDS, HOLDS_IN_PART, Context

TEXT = corpora.as_bytes(tuple(f"def f(x):\n    return x + {i}\n" for i in range(400)))
CONTEXT = Context(seeds=(0,), cache=Path("unused"))


def test_increments_cover_every_update_variant_and_scope():
    rows = depth.increments(TEXT, 0, (2, 8))
    assert len(rows) == 2 * 4 * 3
    assert all(len(values) == 2 and min(values) > 0 for values in rows.values())
    plain, adam = rows["Adam 1e-4", "plain post-norm", "matrices"], rows["Adam 1e-4", "Adam row", "matrices"]
    assert plain[1] / plain[0] > 2
    assert max(adam) / min(adam) < 1.5


def test_a_training_gives_equal_losses_for_one_seed_and_full_rate_from_the_first_step():
    schedule = depth.Constant(steps=6, batch=4, learning_rate=1e-2, weight_decay=0.0)
    assert {schedule.factor(step) for step in range(6)} == {1.0}
    one = depth.fitted("paper", 2, schedule, TEXT, TEXT, 0, CONTEXT)
    assert one == depth.fitted("paper", 2, schedule, TEXT, TEXT, 0, CONTEXT)
    assert one[0] < one[1][0]
    slow = depth.fitted("paper", 2, schedule, TEXT, TEXT, 0, CONTEXT, slow_vectors=True)
    assert slow[1][0] == one[1][0]
    assert slow[1][-1] != one[1][-1]


def test_variants_differ_in_the_blocks_alone():
    plain, paper = (depth.model(name, 2, 0) for name in ("plain post-norm", "paper"))
    assert torch.equal(plain.transformer.wte.weight, paper.transformer.wte.weight)
    assert torch.equal(plain.lm_head.weight, paper.lm_head.weight)
    up = [made.transformer.h[0].mlp.c_fc.weight for made in (plain, paper)]
    assert torch.allclose(up[0] * 16 ** (-1 / 4), up[1], atol=1e-6)
    assert (plain.config.deepnorm_alpha, paper.config.deepnorm_alpha) == (1.0, pytest.approx(4 ** (1 / 4)))


def test_byte_frequencies_are_counted_with_one_added():
    text = torch.tensor([0, 0, 1], dtype=torch.uint8)
    assert depth.unigram_loss(text, torch.tensor([0, 2], dtype=torch.uint8)) == pytest.approx(
        -(math.log(3 / 259) + math.log(1 / 259)) / 2
    )


def test_the_verdict_follows_the_numbers():
    changes = {
        (update, name, moved): (1.0, 1.0, 10.0 if name == "plain post-norm" else 1.0)
        for update in ("Adam 1e-4", "SGD 0.1")
        for name in ("plain post-norm", "paper", "Adam row", "LAMB row")
        for moved in ("matrices", "vectors", "all parameters")
    }
    curve = [3.0] * 30
    middle = {"plain post-norm": (3.2, curve), "paper": (2.5, curve), "Adam row": (2.55, curve)}
    deep = {"plain post-norm": (3.25, curve), "paper": (3.0, curve), "paper, slower vectors": (2.9, curve)}
    found = depth.evidence(changes, middle, deep, 3.2)
    assert found.verdict == HOLDS
    assert len(found.checks) == 9
    assert found.plots[0].lines["plain post-norm"] == (0.0, 0.0, 1.0)
    assert found.plots[1].x == (10.0, 20.0, 30.0)
    assert "2.90 with slower vectors" in found.summary
    learns = depth.evidence(changes, middle, {**deep, "plain post-norm": (2.9, curve)}, 3.2)
    assert learns.verdict == HOLDS_IN_PART
    assert [check.description for check in learns.checks if not check.met] == [
        "200 layers, plain: no better than byte frequencies"
    ]
