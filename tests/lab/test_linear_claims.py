"""The claims on linear attention and quantised keys, at tiny sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from danlu.lab import linear
from danlu.lab.claim import Context


def test_as_many_codes_as_keys_leave_no_error_and_the_mean_is_the_mean():
    errors = linear.map_errors("clusters", 96, 0, tokens=96)
    assert errors["VQ"] < 1e-3 < errors["soft VQ, tau 1"]
    assert 0.2 < errors["mean of values"] < 1.2
    assert errors == linear.map_errors("clusters", 96, 0, tokens=96)


def test_independent_keys_are_not_the_clustered_ones():
    kinds = ("clusters", "clusters, unrelated values", "independent")
    errors = [linear.map_errors(kind, 80, 1, tokens=400)["VQ"] for kind in kinds]
    assert errors == sorted(errors) and errors[0] < 0.1 < errors[2]


def test_exact_attention_of_the_claim_is_vq_attention_with_a_code_for_every_key():
    model = linear.ByteModel("vq").eval()
    exact = linear.ExactAttention("full", hidden_size=64, heads=2, codes=24, block=64, position="rotary")
    mixer = model.mixers[0]
    exact.layer.load_state_dict({k: v for k, v in mixer.state_dict().items() if "codebook" not in k})
    x, places = torch.randn(1, 24, 64), torch.arange(24)
    from danlu.attention.key_norm import key_norm
    from danlu.attention.vq.codebook import VQCodebook

    keys = key_norm(mixer.k_proj(x).unflatten(-1, (2, 32)).transpose(1, 2))
    mixer.codebook = VQCodebook(2, 24, 32)
    mixer.codebook.set(keys[0].detach())
    torch.testing.assert_close(exact(x, places), mixer(x, places), rtol=1e-4, atol=1e-5)


def test_the_window_ends_with_the_block_before():
    exact = linear.ExactAttention("window", hidden_size=64, heads=2, codes=4, block=4, position="rotary")
    x = torch.randn(1, 12, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(exact(x, torch.arange(12))[0, 9].sum(), x)
    seen = gradient[0].abs().sum(-1) > 0
    assert seen.tolist() == [False] * 4 + [True] * 6 + [False] * 2


@pytest.mark.parametrize("kind", ["full", "vq", "window"])
def test_a_few_steps_lower_the_loss_and_repeat_exactly(kind, tmp_path):
    context = Context(seeds=(0,), cache=Path(tmp_path))
    loss, curve = linear.language_model_loss(kind, 0, context, steps=4, length=160)
    again, _ = linear.language_model_loss(kind, 0, context, steps=4, length=160)
    assert loss == again and curve[-1] < curve[0]


def test_commitment_is_counted_for_codes_only():
    ids = torch.randint(256, (1, 70))
    vq, full = linear.ByteModel("vq").train(), linear.ByteModel("full").train()
    vq(ids)
    full(ids)
    assert vq.commitment() > 0 and full.commitment() == 0
