"""Lion: the published recurrence, the peer's implementation, its limits."""

import io

import pytest
import torch
from torch import nn

from danlu.optim.lion import Lion
from danlu.optim.tiger import Tiger
from reference import sign_momentum

PATHS = {"loops": {}, "plain": {"fused": False}, "foreach": {"foreach": True}}


def draw(count: int, *shape: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for _ in range(count)]


def feed(optimizer, parameter, gradients):
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.98), (0.5, 0.9), (0.0, 0.9)])
def test_equals_the_article(betas, path):
    start, *gradients = draw(21, 7, 5)
    theta, m = sign_momentum.lion(start, gradients, b1=betas[0], b2=betas[1], eta=0.01, lam=0.3)
    parameter = nn.Parameter(start.clone())
    optimizer = Lion([parameter], 0.01, betas, weight_decay=0.3, **PATHS[path])
    feed(optimizer, parameter, gradients)
    assert torch.allclose(parameter, theta, atol=1e-14, rtol=0)
    assert torch.allclose(optimizer.state[parameter]["momentum"] * (1 - betas[1]), m, atol=1e-14, rtol=0)


def test_equals_another_implementation():
    peer = pytest.importorskip("pytorch_optimizer")
    start, *gradients = draw(21, 7, 5)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    feed(Lion([ours], 1e-3, weight_decay=0.1), ours, gradients)
    feed(peer.Lion([theirs], 1e-3, betas=(0.9, 0.99), weight_decay=0.1), theirs, gradients)
    assert torch.allclose(ours, theirs, atol=1e-14, rtol=0)


def test_equal_betas_are_tiger_without_its_rates():
    start, *gradients = draw(9, 400, 30)
    ours, tiger = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    one = Lion([ours], 1e-3, (0.9, 0.9), weight_decay=0.1)
    two = Tiger([tiger], 1e-3, 0.9, weight_decay=0.1, rule="plain")
    feed(one, ours, gradients)
    feed(two, tiger, gradients)
    assert torch.allclose(ours, tiger, atol=1e-14, rtol=0)
    # Momentum first is the mistake that loose tests pass: with other betas the two differ.
    other = nn.Parameter(start.clone())
    feed(Lion([other], 1e-3, (0.5, 0.9), weight_decay=0.1), other, gradients)
    assert (other - tiger).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_resumes_to_the_bit_from_a_file_without_code(dtype):
    start, *gradients = draw(9, 40, 30, dtype=dtype)
    whole, half = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    feed(Lion([whole], 1e-3, seed=3), whole, gradients)
    first = Lion([half], 1e-3, seed=3)
    feed(first, half, gradients[:5])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = Lion([half], 1e-3, seed=3)
    second.load_state_dict(torch.load(file, weights_only=True))
    feed(second, half, gradients[5:])
    assert torch.equal(half, whole)


def test_maximize_mirrors_and_missing_gradients_are_left():
    start, *gradients = draw(5, 4, 4)
    up, down, rest = (nn.Parameter(start.clone()) for _ in range(3))
    feed(Lion([up, rest], maximize=True), up, [-g for g in gradients])
    feed(Lion([down]), down, gradients)
    assert torch.equal(up, down) and torch.equal(rest, start)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_small_steps_on_average(dtype):
    start = torch.randn(128, 256).to(dtype)
    parameter = nn.Parameter(start.clone())
    feed(Lion([parameter], 1e-4), parameter, [torch.ones_like(start)] * 100)
    assert abs((start.float() - parameter.float()).mean() - 0.01) < 5e-4


def test_a_state_of_another_type():
    start, gradient = draw(2, 4, 4, dtype=torch.float32)
    parameter = nn.Parameter(start)
    optimizer = Lion([parameter], state_dtype=torch.bfloat16)
    feed(optimizer, parameter, [gradient])
    assert optimizer.state[parameter]["momentum"].dtype == torch.bfloat16


def test_bad_arguments_are_refused():
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"betas\[0\] must be in \[0, 1\), got 1"):
        Lion([parameter], betas=(1.0, 0.9))
    with pytest.raises(ValueError, match=r"betas\[1\] must be in \[0, 1\), got -0.1"):
        Lion([parameter], betas=(0.9, -0.1))
    with pytest.raises(ValueError, match="lr must be in"):
        Lion([parameter], lr=-1e-4)
    with pytest.raises(TypeError, match="real floating-point"):
        Lion([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
