"""The parts that experiments are made of, at sizes that take no time."""

import pytest
import torch

from danlu.lab import robustness, scale, toy, training
from danlu.lab.claim import Context
from danlu.lab.training import Schedule


def test_lookup_learns_at_the_optimal_scale_and_repeats(monkeypatch):
    monkeypatch.setattr(scale, "_OPTIMISERS", {"Adam": (lambda tables: torch.optim.Adam(tables, lr=1e-2), 60)})
    monkeypatch.setattr(scale, "_IDENTITIES", 32)
    monkeypatch.setattr(scale, "_KEYS", 8)
    good = scale.lookup_accuracy(10.0, "Adam", 0)
    assert good == scale.lookup_accuracy(10.0, "Adam", 0)
    assert good > scale.lookup_accuracy(0.1, "Adam", 0) + 0.2


@pytest.mark.parametrize("kind", ["plain", "equal_mean", "subset"])
def test_masked_models_train_and_read_longer_texts(kind, monkeypatch, tmp_path):
    monkeypatch.setattr(training, "_MEMORY", {})
    monkeypatch.setattr(robustness, "_SCHEDULE", Schedule(steps=2, batch=2))
    text = torch.arange(4000).remainder(251).to(torch.uint8)
    model = robustness._masked_model(kind, text, 0, Context((0,), tmp_path))
    accuracy = robustness.masked_accuracy(model, text, torch.arange(128), count=512)
    assert 0 <= accuracy <= 1
    batch = robustness._masked_batches(kind, text, 0)(torch.Generator().manual_seed(0))
    hidden = batch["targets"] != -100
    assert (batch["input_ids"][hidden] == 256).all() and (batch["targets"][hidden] < 256).all()
    assert ("position_ids" in batch) == (kind != "plain")


def test_sharpening_multiplies_every_logit_and_is_undone():
    from transformers import EuroBertConfig, EuroBertForMaskedLM

    model = EuroBertForMaskedLM(
        EuroBertConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                       pad_token_id=0, mask_token_id=1, bos_token_id=0, eos_token_id=0)
    ).eval()  # fmt: skip
    ids = torch.randint(16, (1, 12))
    before = model(input_ids=ids).logits
    with robustness._sharpened(model, 3.0):
        changed = model(input_ids=ids).logits
    # The same logits from queries that are three times as large.
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(3)
    assert torch.allclose(model(input_ids=ids).logits, changed, atol=1e-6)
    assert not torch.allclose(before, changed, atol=1e-4)
    assert {layer.self_attn.scaling for layer in model.model.layers} == {8**-0.5}


def test_key_norm_hwfa_and_inverse_models_train(monkeypatch, tmp_path):
    from danlu.context.methods import KeyNorm, LeakyReRoPE, LogN

    monkeypatch.setattr(training, "_MEMORY", {})
    short = Schedule(steps=2, batch=2)
    scaled = LogN(toy.TRAINED_LENGTH, clip=False)
    runs = {
        "normed": (toy.Toy(schedule=short, methods=(KeyNorm(),)), (KeyNorm(),)),
        "hybrid": (toy.Toy(schedule=short, build=("hwfa", robustness.hwfa_model), methods=(scaled,)), (scaled,)),
        "inverse": (toy.Toy(schedule=short, methods=(LeakyReRoPE(window=8, stride=1 / 16), scaled)), (scaled,)),
    }
    monkeypatch.setattr(toy, "TEST_LENGTH", 64)
    mean = toy.mean_scores(Context((0, 1), tmp_path), runs)
    assert set(mean) == set(runs)
    assert len(toy.score_table(mean).rows) == 3
    assert len(toy.score_plot(mean, "t").lines["hybrid"]) == 3


def test_hwfa_toy_is_a_window_below_a_full_layer_without_positions():
    model = robustness.hwfa_model(10000.0).eval()
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    assert [layer.self_attn.use_rope for layer in model.model.layers] == [True, False]
