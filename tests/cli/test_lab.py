import json

import pytest
from typer.testing import CliRunner

from danlu.cli import app
from danlu.lab import Check, Evidence, claim, claims, runner


@pytest.fixture
def invoke(monkeypatch):
    claims()
    made = {}
    monkeypatch.setattr(runner, "_CLAIMS", made)

    @claim(name="tiny-claim", title="Tiny", source="archive 0", statement="1 > 0.", measurement="Compared.")
    def tiny(context):
        return Evidence("1 is above 0", (Check("above", sum(context.track([1], description="x", total=1)) > 0),))

    return lambda *words: CliRunner().invoke(app, ["lab", *(str(word) for word in words)])


def test_run_then_list_then_report(invoke, tmp_path):
    result = invoke("run", "tiny-claim", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "holds: 1 is above 0" in result.output
    assert json.loads((tmp_path / "tiny-claim.json").read_text())["verdict"] == "holds"
    assert "tiny-claim" in (tmp_path / "index.html").read_text()
    listed = invoke("list", "--out", tmp_path)
    assert listed.exit_code == 0 and "tiny-claim" in listed.output
    (tmp_path / "index.html").unlink()
    assert invoke("report", "--out", tmp_path).exit_code == 0
    assert (tmp_path / "index.html").is_file()


def test_no_name_runs_all(invoke, tmp_path):
    assert "tiny-claim: Tiny" in invoke("run", "--out", tmp_path).output


def test_an_unknown_claim_exits_with_2_and_the_nearest_name(invoke, tmp_path):
    result = invoke("run", "tinny-claim", "--out", tmp_path)
    assert result.exit_code == 2
    assert "the nearest is 'tiny-claim'" in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--seeds", "0,x"), "seeds must be whole numbers joined by commas"),
        (("--model", "/nowhere"), "model must be a folder with a config.json, got /nowhere"),
    ],
)
def test_bad_options_exit_with_2(invoke, tmp_path, words, message):
    result = invoke("run", "tiny-claim", "--out", tmp_path, *words)
    assert result.exit_code == 2 and message in result.output
    assert list(tmp_path.iterdir()) == []


def test_no_progress_bar_outside_a_terminal(invoke, tmp_path):
    assert "━" not in invoke("run", "tiny-claim", "--out", tmp_path).output
