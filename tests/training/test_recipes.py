"""The recipes that the repository ships, each run for two steps on little text."""

from pathlib import Path

import pytest
import torch

from danlu.training.metrics import read_rows
from danlu.training.recipe import load_recipe
from danlu.training.report import TrainingReport
from danlu.training.run import run_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
SMOKE = [
    "training.steps=2",
    "training.batch=4",
    "training.log_every=1",
    "training.save_every=2",
    "training.evaluate_rows=2",
    "training.compile=false",
    "data.limit=6",
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(path, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingReport, "render", lambda self: "")
    # The held-out modules are long; one of them is enough here.
    monkeypatch.setattr("danlu.context.text.HELD_OUT", ("statistics",))
    recipe = load_recipe(path, SMOKE)
    assert recipe.name == path.stem
    report = run_recipe(recipe, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows if "loss" in row)
    assert report.last("validation_loss") is not None
    assert any((tmp_path / "run" / "model").iterdir())


def test_recipes_are_documented():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    for path in RECIPES:
        assert f"recipes/{path.name}" in page
