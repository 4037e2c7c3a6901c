"""The parts of the claims on the earth-mover loss, at sizes that take no time."""

import pytest
import torch

from danlu.lab import emo
from danlu.lab.claim import Context
from danlu.lab.training import Schedule, train
from reference.tiny import byte_tokenizer, tiny_llama


def test_toy_distributions_are_two_clusters_and_noise():
    embedding, truth, labels = emo._toy(3)
    assert embedding.shape == (72, 16) and truth.shape == (40, 72) and labels.shape == (240,)
    assert torch.allclose(embedding.norm(dim=1), torch.ones(72))
    assert torch.allclose(truth.sum(1), torch.ones(40), atol=1e-6)
    by_cluster = truth.view(40, 12, 6).sum(2).sort(1).values
    background = 0.1 / 12
    assert torch.allclose(by_cluster[:, -1], torch.tensor(0.63 + background), atol=1e-6)
    assert torch.allclose(by_cluster[:, -2], torch.tensor(0.27 + background), atol=1e-6)
    assert torch.allclose(by_cluster[:, :-2], torch.tensor(background), atol=1e-6)
    near = embedding @ embedding.T
    same = torch.arange(72)[:, None] // 6 == torch.arange(72) // 6
    assert near[same].mean() > 0.8 > 0.1 > near[~same].mean()


def test_toy_curves_start_alike_repeat_and_fall():
    curves = {name: emo.toy_curves(0, options, 30) for name, options in emo.LOSSES.items()}
    again = emo.toy_curves(0, emo.LOSSES["mode 1"], 30)
    assert curves["mode 1"] == again
    assert len({tuple(curve["cost"][:1] + curve["kl"][:1]) for curve in curves.values()}) == 1
    assert all(len(curve["cost"]) == 31 and curve["cost"][-1] < curve["cost"][0] for curve in curves.values())
    assert curves["EMO alone"]["cost"][-1] < curves["cross entropy"]["cost"][-1]


def test_the_true_cost_is_that_of_all_pairs():
    embedding, truth, _ = emo._toy(0)
    first = emo.toy_curves(0, emo.LOSSES["cross entropy"], 0)
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(0.1 * torch.randn(40, 16, generator=generator) @ embedding.T, 1)
    total = sum(
        float(truth[c, i] * p[c, j] * (1 - embedding[i] @ embedding[j]))
        for c in range(2)
        for i in range(72)
        for j in range(72)
    )
    parts = (truth[:2] * (p[:2] @ (1 - embedding @ embedding.T))).sum()
    assert total == pytest.approx(float(parts), rel=1e-4)
    assert first["cost"][0] == pytest.approx(float((truth * (p @ (1 - embedding @ embedding.T))).sum(1).mean()))
    assert first["tv"][0] == pytest.approx(float((truth - p).abs().sum() / 80))


def test_claim_on_the_toy_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(emo, "_STEPS", 20)
    evidence = emo.emo.experiment(Context((0, 1), tmp_path))
    assert len(evidence.checks) == 4 and len(evidence.tables[0].rows) == 5


def test_samples_repeat_and_follow_the_model():
    model = tiny_llama()
    prompts = torch.randint(0, 256, (3, 8))
    drawn = emo.sample(model, prompts, 5, 0)
    assert drawn.shape == (3, 5)
    assert torch.equal(drawn, emo.sample(model, prompts, 5, 0))
    assert not torch.equal(drawn, emo.sample(model, prompts, 5, 1))
    # The second token's law is that of the whole text so far, cache or not.
    generator = torch.Generator().manual_seed(0)
    ids = prompts
    for _ in range(5):
        p = model(ids).logits[:, -1].softmax(1)
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], 1)
    assert torch.equal(ids[:, 8:], drawn)


def test_grams_are_counted_within_rows():
    known = emo.grams(torch.tensor([[1, 2, 3, 4, 5]]))
    assert known == {(1, 2, 3, 4), (2, 3, 4, 5)}
    rows = torch.tensor([[1, 2, 3, 4, 5], [9, 1, 2, 3, 4]])
    assert emo._found(rows, known) == {"seen": 0.75, "distinct": 0.75}


def test_claim_on_fine_tuning_runs(monkeypatch, tmp_path):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    text = "the cat sat on the mat and the dog sat on the log. " * 40
    monkeypatch.setattr("danlu.hosts.loading.load_causal_lm", lambda *args, **kwargs: (model, tokenizer))
    corpus = type("Corpus", (), {"train": (text,), "test": (text[:900],)})
    monkeypatch.setattr("danlu.lab.corpora.english", lambda *args: corpus)
    for name, value in {"_ROW": 24, "_PROMPT": 8, "_NEW": 8, "_TEST_ROWS": 4}.items():
        monkeypatch.setattr(emo, name, value)
    monkeypatch.setattr(emo, "_SCHEDULE", Schedule(steps=3, batch=2, warmup=1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evidence = emo.emo_fine_tuning.experiment(Context((0,), tmp_path))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    rows = {row[0]: row[1:] for row in evidence.tables[0].rows}
    assert list(rows) == ["before", "cross entropy", "mode 1", "mode 2", "real text"]
    assert rows["real text"][3] == 1.0 and rows["cross entropy"][0] < rows["before"][0]
    assert len(evidence.checks) == 4


def test_training_takes_another_loss(tmp_path):
    def fit(**options):
        model = tiny_llama()
        ids = torch.arange(12).view(1, 12)
        made = train(model, lambda _: {"input_ids": ids, "targets": ids}, Schedule(steps=3, batch=1), 0,
                     Context((0,), tmp_path), **options)  # fmt: skip
        return made

    assert fit(loss_function=lambda logits, targets: 2 * torch.nn.functional.cross_entropy(logits, targets)) == (
        pytest.approx([2 * loss for loss in fit()], rel=1e-2)
    )
