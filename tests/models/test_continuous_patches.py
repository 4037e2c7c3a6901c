"""Patches are cut in the order of an independent walk and put together again bit for bit."""

from __future__ import annotations

import pytest
import torch

from danlu.models.continuous import patch_order, patchify, token_statistics, unpatchify
from reference.continuous import cut, walk

SHAPES = [((3, 8, 12), (2, 3)), ((1, 4, 4), 2), ((2, 6, 3), (6, 3)), ((1, 5, 1), 1), ((1, 9, 15), 3)]


@pytest.mark.parametrize("order", ["raster", "zigzag", "spiral"])
@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (5, 1), (4, 4), (3, 5), (5, 2)])
def test_orders_are_those_of_a_walk_over_the_grid(order, grid):
    assert patch_order(order, *grid).tolist() == walk(order, *grid)


def test_the_orders_of_a_small_grid_are_the_familiar_ones():
    assert patch_order("spiral", 3, 3).tolist() == [0, 1, 2, 5, 8, 7, 6, 3, 4]
    assert patch_order("zigzag", 3, 3).tolist() == [0, 1, 3, 6, 4, 2, 5, 7, 8]


@pytest.mark.parametrize(("shape", "patch"), SHAPES)
@pytest.mark.parametrize("order", ["raster", "zigzag", "spiral", "random", "shared", "own"])
def test_unpatchify_undoes_patchify_bit_for_bit(shape, patch, order):
    images = torch.randn(3, *shape)
    high, wide = (patch, patch) if isinstance(patch, int) else patch
    count = shape[1] * shape[2] // (high * wide)
    if order == "shared":
        order = torch.randperm(count)
    elif order == "own":
        order = torch.stack([torch.randperm(count) for _ in range(3)])
    tokens = patchify(images, patch, order, seed=4)
    assert tokens.shape == (3, count, shape[0] * high * wide)
    assert torch.equal(unpatchify(tokens, patch, shape[1:], order, seed=4), images)


@pytest.mark.parametrize("order", ["raster", "zigzag", "spiral"])
def test_tokens_are_those_cut_out_pixel_by_pixel(order):
    images = torch.randn(2, 3, 6, 8)
    tokens = patchify(images, (3, 2), order)
    for image, own in zip(images, tokens, strict=True):
        assert torch.equal(own, cut(image, 3, 2, walk(order, 2, 4)))


def test_each_row_has_its_own_permutation():
    images = torch.arange(2 * 4.0).view(2, 1, 2, 2)
    order = torch.tensor([[3, 1, 0, 2], [0, 1, 2, 3]])
    assert patchify(images, 1, order)[..., 0].tolist() == [[3, 1, 0, 2], [4, 5, 6, 7]]


def test_a_random_order_comes_from_its_seed_alone():
    first = patch_order("random", 4, 4, seed=1)
    torch.rand(7)
    assert torch.equal(first, patch_order("random", 4, 4, seed=1))
    assert not torch.equal(first, patch_order("random", 4, 4, seed=2))
    assert sorted(first.tolist()) == list(range(16))


def test_tokens_keep_dtype_and_gradient():
    images = torch.randn(1, 1, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    tokens = patchify(images, 2, "spiral")
    assert tokens.dtype == torch.bfloat16
    (tokens * torch.arange(16).view(1, 4, 4)).sum().backward()
    assert sorted(images.grad.flatten().tolist()) == list(range(16))


def test_statistics_normalise_the_tokens_they_come_from():
    tokens = torch.randn(50, 8, 3) * torch.tensor([1.0, 5.0, 0.001]) + 2
    mean, std = token_statistics(tokens)
    normalised = (tokens - mean[0]) / std[0]
    assert abs(float(normalised.mean())) < 1e-6 and float(normalised.std()) == pytest.approx(1, abs=1e-3)
    mean, std = token_statistics(tokens, per_dimension=True)
    assert torch.allclose(torch.tensor(mean), tokens.mean((0, 1)), atol=1e-5)
    assert std[1] == pytest.approx(float(tokens[..., 1].std()), rel=1e-2)
    assert std[2] == pytest.approx(std[1] / 100)  # a constant dimension is not blown up


def test_what_cannot_be_cut_is_refused():
    images = torch.randn(1, 1, 6, 6)
    with pytest.raises(ValueError, match="6 x 6 pixels are no multiple of 4 x 4; pad or crop"):
        patchify(images, 4)
    with pytest.raises(
        ValueError, match="order must be one of raster, zigzag, spiral, random or a permutation, got 'z'"
    ):
        patchify(images, 2, "z")
    with pytest.raises(ValueError, match="each of 0..8 once"):
        patchify(images, 2, torch.zeros(9, dtype=torch.long))
    with pytest.raises(ValueError, match=r"integers of shape \(9,\) or \(1, 9\)"):
        patchify(images, 2, torch.arange(8))
    with pytest.raises(ValueError, match="batch, channels, height, width"):
        patchify(images[0], 2)
    with pytest.raises(ValueError, match=r"tokens must be \(batch, 9, channels \* 4\)"):
        unpatchify(torch.randn(1, 8, 4), 2, (6, 6))
    with pytest.raises(ValueError, match="rows and columns must be at least 1"):
        patch_order("raster", 0, 3)
    with pytest.raises(ValueError, match="must be finite and vary"):
        token_statistics(torch.ones(3, 2))
