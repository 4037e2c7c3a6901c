"""The RWKV-4 mixer: its average against plain sums and against the host library's layer, and its extremes."""

import math

import pytest
import torch
from torch import Tensor

from danlu.attention.recurrent.rwkv import RWKV4Mix, WKVState, wkv
from reference.scan import naive_wkv, two_recurrences_wkv

transformers = pytest.importorskip("transformers")


def problem(length: int = 40, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, v = spread * torch.randn(2, length, 5, dtype=torch.float64), torch.randn(2, length, 5, dtype=torch.float64)
    return k, v, torch.linspace(-5, 1, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)


@pytest.mark.parametrize("length", [1, 2, 40])
def test_average_is_the_naive_sum_and_two_recurrences_with_a_division(length):
    k, v, decay, first = problem(length)
    found, _ = wkv(k, v, decay, first)
    torch.testing.assert_close(found, naive_wkv(k, v, decay, first), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, two_recurrences_wkv(k, v, decay, first), rtol=0, atol=1e-10)


def test_gradients_are_those_of_the_naive_sum():
    values = [x.requires_grad_() for x in problem(12)]
    weights = torch.randn(2, 12, 5, dtype=torch.float64)
    found = torch.autograd.grad((wkv(*values)[0] * weights).sum(), values)
    expected = torch.autograd.grad((naive_wkv(*values) * weights).sum(), values)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_keys_may_be_huge_or_tiny():
    k, v, decay, first = problem()
    exact = wkv(k, v, decay, first)[0]
    for shift in (-700.0, 700.0):
        torch.testing.assert_close(wkv(k + shift, v, decay, first)[0], exact, rtol=0, atol=1e-10)
    k, v, decay, first = (x.float() for x in problem(300, spread=60.0))
    found, exact = wkv(k, v, decay, first)[0], wkv(k.double(), v.double(), decay.double(), first.double())[0]
    assert (found - exact).abs().max() < 1e-4


def test_a_huge_key_does_not_outlive_its_text():
    k, v, decay, first = problem(8)
    k[:, 1] += 2000
    reset = torch.zeros(2, 8, dtype=torch.bool)
    reset[:, [0, 4, 6]] = True
    found, state = wkv(k, v, decay, first, reset=reset)
    parts = [wkv(k[:, a:b], v[:, a:b], decay, first) for a, b in ((0, 4), (4, 6), (6, 8))]
    torch.testing.assert_close(found, torch.cat([out for out, _ in parts], 1), rtol=0, atol=1e-12)
    last = parts[-1][1]
    for name in ("numerator", "denominator"):
        ours, theirs = (getattr(x, name) * x.scale.exp() for x in (state, last))
        torch.testing.assert_close(ours, theirs)


def test_empty_input_keeps_the_state():
    k, v, decay, first = problem(3)
    state = wkv(k, v, decay, first)[1]
    out, same = wkv(k[:, :0], v[:, :0], decay, first, state)
    assert out.shape == (2, 0, 5) and all(torch.equal(x, y) for x, y in zip(same, state, strict=True))
    assert isinstance(same, WKVState)


@pytest.mark.parametrize("layer", [0, 2])
def test_mixer_is_the_host_layer_with_the_same_weights(layer):
    from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

    config = transformers.RwkvConfig(hidden_size=8, attention_hidden_size=6, num_hidden_layers=3, context_length=64)
    host = RwkvSelfAttention(config, layer)
    ours = RWKV4Mix(hidden_size=8, state_size=6, layer=layer, layers=3)
    host.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 30, 8)
    expected = host(x)[0]
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-6)
    (ours(x) * expected.detach()).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in ours.parameters())


def test_start_values_are_those_of_the_host():
    config = transformers.RwkvConfig(
        vocab_size=8, hidden_size=8, attention_hidden_size=6, num_hidden_layers=3, context_length=16
    )
    host = transformers.RwkvModel(config)
    for number, block in enumerate(host.blocks):
        ours = RWKV4Mix(hidden_size=8, state_size=6, layer=number, layers=3)
        for name, value in ours.named_parameters(recurse=False):
            expected = getattr(block.attention, name)
            if name == "time_first":  # the host fills it with ones; RWKV-4 has log 0.3 and a zigzag
                expected = torch.tensor([0.0, 0.5, -0.5] * 2) + math.log(0.3)
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
