"""Rescanning recurrences against attention and hand-unrolled scans, and the count of a depth-first evaluation."""

from __future__ import annotations

from math import comb

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from context.families import BY_NAME, tokens, widen
from danlu.attention.streaming.rescan import AttentionCell, RecurrentCell, RescanRNN, depth_first_logits
from danlu.hosts.architecture import UnsupportedArchitecture
from reference.dense import masked_attention, window_visible

F64 = torch.float64


def build(name: str = "llama", layers: int = 2, **options):
    model = BY_NAME[name].build(F64, num_hidden_layers=layers, max_position_embeddings=64, **options)
    model.set_attn_implementation("sdpa")
    return model


@pytest.mark.parametrize("order", ["backward", "forward"])
def test_attention_is_a_rescanning_recurrence(order):
    q, k, v = (nn.Linear(6, width, dtype=F64) for width in (4, 4, 5))
    x = torch.randn(2, 9, 6, dtype=F64)
    found = RescanRNN(AttentionCell(q, k, v), order)(x)
    wanted, _ = masked_attention(q(x)[:, None], k(x)[:, None], v(x)[:, None], window_visible(9, 9, 9))
    assert torch.allclose(found, wanted[:, 0], atol=1e-12)
    assert torch.autograd.gradcheck(RescanRNN(AttentionCell(q, k, v), order), (x[:1, :4].requires_grad_(),))


@pytest.mark.parametrize("kind", [nn.GRUCell, nn.LSTMCell])
@pytest.mark.parametrize("order", ["backward", "forward"])
@pytest.mark.parametrize("carry", [True, False])
def test_other_cells_scan_in_order_with_or_without_their_state(kind, order, carry):
    cell = kind(3, 4, dtype=F64)
    x = torch.randn(2, 5, 3, dtype=F64)
    state, wanted = None, []
    for i in range(5):
        state = state if carry else None
        for j in range(i + 1) if order == "forward" else range(i, -1, -1):
            state = cell(x[:, j], state)
        wanted.append(state[0] if isinstance(state, tuple) else state)
    found = RescanRNN(RecurrentCell(cell), order, carry_state=carry)(x)
    assert torch.equal(found, torch.stack(wanted, 1))


def test_a_forward_scan_with_a_fresh_state_is_the_cell_itself():
    cell, x = nn.GRUCell(3, 4, dtype=F64), torch.randn(2, 6, 3, dtype=F64)
    layer = nn.GRU(3, 4, batch_first=True, dtype=F64)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(layer, f"{name}_l0").data.copy_(getattr(cell, name))
    assert torch.allclose(RescanRNN(RecurrentCell(cell), "forward")(x), layer(x)[0], atol=1e-12)


@pytest.mark.parametrize(("layers", "length"), [(1, 5), (2, 1), (2, 9), (3, 7), (4, 5)])
def test_depth_first_evaluation_gives_the_logits_and_counts_binomials(layers, length):
    model, ids = build(layers=layers), tokens(1, length)
    logits, count = depth_first_logits(model, ids)
    assert torch.allclose(logits, model(ids).logits[0, -1], atol=1e-10)
    # in all layers together: v_n(i) evaluations and e_n(i) exponentials
    assert count.evaluations == comb(length + layers - 1, layers - 1)
    assert count.exponentials == comb(length + layers, layers) - 1
    # hidden 64 for the residual, query 64, y 64, and m and z of 4 heads, in each unfinished layer
    assert count.live_numbers == (layers if length > 1 else 1) * (3 * 64 + 2 * 4)
    assert "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping


def test_counts_of_the_source():
    v, e = (lambda n, i: comb(i + n - 1, n - 1)), (lambda n, i: comb(i + n, n) - 1)
    assert [(v(n, i), e(n, i)) for n, i in ((2, 9), (3, 9), (3, 20), (4, 10))] == [
        (10, 54),
        (55, 219),
        (231, 1770),
        (286, 1000),
    ]
    # and they solve the recursions
    for n in range(1, 5):
        for i in range(1, 12):
            below = [(v(n - 1, j), e(n - 1, j)) if n > 1 else (0, 0) for j in range(1, i + 1)]
            assert v(n, i) == 1 + sum(a for a, _ in below) and e(n, i) == i + sum(b for _, b in below)


@pytest.mark.parametrize("name", ["qwen3", "gemma", "phi3"])
def test_other_families(name):
    model, ids = build(name), tokens(1, 6)
    assert torch.allclose(depth_first_logits(model, ids[0])[0], model(ids).logits[0, -1], atol=1e-9)


def test_gpt2():
    config = transformers.GPT2Config(vocab_size=97, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    model = widen(transformers.GPT2LMHeadModel(config)).double().eval()
    ids = tokens(1, 6)
    logits, count = depth_first_logits(model, ids)
    assert torch.allclose(logits, model(ids).logits[0, -1], atol=1e-9) and count.exponentials == comb(8, 2) - 1


def test_bad_input():
    with pytest.raises(ValueError, match="order must be"):
        RescanRNN(RecurrentCell(nn.GRUCell(2, 2)), "sideways")
    with pytest.raises(ValueError, match="length >= 1"):
        RescanRNN(RecurrentCell(nn.GRUCell(2, 2)))(torch.zeros(1, 0, 2))
    with pytest.raises(ValueError, match="at least one token"):
        depth_first_logits(build(), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"got \(2, 3\)"):
        depth_first_logits(build(), tokens(2, 3))
    with pytest.raises(UnsupportedArchitecture, match="full attention in every layer"):
        depth_first_logits(BY_NAME["gemma2"].build(), tokens(1, 3))
