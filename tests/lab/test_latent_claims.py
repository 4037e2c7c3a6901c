"""The parts of the claims on latent attention, at sizes that take no time."""

from __future__ import annotations

import copy

import pytest
import torch

from danlu.attention.latent.absorb import absorb
from danlu.lab import latent
from danlu.lab.claim import Context
from danlu.lab.runner import _CLAIMS

TINY = dict(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)


def tiny():
    return latent.small_model(heads=2, layers=2, hidden=16, **TINY)


def absorbed(model):
    try:
        return absorb(copy.deepcopy(model))
    except ValueError as error:
        pytest.skip(str(error))


def test_a_step_leaves_the_cache_as_it_was():
    model = absorbed(tiny())
    with torch.no_grad():
        cache = latent.filled_cache(model, 10)
    first = latent.step(model, cache)
    assert cache.get_seq_length() == 10 and torch.equal(latent.step(model, cache), first)
    assert first.shape == (1, 1, 4096)


def test_the_layer_alone_gives_the_same_in_both_forms():
    stock = tiny()
    ours, state = absorbed(stock), torch.random.get_rng_state()
    with torch.no_grad():
        outs = [latent.attention_step(model, latent.filled_cache(model, 30))() for model in (stock, ours)]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)
    assert latent.small_model(heads=2, layers=1, hidden=16) and torch.equal(torch.random.get_rng_state(), state)


def test_timing_runs_both_in_turn_and_drops_the_first():
    calls = []
    a, b, ratio = latent.interleaved(lambda: calls.append("a"), lambda: calls.append("b"), 3)
    assert calls == ["a", "b"] * 4 and a > 0 and b > 0 and ratio > 0


def test_sizes_are_counted_on_tensors():
    grouped = latent.Geometry("grouped", 2, 4, 2, 2 * 2 * 128, 0)
    assert latent.cached_bytes(grouped, "dynamic") == latent.cached_bytes(grouped, "static") == 2 * 512
    with pytest.raises(ValueError, match="kind must be"):
        latent.cached_bytes(grouped, "paged")


def test_published_sizes_are_two_bytes_per_number():
    for geometry in latent.GEOMETRIES:
        assert geometry.bytes_per_token == 2 * geometry.elements * geometry.layers
        if geometry.groups is not None:
            assert geometry.elements == geometry.groups * 256


@pytest.mark.slow
def test_the_claim_on_sizes_holds(tmp_path):
    absorbed(tiny())
    assert _CLAIMS["kv-cache-sizes"].experiment(Context((0,), tmp_path)).verdict == "holds"
