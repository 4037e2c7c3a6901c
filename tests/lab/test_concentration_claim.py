"""The parts of the claims on concentration, at sizes that take no time."""

from __future__ import annotations

import pytest
import torch

from danlu.attention.sparsity import sparsity
from danlu.lab import concentration


@pytest.mark.parametrize("name", concentration.OPERATORS)
def test_operators_are_measured_as_their_weights_say(name):
    features, kernel, scale = concentration.OPERATORS[name]
    generator = torch.Generator().manual_seed(5)
    k = torch.randn(40, 64, generator=generator)
    targets = torch.randint(40, (200,), generator=generator)
    scores = scale * features(k[targets]) @ features(k).T
    weights = scores.softmax(-1) if kernel == "softmax" else kernel(scores)
    found = concentration.concentration(name, 40, 5)
    assert found["sparsity"] == pytest.approx(sparsity(weights).mean().item(), rel=1e-4)
    assert found["hits"] == pytest.approx((weights.abs().argmax(-1) == targets).double().mean().item(), abs=0.011)


def test_ranks_of_linear_attention_are_bounded_by_its_features():
    found = {name: (effective, numerical) for name, effective, numerical in concentration.ranks(24, 4, 0)}
    effective, numerical = found["linear with 8 features, bidirectional"]
    assert numerical <= 9 and effective < found["linear with 8 features, causal"][0]  # 1e-9 adds a ninth direction


def test_depth_first_and_policies_agree_with_the_host():
    evaluations, exponentials, live, error = concentration.depth_first(5, 0)
    assert (evaluations, exponentials, live) == (6, 20, 2 * (3 * 32 + 2 * 4)) and error < 1e-10
    rows = concentration.policies(4, 0)
    assert all(same for *_, same in rows) and [row[1] for row in rows] == [28 * n for n in (256, 128, 64, 32, 0)]


def test_long_attention_takes_no_matrix():
    plain, packed, matrix = concentration.long_attention(4096)
    assert max(plain, packed) < 0.2 * matrix
