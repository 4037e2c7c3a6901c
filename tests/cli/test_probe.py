"""``danlu probe`` as its user meets it: a table, a page, JSON, and one sentence for every kind of bad input."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from danlu.cli.probe import app, parse_layers
from danlu.context.probe.report import AttentionReport
from reference.growth_hosts import build
from reference.tiny import byte_tokenizer, tiny_llama

TEXT = "def read(self):\n    return self.name\n\n" * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def run(*words, **options):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"}, **options)


def test_prints_a_table_and_what_stands_out(model, text):
    result = run(model, "-t", text, "--texts", 3)
    assert result.exit_code == 0, result.output
    for word in ("96 tokens in 3 texts, by layer", "Sharpest: layer", "first 4 tokens", "present scale"):
        assert word in result.stdout
    heads = run(model, "-t", text, "--texts", 1, "--heads", "--layers", "1")
    assert "32 tokens in 1 text, by head" in heads.stdout and "│ 1.3 " in heads.stdout and "│ 0.3 " not in heads.stdout


def test_writes_a_page_a_figure_and_json(model, text, tmp_path):
    for suffix in ("html", "png", "json"):
        out = tmp_path / "made" / f"probe.{suffix}"
        result = run(model, "-t", text, "--length", 16, "--texts", 2, "-o", out)
        assert result.exit_code == 0 and f"Written: {out}" in result.stdout and out.stat().st_size > 100
    report = AttentionReport.load(tmp_path / "made" / "probe.json")
    assert (report.texts, report.tokens, report.text) == (2, 32, "text.txt")


def test_json_from_standard_input_with_a_note(model):
    result = run(
        model, "-t", "-", "--json", "--length", 20, "--sinks", 2, "--local", 5, input="short text, 20 bytes and more"
    )
    data = json.loads(result.stdout)
    assert data["text"] == "standard input" and data["sinks"] == 2 and data["local"] == 5
    assert data["notes"] == ["the text holds 1 pieces of 20 tokens, not 8"] and len(data["heads"]) == 8


def test_an_encoder_and_its_default_text(tmp_path):
    build("bert", max_position_embeddings=32, vocab_size=257).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    result = run(tmp_path, "--texts", 1, "--json")
    data = json.loads(result.stdout)
    assert data["heads"][0]["keys"] == data["tokens"] == 32 and data["text"].startswith("library modules")


def test_layers_are_parsed():
    assert parse_layers("0, 5,8-10,8") == [0, 5, 8, 9, 10]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--layers", "0-x"], "indices and ranges such as 0,5,8-11, got '0-x'"),
        (["--layers", "7"], "layers must be in 0..1, got 7"),
        (["--texts", "0"], "--texts must be at least 1, got 0"),
        (["--length", "1"], "--length must be at least 2, got 1"),
        (["--out", "x.pdf"], "--out must end in .html, .png or .json"),
        (["--sinks", "-1"], "sinks, local and samples must be >= 0"),
    ],
)
def test_bad_input(model, text, tmp_path, monkeypatch, words, part):
    monkeypatch.chdir(tmp_path)
    result = run(model, "-t", text, *words)
    assert isinstance(result.exception, ValueError) and part in str(result.exception)
