"""Stochastic rounding: right on average, exact where exact, and never beyond the neighbours."""

import pytest
import torch

from danlu.kernels.rounding import rounded, stochastic_round_

HALVES = [torch.bfloat16, torch.float16]


def draw_many(value: float, dtype: torch.dtype, count: int = 20000) -> torch.Tensor:
    target = torch.empty(count, dtype=dtype)
    return stochastic_round_(target, torch.full((count,), value), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, -0.1, 1e-3, 6.1e-5, -3e-6, 2.0**-24 * 0.3, 40000.1])
def test_mean_is_the_value_and_only_neighbours_appear(value, dtype):
    got = draw_many(value, dtype).double()
    exact = torch.tensor(value, dtype=torch.float32).double().item()
    low, high = got.min().item(), got.max().item()
    gap = high - low
    assert low <= exact <= high
    assert len(got.unique()) <= 2
    if gap:
        assert torch.nextafter(torch.tensor(low).to(dtype), torch.tensor(float("inf")).to(dtype)).item() == high
        assert abs(got.mean().item() - exact) < 0.02 * gap


@pytest.mark.parametrize("dtype", HALVES)
def test_what_the_type_holds_is_copied(dtype):
    finite = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = finite[torch.isfinite(finite)]
    target = torch.empty_like(finite)
    stochastic_round_(target, finite.float(), torch.Generator().manual_seed(0))
    assert torch.equal(target, finite)
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    target = torch.empty(5, dtype=dtype)
    assert torch.equal(stochastic_round_(target, special).float().nan_to_num(7), special.nan_to_num(7))


@pytest.mark.parametrize("dtype", HALVES)
def test_finite_values_below_the_largest_stay_finite(dtype):
    top = torch.finfo(dtype).max
    below = torch.nextafter(torch.tensor(top, dtype=torch.float32), torch.tensor(0.0))
    assert torch.isfinite(draw_many(below.item(), dtype)).all()
    # As ordinary rounding does: a little above the largest goes down to it, far above becomes infinite.
    assert torch.isinf(draw_many(3.4e38, dtype)).all()


def test_one_generator_state_gives_one_result():
    source = torch.randn(100)
    one, two = (
        stochastic_round_(torch.empty(100, dtype=torch.bfloat16), source, torch.Generator().manual_seed(5))
        for _ in range(2)
    )
    assert torch.equal(one, two)


def test_draws_decide():
    source = torch.tensor([1.0 + 2**-9] * 2)  # a quarter of the way from 1 to its bfloat16 neighbour
    got = rounded(source, torch.bfloat16, torch.tensor([0.24, 0.26]))
    assert got.tolist() == [1.0 + 2**-7, 1.0]


def test_other_types_and_shapes_are_refused():
    with pytest.raises(TypeError, match="target must be bfloat16 or float16"):
        stochastic_round_(torch.empty(2), torch.empty(2))
    with pytest.raises(TypeError, match="source must be float32"):
        stochastic_round_(torch.empty(2, dtype=torch.bfloat16), torch.empty(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="shape of target"):
        stochastic_round_(torch.empty(2, dtype=torch.bfloat16), torch.empty(3))
