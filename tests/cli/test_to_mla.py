"""``danlu to-mla`` as its user meets it: a checkpoint, a report, and one sentence for every kind of bad input."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from danlu.cli import COMMANDS, app
from reference.tiny import byte_tokenizer, tiny_llama

TEXT = "The quick brown fox jumps over the lazy dog, and then it does so again and again. " * 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def command(monkeypatch):
    monkeypatch.setitem(COMMANDS, "to-mla", "danlu.cli.to_mla:app")


def run(*words, **options):
    return CliRunner().invoke(app, ["to-mla", *map(str, words)], env={"COLUMNS": "200"}, **options)


def refused(result, *parts):
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("danlu: "), result.stderr
    for part in parts:
        assert part in lines[0]


def test_writes_a_checkpoint_that_the_host_loads(model, tmp_path):
    out = tmp_path / "latent"
    result = run(model, "--kv-rank", 12, "--rope-dim", 8, "-t", "-", "-o", out, input=TEXT)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    for word in ("output error", "32 -> 12 + 8", "62.5%", "loss", str(out)):
        assert word in result.stdout
    assert list(tmp_path.iterdir()) == [out]
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.model_type == "deepseek_v3" and loaded.config.kv_lora_rank == 12
    assert AutoTokenizer.from_pretrained(out)("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]


def test_exact_needs_no_text_and_keeps_the_logits(model, tmp_path):
    result = run(model, "--method", "exact", "--json", "-o", tmp_path / "out")
    data = json.loads(result.stdout)
    assert data["method"] == "exact" and data["elements_after"] == data["elements_before"] == 32
    ids = torch.arange(30)[None]
    before, after = tiny_llama()(ids).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    assert (before - after).abs().max() < 1e-5 * before.abs().max()


def test_says_in_one_sentence_what_is_wrong(model, tmp_path):
    out = tmp_path / "out"
    refused(run(model, "--kv-rank", 8, "-o", out), "--text")
    refused(run(model, "-t", "-", "-o", out, input=TEXT), "kv_rank must be given")
    refused(run(model, "--kv-rank", 8, "--rope-dim", 3, "-t", "-", "-o", out, input=TEXT), "rope_dim")
    refused(run(model, "--kv-rank", 20, "-t", "-", "--tokens", 10, "-o", out, input=TEXT), "at least kv_rank = 20")
    refused(run(model, "--kv-rank", 8, "-t", "-", "--freq-fold", "many", "-o", out, input=TEXT), "freq_fold")
    refused(run(model, "--kv-rank", 8, "-t", "-", "--length", 1, "-o", out, input=TEXT), "--length")
    refused(run(model, "--kv-rank", 8, "-t", "-", "-o", out, input="x"), "2 tokens")
    assert not out.exists()
    out.mkdir()
    refused(run(model, "--method", "exact", "-o", out), "exists")
