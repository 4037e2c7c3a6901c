"""``danlu classify`` as its user meets it: lines in, labels out, and one sentence for every kind of bad input."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from danlu import cli
from danlu.zero_shot import NSPClassifier, SamplesContrast
from reference.nsp_host import bert, texts, tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    bert().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("danlu.cli.classify._BLOCK", 4)


def run(*words, **options):
    return CliRunner().invoke(cli.app, ["classify", *map(str, words)], env={"COLUMNS": "200"}, **options)


def refused(result, *parts):
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("danlu: "), result.stderr
    for part in parts:
        assert part in lines[0]


def written(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_labels_every_line(model, tmp_path):
    sample = texts(10)
    result = run(model, written(tmp_path / "in.txt", sample), "--labels", "w1,w2 w3", "--template", "w9 {}")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    expected = NSPClassifier.from_pretrained(str(model), template="w9 {}")(sample, ["w1", "w2 w3"])
    for line, one in zip(result.stdout.splitlines(), expected, strict=True):
        label, probability, text = line.split("\t")
        assert (label, text) == (one["labels"][0], one["sequence"])
        assert float(probability) == pytest.approx(one["scores"][0], abs=2e-4)


def test_json_words_for_labels_and_every_option(model, tmp_path):
    out = tmp_path / "out.jsonl"
    sample = [{"text": text, "id": i} for i, text in enumerate(texts(6))]
    source = written(tmp_path / "in.jsonl", map(json.dumps, sample))
    words = ("--labels", "good=w1,bad=w2", "--position", "suffix", "--calibrate", "--multi-label", "--json", "-o", out)
    result = run(model, source, *words, "--batch-tokens", 64, "--max-length", 40)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    options = {"position": "suffix", "calibrate": True, "multi_label": True}
    classifier = NSPClassifier.from_pretrained(str(model), max_length=40)
    expected = classifier([entry["text"] for entry in sample], {"good": "w1", "bad": "w2"}, **options)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    for one, other in zip(found, expected, strict=True):
        assert one["labels"] == other["labels"] and one["scores"] == pytest.approx(other["scores"], abs=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_pairs_are_compared_with_each_other(model):
    first, second = texts(9), texts(9, seed=1)
    lines = "".join(f"{a}\t{b}\n" for a, b in zip(first, second, strict=True))
    result = run(model, "-", "--pairs", "--labels", "different,same", "--shares", "0.7,0.3", input=lines)
    assert result.exit_code == 0, result.stderr
    scores = NSPClassifier.from_pretrained(str(model)).score_pairs(first, second)
    labels = [["different", "same"][i] for i in SamplesContrast([0.7, 0.3]).segment(scores)]
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert [row[0] for row in rows] == labels and labels.count("different") == 6
    assert [row[2:] for row in rows] == [[a, b] for a, b in zip(first, second, strict=True)]
    assert [float(row[1]) for row in rows] == pytest.approx(scores.tolist(), abs=1e-3)


def test_pairs_in_json_and_equal_shares(model, tmp_path):
    entries = [{"first": a, "second": b} for a, b in zip(texts(6), texts(6, seed=1), strict=True)]
    source = written(tmp_path / "in.jsonl", map(json.dumps, entries))
    result = run(model, source, "--pairs", "--labels", "0,1,2", "--json")
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [{"first": one["first"], "second": one["second"]} for one in found] == entries
    ordered = sorted(found, key=lambda one: one["score"])
    assert [one["label"] for one in ordered] == ["0", "0", "1", "1", "2", "2"]


def test_the_self_test_is_told_on_standard_error(model):
    result = run(model, "-", "--labels", "w1,w2", "--self-test", input="w3\n")
    assert result.exit_code == 0
    assert "knows neither English nor Chinese" in result.stderr
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "text", "parts"),
    [
        (("--labels", "a"), "w1\n", ("labels must be at least 2",)),
        (("--labels", "w1,w1"), "w1\n", ("--labels must differ",)),
        (("--labels", "w1,"), "w1\n", ("must not be empty",)),
        (("--labels", "w1,w2", "--template", "none"), "w1\n", ("template must hold {}", "news-en")),
        (("--labels", "w1,w2", "--position", "left"), "w1\n", ("position must be prefix or suffix",)),
        (("--labels", "w1,w2"), "w1\n\nw2\n", ("line 2 of standard input has an empty text",)),
        (("--labels", "w1,w2"), "", ("standard input is empty",)),
        (("--labels", "w1,w2", "--pairs"), "w1 w2\n", ("line 1", "two sentences with a tab", "got 0 tabs")),
        (("--labels", "w1,w2", "--pairs"), "w1\tw2\n", ("a pair for each of 2 labels",)),
        (("--labels", "w1,w2", "--pairs", "--calibrate"), "w1\tw2\n", ("leave out",)),
        (("--labels", "w1,w2", "--shares", "0.5,0.5"), "w1\n", ("add --pairs",)),
        (("--labels", "w1,w2", "--pairs", "--shares", "a,b"), "w1\tw2\n", ("--shares must be numbers",)),
        (("--labels", "w1,w2", "--pairs", "--shares", "1"), "w1\tw2\n", ("one for each of 2 labels",)),
        (("--labels", "w1,w2", "--pairs", "--shares", "0.5,0.6"), "w1\tw2\n", ("sum to 1",)),
        (("--labels", "w1,w2", "--dtype", "int8"), "w1\n", ("--dtype must be",)),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(model, tmp_path, words, text, parts):
    out = tmp_path / "out.txt"
    refused(run(model, "-", *words, "--out", out, input=text), *parts)
    assert not list(tmp_path.iterdir())


def test_bad_files_and_models(model, tmp_path):
    refused(run(model, tmp_path / "none.txt", "--labels", "w1,w2"), "none.txt")
    (tmp_path / "bad.txt").write_bytes(b"w1\n\xff\n")
    refused(run(model, tmp_path / "bad.txt", "--labels", "w1,w2"), "line 2", "not UTF-8")
    for line, part in (("{", "is not JSON"), ('{"texts": 1}', "a string 'text'"), ("[]", "must be an object")):
        refused(run(model, written(tmp_path / "in.jsonl", [line]), "--labels", "w1,w2"), "line 1", part)
    refused(run(tmp_path / "none", "-", "--labels", "w1,w2", input="w1\n"), "does not exist")
    bert("BertForMaskedLM").save_pretrained(tmp_path / "masked")
    tokenizer().save_pretrained(tmp_path / "masked")
    refused(run(tmp_path / "masked", "-", "--labels", "w1,w2", input="w1\n"), "has no trained", "seq_relationship")
