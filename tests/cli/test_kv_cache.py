"""``danlu kv-cache`` as its user meets it."""

from __future__ import annotations

import json

import pytest
import transformers
from typer.testing import CliRunner

from danlu.cli import COMMANDS, app


@pytest.fixture(autouse=True)
def command(monkeypatch):
    monkeypatch.setitem(COMMANDS, "kv-cache", "danlu.cli.kv_cache:app")


def run(*words):
    return CliRunner().invoke(app, ["kv-cache", *map(str, words)], env={"COLUMNS": "200"})


def refused(result, *parts):
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("danlu: "), result.stderr
    for part in parts:
        assert part in lines[0]


def test_prints_a_table_of_the_bundled_model():
    result = run("danlu-nano", "--lengths", "1x,4096")
    assert result.exit_code == 0 and result.stderr == ""
    for word in ("5 layers, bfloat16, batch 1", "256", "4,096", "2,560", "10.0 MiB", "latent, exact", "100.0%"):
        assert word in result.stdout


def test_reads_a_folder_or_a_file_and_no_weights(tmp_path):
    transformers.LlamaConfig(num_key_value_heads=8, dtype="bfloat16").save_pretrained(tmp_path)
    words = ("--batch", 2, "--kv-rank", 512, "--kv-rank", 256, "--rope-dim", 32, "--dtype", "float32", "--json")
    results = [json.loads(run(place, *words).stdout) for place in (tmp_path, tmp_path / "config.json")]
    assert results[0] == results[1]
    names = [row["name"] for row in results[0]["rows"]]
    assert "latent 512 + 32" in names and "latent 256 + 32" in names
    assert results[0]["rows"][0]["totals"][0] == 2 * 4 * 32 * 2048 * 4096
    assert results[0]["lengths"] == [4096, 32768, 131072]


def test_says_in_one_sentence_what_is_wrong(tmp_path):
    refused(run(tmp_path), "config.json")
    refused(run(tmp_path / "none"), "does not exist")
    refused(run("danlu-nano", "--lengths", "many"), "--lengths", "many")
    refused(run("danlu-nano", "--batch", 0), "batch")
    refused(run("danlu-nano", "--dtype", "float99"), "dtype must be one of")
    (tmp_path / "config.json").write_text("{}")
    refused(run(tmp_path), "cannot read a configuration")
    transformers.T5Config().save_pretrained(tmp_path)
    refused(run(tmp_path), "decoder-only")
