"""``danlu grow`` as its user meets it: a checkpoint, a table, and one sentence for every kind of bad input."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import danlu.tuning.growth.grow
from danlu.cli import app
from danlu.tuning.growth.grow import GrowthCheck
from reference.growth_hosts import BERT, LLAMA, build, make
from reference.tiny import byte_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def run(*words, **options):
    return CliRunner().invoke(app, ["grow", *map(str, words)], env={"COLUMNS": "200"}, **options)


def refused(result, *parts):
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("danlu: "), result.stderr
    for part in parts:
        assert part in lines[0]


def test_writes_a_checkpoint_that_the_host_loads(model, tmp_path):
    out = tmp_path / "large"
    result = run(model, "--hidden-size", 64, "--heads", 8, "--kv-heads", 4, "--layers", 3, "-o", out)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    for word in (
        "hidden_size",
        "num_hidden_layers",
        "parameters",
        "32",
        "64",
        "100.0% of 128 positions",
        "random tokens",
    ):
        assert word in result.stdout
    assert list(tmp_path.iterdir()) == [out]
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.arange(30)[None]
    before, after = tiny_llama()(ids).logits, loaded(ids).logits
    assert loaded.config.hidden_size == 64 and loaded.config.num_hidden_layers == 3
    assert (before - after).abs().max() < 1e-5 * before.abs().max()
    assert AutoTokenizer.from_pretrained(out)("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]


def test_json_text_and_places(model, tmp_path):
    words = ("--layers", 4, "--placement", "0,3", "--seed", 3, "--json", "-o", tmp_path / "out")
    result = run(model, *words, "-t", "-", input="a text that is short")
    data = json.loads(result.stdout)
    assert data["before"]["num_hidden_layers"] == 2 and data["after"]["num_hidden_layers"] == 4
    assert data["after"]["parameters"] > data["before"]["parameters"]
    assert data["max_error"] == 0 and data["agreement"] == 1 and data["positions"] == 20
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [bool(layer.mlp.down_proj.weight.any()) for layer in grown.model.layers] == [False, True, True, False]


@pytest.mark.parametrize("name", ["bert", "roberta", "BertForPreTraining", "LlamaForSequenceClassification"])
def test_other_classes_are_loaded_as_what_they_are(name, tmp_path):
    sizes = {"max_position_embeddings": 32, "vocab_size": 257}
    settings = LLAMA if name.startswith("Llama") else BERT
    small = build(name, **sizes) if name.islower() else make(name, settings | sizes)
    small.save_pretrained(tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "small")
    result = run(tmp_path / "small", "--hidden-size", 96, "-o", tmp_path / "large")
    assert result.exit_code == 0, result.output
    assert "100.0%" in result.stdout
    config = AutoConfig.from_pretrained(tmp_path / "large")
    assert config.hidden_size == 96 and config.architectures == [type(small).__name__]


def test_an_existing_folder_is_replaced_only_when_told(model, tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    refused(run(model, "--layers", 3, "-o", tmp_path), "is not empty", "--force")
    assert (tmp_path / "kept.txt").read_text() == "mine"
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    assert run(model, "--layers", 3, "-o", out, "--force").exit_code == 0
    assert not (out / "old.txt").exists() and (out / "config.json").exists()
    refused(run(out, "--layers", 4, "-o", out, "--force"), "--out must not be the model itself")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--hidden-size", 16), ("hidden_size must be at least 32, the model's own, got 16",)),
        (("--heads", 5), ("multiple of num_key_value_heads, got 5 and 2",)),
        ((), ("nothing grows",)),
        (("--hidden-size", 64, "--symmetry", "independent"), ("not exact", "allow_lossy")),
        (("--layers", 3, "--placement", "middle"), ("placement must be",)),
        (("--layers", 3, "--dtype", "int8"), ("--dtype must be auto",)),
    ],
)
def test_bad_sizes_write_nothing(model, tmp_path, words, parts):
    refused(run(model, *words, "-o", tmp_path / "out"), *parts)
    assert not list(tmp_path.iterdir())


def test_bad_models_and_folders(model, tmp_path):
    refused(run(tmp_path / "none", "--layers", 3, "-o", tmp_path / "out"), "does not exist")
    (tmp_path / "file").write_text("x")
    refused(run(model, "--layers", 3, "-o", tmp_path / "file"), "is a file")
    assert run(model, "--layers", 3).exit_code == 2


def test_a_growth_that_turns_out_wrong_is_not_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr(danlu.tuning.growth.grow, "verify_growth", lambda *_: GrowthCheck(1.0, 0.1, 0.5, 8))
    words = (model, "--hidden-size", 64, "-o", tmp_path / "out")
    refused(run(*words), "off by 1.0e-01", "nothing was written")
    assert not list(tmp_path.iterdir())
    assert run(*words, "--allow-lossy").exit_code == 0
