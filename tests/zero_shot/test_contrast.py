"""Samples-contrast: how many get which label, invariances, thresholds by both rules, refusals."""

from __future__ import annotations

import pytest
import torch

from danlu.zero_shot import SamplesContrast


def scores(count, seed=0):
    return torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("labels", [2, 3, 5])
@pytest.mark.parametrize("count", [5, 6, 30, 31, 34])
def test_every_label_but_the_last_gets_its_floor(labels, count):
    found = SamplesContrast(labels).segment(scores(count))
    counts = torch.bincount(found, minlength=labels).tolist()
    assert counts[:-1] == [count // labels] * (labels - 1)
    assert counts[-1] == count - sum(counts[:-1])


def test_the_lowest_scores_get_the_least_close_label():
    values = [3.0, -1.0, 0.5, 9.0, -7.0, 2.0]
    assert SamplesContrast(3).segment(values).tolist() == [2, 0, 1, 2, 0, 1]
    assert SamplesContrast([0.5, 0.2, 0.3]).segment(values).tolist() == [2, 0, 0, 2, 0, 1]
    assert SamplesContrast([0.1, 0.9]).segment(scores(30)).eq(0).sum() == 3


def test_only_the_order_of_the_scores_counts():
    values, contrast = scores(40), SamplesContrast([0.3, 0.3, 0.4])
    for change in (torch.sigmoid, lambda x: x**3, lambda x: 5 * x - 100):
        assert torch.equal(contrast.segment(change(values)), contrast.segment(values))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(contrast.segment(values[order]), contrast.segment(values)[order])


def test_ties_stay_in_the_order_given():
    assert SamplesContrast(2).segment([1.0, 1.0, 1.0, 1.0]).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("count", [3, 12, 13, 14])
def test_midpoints_give_the_fitted_set_its_own_labels_back(count):
    values = scores(count)
    contrast = SamplesContrast(3).fit(values)
    assert torch.equal(contrast.predict(values), contrast.segment(values))
    ordered = values.sort().values
    cut = count // 3
    assert contrast.thresholds[0] == pytest.approx(float(ordered[cut - 1] + ordered[cut]) / 2)


def test_the_published_rule_moves_the_pair_at_the_threshold_up():
    values = torch.arange(6.0)
    contrast = SamplesContrast(3, rule="largest").fit(values)
    assert contrast.thresholds == (1.0, 3.0)
    assert contrast.segment(values).tolist() == [0, 0, 1, 1, 2, 2]
    assert contrast.predict(values).tolist() == [0, 1, 1, 2, 2, 2]
    assert contrast.predict([0.99, 1.0, 2.99, 3.5]).tolist() == [0, 1, 1, 2]
    assert SamplesContrast(3).fit(values).predict([1.49, 1.5, 3.49, 3.51]).tolist() == [0, 1, 1, 2]


def test_bad_input():
    for shares in (1, 0, [1.0]):
        with pytest.raises(ValueError, match="shares must name at least two labels"):
            SamplesContrast(shares)
    for shares in ([0.5, 0.6], [1.2, -0.2], [0.0, 1.0]):
        with pytest.raises(ValueError, match="shares must be positive and sum to 1"):
            SamplesContrast(shares)
    with pytest.raises(ValueError, match="rule must be midpoint or largest, got 'middle'"):
        SamplesContrast(2, rule="middle")
    with pytest.raises(ValueError, match="fit must come before predict"):
        SamplesContrast(2).predict([1.0])
    with pytest.raises(ValueError, match="a pair for each of 3 labels.*got 2 pairs"):
        SamplesContrast(3).fit([1.0, 2.0])
    with pytest.raises(ValueError, match="a pair for each of 2 labels"):
        SamplesContrast([0.1, 0.9]).fit(scores(9))
    with pytest.raises(ValueError, match="finite numbers, one per pair"):
        SamplesContrast(2).fit([1.0, float("nan")])
    with pytest.raises(ValueError, match=r"got a shape of \(2, 2\)"):
        SamplesContrast(2).segment(torch.zeros(2, 2))
