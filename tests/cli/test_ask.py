"""``danlu ask`` as its user meets it: a streamed answer with marks, JSON, and a sentence for each kind of bad input."""

from __future__ import annotations

import json
import re
import sys
import types

import pytest
from typer.testing import CliRunner

import danlu.cli
from danlu.cli import app
from danlu.cli.ask import Marked
from danlu.context.naive_bayes.contexts import NaiveBayesContexts
from danlu.context.naive_bayes.result import TokenTrace
from reference.tiny import byte_tokenizer, tiny_llama

LONG = "\n\n".join(f"Paragraph {i} says little." for i in range(6))


@pytest.fixture(scope="module", autouse=True)
def known():
    patch = pytest.MonkeyPatch()
    patch.setitem(danlu.cli.COMMANDS, "ask", "danlu.cli.ask:app")
    yield
    patch.undo()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(max_position_embeddings=64).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.md").write_text("Alpha is first.")
    (tmp_path / "b.html").write_text("<p>Beta &amp; more</p><script>no</script>")
    (tmp_path / "long.txt").write_text(LONG)
    return [tmp_path / name for name in ("a.md", "b.html", "long.txt")]


def run(*words, **options):
    plain = ("--template", "{context} {question}")
    return CliRunner().invoke(app, ["ask", *map(str, words), *plain], env={"COLUMNS": "200"}, **options)


def refused(result, *parts):
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("danlu: "), result.stderr
    for part in parts:
        assert part in lines[0]


def test_streams_an_answer_with_marks_and_json_agrees(model, files):
    words = (model, *files, "-q", "Which?", "--max-new-tokens", 12)
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    marks = re.findall(r" \[([^\[\]]*):(\d+)-(\d+)\]", result.stdout)
    document = json.loads(run(*words, "--json").stdout)
    assert len(marks) == len(document["sentences"]) >= 1
    for (name, start, end), sentence in zip(marks, document["sentences"], strict=True):
        assert (name, int(start), int(end)) == (sentence["file"], sentence["start"], sentence["end"])
        assert sentence["text"] in document["answer"]
    names = [part["file"] for part in document["parts"]]
    assert names[:2] == [str(files[0]), str(files[1])] and names.count(str(files[2])) > 2
    for part in document["parts"][2:]:
        assert LONG[part["start"] : part["end"]].startswith("Paragraph")
        assert part["end"] - part["start"] <= 64 - 12 - len(" Which?")
    assert document["question"] == "Which?" and document["dropped"] == [] and document["refused"] is False
    assert len(document["tokens"]) == 12

    reader = NaiveBayesContexts(
        tiny_llama(max_position_embeddings=64), byte_tokenizer(), template="{context} {question}"
    )
    texts = ["Alpha is first.", "Beta & more", LONG]
    library = reader.generate(texts, "Which?", split=True, max_new_tokens=12)
    assert document["answer"] == library.text
    assert [entry["part"] for entry in document["tokens"]] == [entry.source for entry in library.trace]


def test_parts_that_are_left_out_are_told(model, files):
    words = (model, *files, "-q", "Which?", "--max-new-tokens", 4, "--keep", 2)
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    notes = [line for line in result.stderr.splitlines() if line]
    assert notes and all(
        re.match(r"Note: left out .*:\d+-\d+: rank \d+ of \d+: question gains", line) for line in notes
    )
    document = json.loads(run(*words, "--json").stdout)
    assert len(document["dropped"]) == len(notes) == len(document["parts"]) - 2


def test_options_reach_the_library(model, files, monkeypatch):
    seen = {}

    class Spy(NaiveBayesContexts):
        def __init__(self, *args, **options):
            seen.update(options)
            super().__init__(*args, **options)

    monkeypatch.setattr("danlu.context.naive_bayes.contexts.NaiveBayesContexts", Spy)
    words = ("--beta", 1, "--eta", 0.5, "--nucleus", 0.8, "--pooling", "mean", "--prefix", "Say", "--refusal", "No")
    result = run(model, files[0], "-q", "?", "--sample", "--seed", 2, "--temperature", 2, "--max-new-tokens", 3,
                 "--context", 40, *words)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    selection = seen.pop("selection")
    assert selection.refusals == ("No",) and selection.keep is None
    assert seen == {"beta": 1.0, "eta": 0.5, "top_p": 0.8, "pooling": "mean", "prefix": "Say", "max_length": 40,
                    "template": "{context} {question}"}  # fmt: skip


def test_sampling_follows_the_seed(model, files):
    words = (model, files[0], "-q", "?", "--sample", "--temperature", 3, "--max-new-tokens", 12)
    first, again, other = (run(*words, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other


def test_an_extended_model_reads_larger_parts(model, files):
    result = run(
        model, files[2], "-q", "?", "--max-new-tokens", 3, "--methods", "rerope+logn", "--context", 400, "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["parts"]) == 1


def test_standard_input_and_pdf_pages(model, tmp_path, monkeypatch):
    pages = [types.SimpleNamespace(extract_text=lambda text=text: text) for text in ("One.", "Two " * 20)]
    monkeypatch.setitem(
        sys.modules, "pypdf", types.SimpleNamespace(PdfReader=lambda _: types.SimpleNamespace(pages=pages))
    )
    pdf = tmp_path / "x.pdf"
    pdf.write_bytes(b"%PDF-1.7")
    result = run(model, "-", pdf, "-q", "?", "--max-new-tokens", 3, "--json", input="typed")
    assert result.exit_code == 0, result.stderr
    parts = json.loads(result.stdout)["parts"]
    assert parts[0]["file"] == "standard input" and "page" not in parts[0]
    assert [part["page"] for part in parts[1:]][0] == 1 and parts[-1]["page"] == 2


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("-q", " "), ("--question is empty",)),
        (("-q", "?", "--beta", "-2"), ("beta must be a number >= -1", "-2")),
        (("-q", "?", "--eta", "-1"), ("eta must be",)),
        (("-q", "?", "--nucleus", "0"), ("top_p must be",)),
        (("-q", "?", "--pooling", "best"), ("min_entropy, mean, max",)),
        (("-q", "?", "--keep", "0"), ("keep must be >= 1",)),
        (("-q", "?", "--methods", "rerope"), ("--context",)),
        (("-q", "?", "--sample", "--temperature", "0"), ("--temperature must be above 0",)),
        (("-q", "?", "--max-new-tokens", "0"), ("max_new_tokens must be >= 1",)),
        (("-q", "?", "--context", "3"), ("leave no context any of the 3",)),
        (("-q", "?", "--dtype", "int8"), ("--dtype must be",)),
    ],
)
def test_bad_options_are_one_sentence(model, files, words, parts):
    refused(run(model, files[0], *words), *parts)


def test_bad_files_and_models(model, files, tmp_path, monkeypatch):
    refused(run(model, tmp_path / "none.txt", "-q", "?"), "none.txt", "No such file")
    refused(run(model, files[0], files[0], "-q", "?"), "named twice")
    refused(run(tmp_path / "none", files[0], "-q", "?"), "MODEL", "does not exist")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    refused(run(model, tmp_path / "bad.txt", "-q", "?"), "not UTF-8")
    (tmp_path / "x.pdf").write_bytes(b"%PDF-1.7")
    monkeypatch.setitem(sys.modules, "pypdf", None)
    refused(run(model, tmp_path / "x.pdf", "-q", "?"), "pip install 'danlu[pdf]'")


def marked(pieces: list[tuple[str, int]]) -> tuple[str, list[tuple[str, int]]]:
    """What is written for tokens with their sources."""
    written: list[str] = []
    texts = [piece for piece, _ in pieces]
    got = Marked(lambda ids: "".join(texts[i] for i in ids), written.append, ["A", "B"])
    for i, (_, source) in enumerate(pieces):
        got.add(TokenTrace(i, source, (), 1.0, 1.0))
    got.close()
    return "".join(written), got.sentences


def test_marks_stand_behind_sentences_and_name_most_of_it():
    assert marked([("One is 1.5", 0), (" here. Two", 1), (" came from b!", 1), (' "Q?" End', 0)])[0] == (
        'One is 1.5 here. [A] Two came from b! [B] "Q?" [A] End [A]'
    )
    assert marked([("line\n\nnext", 1)]) == ("line [B]\n\nnext [B]", [("line", 1), ("next", 1)])
    assert marked([]) == ("", [])
    assert marked([(" \n", 0)])[1] == []


def test_half_characters_wait():
    written = []
    texts = ["\ufffd", "é!"]
    got = Marked(lambda ids: texts[len(ids) - 1], written.append, ["A"])
    got.add(TokenTrace(0, 0, (), 1.0, 1.0))
    assert written == []
    got.add(TokenTrace(1, 0, (), 1.0, 1.0))
    assert "".join(written) == "é!"
