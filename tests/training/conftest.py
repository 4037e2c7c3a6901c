"""Fixtures of the training tests: a small corpus and a recipe on it."""

import pytest

from danlu.training.recipe import parse_recipe
from reference.training_support import LINES, values


@pytest.fixture
def corpus(tmp_path):
    """A folder of text files beside which a recipe lies."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.txt").write_text("".join(LINES[i * 100 : (i + 1) * 100]), encoding="utf-8")
    return folder


@pytest.fixture
def recipe(corpus):
    """Makes a recipe from changes to the tiny one."""
    return lambda **changes: parse_recipe(values(**changes), folder=corpus.parent)
