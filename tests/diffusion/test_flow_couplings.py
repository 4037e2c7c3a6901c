"""Which data travel to which noise."""

import itertools
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from danlu.diffusion.couplings import Independent, MinibatchOT, Pairs


def two(count, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator), torch.randn(count, *shape, generator=generator)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_optimal_transport_of_a_batch_is_the_best_of_all_orders():
    x0, x1 = two(6, 2, 2)
    kept, moved = MinibatchOT()(x0, x1, generator())
    costs = [((x0 - x1[list(order)]) ** 2).sum().item() for order in itertools.permutations(range(6))]
    assert torch.equal(kept, x0)
    assert ((x0 - moved) ** 2).sum().item() == pytest.approx(min(costs), rel=1e-5)
    assert torch.equal(moved.flatten(1).sort(0).values, x1.flatten(1).sort(0).values)


def test_optimal_transport_on_a_line_sorts():
    x0, x1 = two(50, 1)
    _, moved = MinibatchOT()(x0, x1, generator())
    assert torch.equal(moved[x0[:, 0].argsort()], x1.sort(0).values)
    _, apart = MinibatchOT(cost=lambda a, b: -torch.cdist(a, b).square())(x0, x1, generator())
    assert torch.equal(apart[x0[:, 0].argsort()], x1.sort(0, descending=True).values)


def test_independent_breaks_pairs_and_keeps_marginals():
    x0 = torch.arange(100.0)[:, None]
    kept, moved = Independent()(x0, x0, generator())
    assert torch.equal(kept, x0) and torch.equal(moved.sort(0).values, x0)
    assert (moved == x0).double().mean() < 0.1
    assert torch.equal(moved, Independent()(x0, x0, generator())[1])


def test_a_shuffling_loader_keeps_pairs_together():
    x0 = torch.arange(40.0)[:, None]
    loader = DataLoader(Pairs(x0, -x0), batch_size=7, shuffle=True, generator=generator())
    rows = [torch.cat(batch, 1) for batch in loader]
    assert len(rows) == 6 and rows[-1].shape == (5, 2)
    rows = torch.cat(rows)
    assert not torch.equal(rows[:, :1], x0)
    assert torch.equal(rows[:, 0], -rows[:, 1]) and torch.equal(rows[:, :1].sort(0).values, x0)


def test_bad_input():
    x0, x1 = two(4, 3)
    for coupling in (Independent(), MinibatchOT()):
        with pytest.raises(ValueError, match=r"x1 must have the shape of x0 \(4, 3\), got \(3, 3\)"):
            coupling(x0, x1[:3], generator())
    with pytest.raises(ValueError, match="x1 must have the shape"):
        Pairs(x0, x1[:2])
    with pytest.raises(ValueError, match="at least one sample"):
        Pairs(x0[:0], x1[:0])
    with pytest.raises(ValueError, match=r"cost must be finite and of shape \(4, 4\)"):
        MinibatchOT(cost=lambda a, b: a)(x0, x1, generator())
    with pytest.raises(ValueError, match="cost must be finite"):
        MinibatchOT()(x0 * float("inf"), x1, generator())


def test_a_missing_scipy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        MinibatchOT()(*two(4, 3), generator())
