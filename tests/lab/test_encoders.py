"""The parts of the experiments on encoders at small sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from danlu.lab import encoders, topics
from danlu.lab.claim import DOES_NOT_HOLD, HOLDS, HOLDS_IN_PART, Context

CONTEXT = Context(seeds=(0,), cache=Path("unused"))
TEXT = torch.frombuffer(bytearray(b"def f(x):\n    return x + 1\n" * 40), dtype=torch.uint8)


def test_pairs_are_rows_as_the_tokenizer_writes_them():
    drawn = topics.pairs(torch.Generator().manual_seed(0), 40)
    first, second = topics.pair_texts(drawn)
    wanted = topics.word_tokenizer()(first, second, padding="max_length", max_length=17, return_tensors="pt")
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert torch.equal(drawn[name], wanted[name]), name


def test_pairs_share_a_topic_where_the_target_is_zero():
    drawn = topics.pairs(torch.Generator().manual_seed(0), 400)
    found = []
    for a, b in zip(*topics.pair_texts(drawn), strict=True):
        named = [{word[1] for word in side.split() if word[0] == "t"} for side in (a, b)]
        assert all(len(one) <= 1 for one in named) and all(4 <= len(side.split()) <= 7 for side in (a, b))
        found.append(named[0] == named[1])
    same = torch.tensor(found).float()
    assert same[drawn["targets"] == 0].mean() > 0.95
    assert same[drawn["targets"] == 1].mean() < 0.35


def test_sentences_and_labels_speak_the_same_words():
    sentences, wanted = topics.sentences_to_classify(0)
    assert len(sentences) == len(wanted) == 300 and wanted.bincount().tolist() == [50] * 6
    assert sentences == topics.sentences_to_classify(0)[0] != topics.sentences_to_classify(1)[0]
    named = topics.labels(2)
    assert named["3"] == "t3w0 t3w1"
    ids = topics.word_tokenizer()([*sentences, *named.values()])["input_ids"]
    assert not any(1 in row for row in ids)
    own = [sum(f"t{topic}w" in word for word in text.split()) for text, topic in zip(sentences, wanted, strict=True)]
    assert sum(own) / sum(len(text.split()) for text in sentences) == pytest.approx(0.7, abs=0.03)
    assert encoders.share_right(torch.eye(6)[wanted], wanted) == 1.0


def test_the_untrained_model_is_given_by_its_seed():
    one, other = topics.small_bert(0), topics.small_bert(0)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert one.bert.encoder.layer[0].intermediate.dense.weight.std().item() == pytest.approx(0.1, rel=0.05)


def test_the_verdict_on_topics_follows_the_numbers():
    sides = [(name, side) for name in ("trained", "index swapped") for side in ("prefix", "suffix")]
    sides.append(("random heads, mean", "prefix"))
    accuracy = {(*key, words): 1.0 if key[0] == "trained" else 0.0 for key in sides for words in (1, 2, 4)}
    found = encoders.topics_evidence(accuracy, 0.9, [0.7] * 100)
    assert found.verdict == HOLDS and found.plots[1].x == (50.0, 100.0)
    assert found.plots[0].lines["trained, suffix"] == (1.0, 1.0, 1.0)
    accuracy["trained", "suffix", 2] = 0.9
    found = encoders.topics_evidence(accuracy, 0.9, [0.7] * 100)
    assert found.verdict == HOLDS_IN_PART
    assert [check.measured for check in found.checks if not check.met] == ["0.90"]


def test_masked_windows_hide_what_they_ask_for():
    drawn = encoders.masked(TEXT, torch.Generator().manual_seed(0))
    ids, targets = drawn["input_ids"], drawn["targets"]
    assert ids.shape == targets.shape == (16, 64)
    assert torch.equal(ids == 256, targets != -100)
    assert 0.1 < (ids == 256).float().mean() < 0.2
    assert targets.max() < 256


def test_trainings_of_a_seed_differ_only_in_what_is_warmed_up():
    runs = {
        name: encoders.masked_training(TEXT, 0, CONTEXT, 6, layers=2, **options)
        for name, options in {"none": {}, "again": {}, "factor": {"alpha": True}, "rate": {"rate": True}}.items()
    }
    assert runs["none"] == runs["again"] and len(runs["none"]) == 6
    assert runs["rate"][0] == runs["none"][0] != runs["factor"][0]
    assert runs["rate"][1] != runs["none"][1]


def test_the_verdict_on_warm_up_follows_the_numbers():
    losses = {(name, seed): [4.0] * 10 + [end] * 50 for seed in (0, 1) for name, end in
              {"factor 1": 3.2, "factor warm-up": 2.0 + seed, "rate warm-up": 2.5}.items()}  # fmt: skip
    found = encoders.warmup_evidence(losses, 3.1)
    assert found.verdict == HOLDS_IN_PART
    assert [check.met for check in found.checks] == [True, False]
    assert found.tables[0].rows[1] == (1, pytest.approx(3.2), pytest.approx(3.0), pytest.approx(2.5))
    assert "2.50 (factor warm-up)" in found.summary and found.plots[0].x == (20.0, 40.0, 60.0)
    assert encoders.warmup_evidence({key: [3.0] * 60 for key in losses}, 3.1).verdict == DOES_NOT_HOLD


def test_entropy_of_bytes():
    assert float(encoders.unigram(torch.tensor([0, 0, 1, 1], dtype=torch.uint8))) == pytest.approx(0.6931, abs=1e-4)
