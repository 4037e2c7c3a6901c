from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from danlu.cli import app

runner = CliRunner()
TABLE = "id,title,authors,abstract\nx1,A table of papers,Ann Lee; Bo Chen,Nothing much.\n,no id,A B,\n"
PAPER = """Abstract
Long papers are a hard problem for readers with little time. In this paper we propose reading extracts first.

1 Introduction
However, existing tools lack a way to see what matters. This remains a challenge for every reader of new papers.

2 Conclusion
We conclude that extracts help readers to decide. Future work could extend the method to whole collections.
"""


def _run(*words, code=0):
    result = runner.invoke(app, ["papers", *map(str, words)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


def test_a_file_is_imported_once_and_searched(tmp_path, data):
    file = tmp_path / "venue.csv"
    file.write_text(TABLE)
    first = json.loads(_run("import", file, "--venue", "TEST", "--year", 2024, "--data", data, "--json").stdout)
    again = json.loads(_run("import", file, "--venue", "TEST", "--year", 2024, "--data", data, "--json").stdout)
    assert (first["added"], first["bad"], again["added"], again["unchanged"]) == (1, 1, 0, 1)
    assert "row 3" in first["reasons"][0]
    # The sample is there beside it.
    assert int(_run("reindex", "--data", data).stdout.split()[0]) == 45


def test_a_venue_needs_a_name_and_a_year(tmp_path, data):
    file = tmp_path / "venue.csv"
    file.write_text(TABLE)
    assert "1 new" in _run("add-venue", "TEST.2024", file, "--data", data).stdout
    assert "such as ICML.2024" in _run("add-venue", "TEST", file, "--data", data, code=2).output


def test_questions_about_a_file_are_answered_from_it(tmp_path, data):
    file = tmp_path / "paper.txt"
    file.write_text(PAPER)
    found = json.loads(_run("ask", file, "-q", 1, "-q", 5, "--data", data, "--json").stdout)
    assert [answer["number"] for answer in found["answers"]] == [1, 5]
    assert "existing tools lack" in found["answers"][0]["text"] and "Future work" in found["answers"][1]["text"]
    for answer in found["answers"]:
        for quote in answer["quotes"]:
            assert " ".join(PAPER[quote["start"] : quote["end"]].split()) in answer["text"]
    printed = _run("ask", file, "-q", 6, "--data", data).stdout
    assert printed.startswith("\n## 6. Summarise")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ask", "2401.06769"], "--contact must be given"),
        (["ask", "nothing-here"], "neither a file nor an identifier"),
        (["ask", "2401.06769", "-q", "7"], "--question must be in 1..6"),
        (["poll"], "poll needs subjects"),
        (["poll", "cs.XX", "--contact", "me@example.org"], "expected a category"),
        (["import", "none.csv"], "no file at none.csv"),
        (["serve", "--follow", "cs.AI"], "contact must be given"),
        (["serve", "--search", "grep"], "search"),
    ],
)
def test_bad_input_is_one_sentence(words, message, data):
    assert message in _run(*words, "--data", data, code=2).output


def test_the_doctor_says_what_works(data):
    _run("reindex", "--data", data)
    text = _run("doctor", "--data", data).stdout
    assert "44 papers" in text and "fts5, 0 papers behind" in text and "polling: off" in text
    assert "cannot be opened" in _run("doctor", "--data", data, "--database", "mysql://x/y", code=1).stdout
