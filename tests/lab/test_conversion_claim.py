"""The parts of the conversion claim, at sizes that take no time."""

from __future__ import annotations

import pytest
import torch

from danlu.lab import conversion
from danlu.lab.claim import Context
from danlu.lab.runner import _CLAIMS
from danlu.lab.training import seeded


@pytest.fixture
def model():
    with seeded(0):
        return conversion.Characters().eval()


def test_the_byte_model_is_causal_and_has_places(model):
    ids = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids).logits
    changed = ids.clone()
    changed[:, 7] += 1
    assert torch.allclose(model(input_ids=changed.remainder(256)).logits[:, :7], logits[:, :7], atol=1e-5)
    same = model(input_ids=torch.full((1, 5), 65)).logits[0]
    assert (same[0] - same[4]).abs().max() > 1e-3


def test_moments_are_those_of_the_inputs_of_keys(model):
    ids = torch.randint(256, (3, 12), generator=torch.Generator().manual_seed(0))
    found = conversion.attention_moments(model, ids)
    x = model.layers[0].attention_norm(model.words(ids) + model.places.weight[:12]).flatten(0, 1).double()
    assert len(found) == 2 and torch.allclose(found[0], x.T @ x / 36, atol=1e-6)


def test_compression_shares_one_latent_and_is_exact_at_full_size(model):
    ids = torch.randint(256, (3, 12), generator=torch.Generator().manual_seed(0))
    moments = conversion.attention_moments(model, ids)
    state = torch.get_rng_state()
    small = conversion.compressed(model, moments, 16, balance=True)
    assert torch.equal(torch.get_rng_state(), state)
    layer = small.layers[1]
    assert layer.key[0] is layer.value[0] and layer.key[0].weight.shape == (16, conversion.HIDDEN)
    assert model.layers[1].key.weight.shape == (64, 128)
    full = conversion.compressed(model, moments, conversion.FULL, balance=True)
    exact = model(input_ids=ids).logits
    assert (full(input_ids=ids).logits - exact).abs().max() < 1e-4
    assert (small(input_ids=ids).logits - exact).abs().max() > 1e-3


def test_the_whole_claim_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(conversion, "STEPS", 8)
    monkeypatch.setattr(conversion, "HEALING_STEPS", 2)
    monkeypatch.setattr(conversion, "NANO", ((96, 32),))
    text = torch.randint(97, 110, (20000,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    monkeypatch.setattr(conversion, "texts", lambda: (text, text[:6000]))
    few = conversion.held_out(text, 16)
    monkeypatch.setattr(conversion, "held_out", lambda *_: few)
    evidence = _CLAIMS["latent-conversion"].experiment(Context((0,), tmp_path))
    assert evidence.checks[0].met, evidence.checks[0]
    assert [row[0] for row in evidence.tables[0].rows] == list(conversion.RANKS)
    name, share, pca, working, svd = evidence.tables[1].rows[0]
    assert name == "96 + 32" and share == 0.5 and pca < svd and pca < working
    assert set(evidence.plots[0].lines) == {"weights", "activations", "balanced activations"}
