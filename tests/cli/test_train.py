import json

import pytest
from typer.testing import CliRunner

from danlu.cli import app
from danlu.training.report import TrainingReport
from reference.training_support import LINES

RECIPE = """
name = "tiny"
[model.config]
model_type = "llama"
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
[tokenizer]
path = "danlu-nano"
[data]
train = "text.txt"
length = 16
[optimizer]
name = "adamw"
[training]
steps = 2
batch = 4
log_every = 1
save_every = 1
"""


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingReport, "render", lambda self: "")
    (tmp_path / "text.txt").write_text("".join(LINES[:400]), encoding="utf-8")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, ["train", str(recipe), *(str(word) for word in words)])


def test_a_recipe_is_trained_into_a_folder_of_its_name(invoke, tmp_path):
    result = invoke()
    assert result.exit_code == 0, result.output
    assert "training loss" in result.output
    assert (tmp_path / "runs" / "tiny" / "model" / "config.json").is_file()
    again = invoke()
    assert again.exit_code == 2
    assert "already holds a run: go on with --resume" in again.output
    assert invoke("--resume").exit_code == 0


def test_check_prints_the_whole_recipe_and_trains_nothing(invoke, tmp_path):
    result = invoke("--check", "--set", "training.steps=7")
    assert result.exit_code == 0
    shown = json.loads(result.output)
    assert shown["training"]["steps"] == 7
    assert shown["schedule"]["kind"] == "cosine"
    assert not (tmp_path / "runs").exists()


def test_json_is_the_report(invoke, tmp_path):
    result = invoke("--json", "--out", tmp_path / "out")
    assert TrainingReport.from_json(result.stdout).last("loss") > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "training.stepz=1"), "unknown key 'training.stepz'; the nearest known one is 'steps'"),
        (("--set", "training"), "--set must look like training.steps=100"),
        (("--set", "training.batch=4000"), "at least one batch of 4000 rows"),
        (("--set", "data.train=nothing.txt"), "nothing.txt does not exist"),
        (("--sharded",), "--sharded needs several processes"),
    ],
)
def test_bad_input_exits_with_2_and_one_sentence(invoke, words, message):
    result = invoke(*words)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    result = CliRunner().invoke(app, ["train", str(tmp_path / "none.toml")])
    assert result.exit_code == 2
    assert "none.toml" in result.output
