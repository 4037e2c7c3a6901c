"""Steps along a sign: the loops, the lists and the plain formula against the formula written out."""

import math

import pytest
import torch

from danlu.kernels import signloops
from danlu.kernels.signs import SignUpdate, apply, apply_lists, generator, is_finite, mixed, sum_of_squares


def written_out(p, m, g, look, decay, keep, rate):
    """Theta and M after an update, in float64."""
    sign = torch.sign(m) if g is None else torch.sign(look * m + g)
    return keep * p - rate * sign, m if g is None else decay * m + g


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1,), (7, 3), (4097,), (640, 900)])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("parts", ["both", "feed", "move"])
@pytest.mark.parametrize("same", [False, True])
def test_every_way_is_the_formula(shape, by_row, parts, same, threads):
    if by_row and len(shape) == 1:
        shape = (*shape, 1)
    generator_ = torch.Generator().manual_seed(0)
    p, m, g = (torch.randn(shape, dtype=torch.float64, generator=generator_) for _ in range(3))
    m.view(-1)[1::5] = g.view(-1)[1::5] = 0  # where there is no sign, there is no step
    size = (shape[0], 1) if by_row else ()
    look, decay, keep, rate = torch.rand(4, *size, dtype=torch.float64, generator=generator_)
    look = decay if same else look
    theta, momentum = written_out(p, m, None if parts == "move" else g, look, decay, keep, rate)
    numbers = (look, decay, keep, rate) if by_row else tuple(x.item() for x in (look, decay, keep, rate))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for way in ("loops", "plain", "lists"):
            new_p, new_m = p.clone(), m.clone()
            update = SignUpdate(
                None if parts == "feed" else new_p, new_m, None if parts == "move" else g, *numbers
            )  # fmt: skip
            if way == "lists":
                if by_row:
                    continue
                apply_lists([update])
            else:
                squares = apply(update, loops=way == "loops")
                assert squares is None or squares == sum_of_squares(new_p)
            assert torch.allclose(new_m, momentum, atol=1e-15, rtol=1e-15)
            if parts != "feed":
                assert torch.allclose(new_p, theta, atol=1e-15, rtol=1e-15)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 12345, 299_999])
def test_entries_that_are_not_finite_are_found(value, place, dtype):
    x = torch.full((300_000,), torch.finfo(dtype).max, dtype=dtype)
    x[place] = value
    assert bool(is_finite(x)) == math.isfinite(value)
    assert bool(is_finite(x[:-1].view(-1, 1)[::2])) == (math.isfinite(value) or place % 2 == 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (), (3, 5), (999_999,)])
def test_sums_of_squares(shape, dtype):
    x = torch.randn(shape).to(dtype)
    assert math.isclose(float(sum_of_squares(x)), x.double().square().sum().item(), rel_tol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (700, 513)])
def test_facts_of_rows(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[::3] = 0
    if min(shape) > 0:
        x[0, -1] = -1e-300
    assert torch.equal(signloops.touched(x), (x != 0).any(-1))
    assert torch.allclose(signloops.row_squares(x), x.square().sum(-1), rtol=1e-14)


def test_updates_are_seen_by_autograd():
    x = torch.ones(3, requires_grad=True)
    loss = (x * x).sum()
    with torch.no_grad():
        apply(SignUpdate(x, torch.ones(3), None, rate=0.1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, -0.1, 1e-3, 6.1e-5, -3e-6, 2.0**-24 * 0.3, 40000.1])
def test_random_rounding_by_a_key_is_right_on_average(value, dtype):
    wide = signloops.round_(torch.full((50_000,), value), dtype, 0, mixed(1, 2))
    assert torch.equal(wide.to(dtype).float(), wide)
    found = wide.unique()
    assert len(found) == 2
    low, high = found.to(dtype)
    assert torch.nextafter(low, torch.tensor(float("inf")).to(dtype)) == high
    assert abs(wide.double().mean() - torch.tensor(value).double()) < 0.02 * (high.double() - low.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_random_rounding_copies_what_the_type_holds(dtype):
    held = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).float()
    assert torch.equal(signloops.round_(held.clone(), dtype, 0, 3).nan_to_num(7), held.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_random_rounding_depends_on_key_and_place_alone(dtype):
    x = torch.randn(1000)
    whole = signloops.round_(x.clone(), dtype, 0, mixed(5))
    parts = [signloops.round_(part.clone(), dtype, start, mixed(5)) for start, part in ((0, x[:300]), (300, x[300:]))]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, signloops.round_(x.clone(), dtype, 0, mixed(6)))


def test_keys_are_told_apart():
    assert len({mixed(*key) for key in [(0,), (1,), (0, 0), (0, 1), (1, 0), (2**40, 1)]}) == 6
    draws = [torch.rand(3, generator=generator(torch.device("cpu"), *key)) for key in ((1, 2), (1, 2), (2, 1))]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
