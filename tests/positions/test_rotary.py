"""Rotation against explicit matrices, in both layouts, on part of a head, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch

from danlu.positions.rotary import Rotary, half_to_interleaved, interleaved_to_half, inverse_frequencies
from reference import dense


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize(("dim", "start", "head_dim"), [(8, 0, 8), (4, 0, 8), (4, 2, 8), (2, 3, 7), (6, 1, 9)])
@pytest.mark.parametrize("positions", [torch.arange(5), torch.tensor([-3.5, 0.25, 7.0, 1e5, -1e6])])
def test_equals_the_matrix(layout, dim, start, head_dim, positions):
    inv_freq = inverse_frequencies(dim)
    x = torch.randn(2, 3, 5, head_dim, dtype=torch.float64)
    expected = dense.rotate(x, positions, inv_freq, layout, start)
    torch.testing.assert_close(Rotary(inv_freq, layout, start).rotate(x, positions), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_inverse_frequencies_and_float32(layout):
    inv_freq = inverse_frequencies(64, 500000.0)
    expected = torch.tensor([500000.0 ** (-2 * i / 64) for i in range(32)], dtype=torch.float64)
    torch.testing.assert_close(inv_freq, expected, atol=0, rtol=1e-14)
    x = torch.randn(1, 2, 40, 64)
    positions = torch.arange(1_000_000, 1_000_040)  # angles are exact far out because they are built in float64
    ours = Rotary(inv_freq, layout).rotate(x, positions)
    assert ours.dtype == torch.float32
    expected = dense.rotate(x.double(), positions, inv_freq, layout)
    torch.testing.assert_close(ours.double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(layout, dtype):
    rotary = Rotary(inverse_frequencies(16), layout)
    x = torch.randn(2, 2, 9, 16).to(dtype)
    positions = torch.arange(300, 309)
    assert torch.equal(rotary.rotate(x, positions), rotary.rotate(x.float(), positions).to(dtype))


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_any_memory_layout_and_many_blocks(layout):
    rotary = Rotary(inverse_frequencies(64), layout)
    positions = torch.arange(2500)
    x = torch.randn(1, 8, 2500, 64)  # several cache blocks
    expected = torch.cat([rotary.rotate(x[:, :, i : i + 500], positions[i : i + 500]) for i in range(0, 2500, 500)], 2)
    for variant in (x, x.transpose(1, 2).contiguous().transpose(1, 2), x.mT.contiguous().mT):
        torch.testing.assert_close(rotary.rotate(variant, positions), expected, atol=1e-6, rtol=0)
    odd = torch.randn(1, 2, 7, 65)[..., 1:]  # offset and strides that no complex view allows
    torch.testing.assert_close(
        rotary.rotate(odd, positions[:7]), rotary.rotate(odd.contiguous(), positions[:7]), atol=1e-6, rtol=0
    )


def test_layouts_differ_by_a_permutation():
    inv_freq, positions = inverse_frequencies(8), torch.arange(6)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    half = Rotary(inv_freq).rotate(interleaved_to_half(x), positions)
    torch.testing.assert_close(half_to_interleaved(half), Rotary(inv_freq, "interleaved").rotate(x, positions))
    assert torch.equal(interleaved_to_half(torch.arange(6)), torch.tensor([0, 2, 4, 1, 3, 5]))
    assert torch.equal(half_to_interleaved(interleaved_to_half(x)), x)


def test_positions_per_batch_row_and_one_for_all():
    rotary = Rotary(inverse_frequencies(8))
    x = torch.randn(3, 2, 5, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4], [9, 8, 7, 6, 5], [-1, 0, 0, 0, 2]])
    rows = torch.cat([rotary.rotate(x[b : b + 1], positions[b]) for b in range(3)])
    torch.testing.assert_close(rotary.rotate(x, positions), rows)
    torch.testing.assert_close(rotary.rotate(x[:, 0], positions), rows[:, 0])  # without a head axis
    same = rotary.rotate(x, torch.full((5,), 4))
    torch.testing.assert_close(rotary.rotate(x, torch.tensor([4])), same)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_gradients(layout):
    rotary = Rotary(inverse_frequencies(4), layout, start=1)
    x = torch.randn(2, 2, 3, 6, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([0.0, -2.5, 3.0])
    assert torch.autograd.gradcheck(lambda y: rotary.rotate(y, positions), x)
    assert torch.autograd.gradgradcheck(lambda y: rotary.rotate(y, positions), x)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_traced_form_says_the_same(layout):
    rotary = Rotary(inverse_frequencies(8), layout, start=1)
    x = torch.randn(2, 2, 5, 11)
    compiled = torch.compile(lambda y: rotary.rotate(y, torch.arange(5)), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), rotary.rotate(x, torch.arange(5)))


def test_rotations_add_and_keep_norms():
    rotary = Rotary(inverse_frequencies(16))
    x = torch.randn(1, 2, 4, 16, dtype=torch.float64)
    a, b = torch.tensor([1.0, 2.0, 300.0, 4.5]), torch.tensor([-3.0, 0.5, 10.0, 2e5])
    torch.testing.assert_close(rotary.rotate(rotary.rotate(x, a), b), rotary.rotate(x, a.double() + b.double()))
    torch.testing.assert_close(rotary.rotate(x, a).norm(dim=-1), x.norm(dim=-1))


def test_empty_length():
    assert Rotary(inverse_frequencies(8)).rotate(torch.zeros(1, 2, 0, 8), torch.arange(0)).shape == (1, 2, 0, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inverse_frequencies(7), "dim must be an even number of at least 2, got 7"),
        (lambda: inverse_frequencies(8, 1.0), "base must be a finite number greater than 1, got 1.0"),
        (lambda: inverse_frequencies(8, math.inf), "base must be"),
        (lambda: Rotary(inverse_frequencies(8), "neox"), 'layout must be "half" or "interleaved"'),
        (lambda: Rotary(inverse_frequencies(8), start=-1), "start must be 0 or more"),
        (lambda: Rotary(torch.tensor([1.0, math.nan])), "inv_freq must be a non-empty vector"),
        (lambda: Rotary(torch.zeros(0)), "inv_freq must be a non-empty vector"),
        (
            lambda: Rotary(inverse_frequencies(8)).rotate(torch.zeros(3, 4), torch.arange(3)),
            "head_dim must be at least",
        ),
        (lambda: Rotary(inverse_frequencies(8)).rotate(torch.zeros(3, 8), torch.arange(2)), "cos must be"),
        (lambda: half_to_interleaved(torch.zeros(3)), "the last axis must be even"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
