"""The README's verdict column is filled from results, and never from memory."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "publish_lab.py"
README = """text | with | bars
<!-- lab:begin (note) -->
| method | in one line | claim in the lab | measured |
|---|---|---|---|
| A | does a | `a-claim` | old |
| B | does b | `b-claim`, `a-claim` | |
| C | baseline | - | |
<!-- lab:end -->
more
"""


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("publish_lab", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_verdicts_fill_the_last_column(script):
    text = script.update_readme(README, {"a-claim": "holds", "b-claim": "does not hold here"})
    assert "| A | does a | `a-claim` | **holds** |" in text
    assert "| B | does b | `b-claim`, `a-claim` | *does not hold here*, **holds** |" in text
    assert "| C | baseline | - | |" in text
    assert text.startswith("text | with | bars\n<!-- lab:begin (note) -->") and text.endswith(
        "<!-- lab:end -->\nmore\n"
    )
    assert script.update_readme(text, {"a-claim": "holds", "b-claim": "does not hold here"}) == text


def test_a_claim_without_a_result_is_an_error(script):
    with pytest.raises(ValueError, match="no result for b-claim; run: danlu lab run b-claim"):
        script.update_readme(README, {"a-claim": "holds"})


def test_markers_are_needed(script):
    with pytest.raises(ValueError, match="lab:begin"):
        script.update_readme("no table", {})


def test_publish_writes_page_figures_and_readme(script, tmp_path):
    lab, root = tmp_path / "lab", tmp_path / "root"
    (lab / "figures").mkdir(parents=True)
    (lab / "figures" / "a-claim.png").write_bytes(b"picture")
    (root / "docs").mkdir(parents=True)
    (root / "README.md").write_text(README.replace("`b-claim`, ", ""))
    claim = {"name": "a-claim", "title": "A", "source": "archive 1", "statement": "A holds.", "verdict": "holds"}
    claim |= {"summary": "1 < 2.", "figure": "figures/a-claim.png"}
    (lab / "results.json").write_text(json.dumps({"claims": [claim]}))

    assert script.publish(lab, root, ["a-claim"]) == ["a-claim"]
    assert (root / "docs/images/lab/a-claim.png").read_bytes() == b"picture"
    page = (root / "docs/measured.md").read_text()
    assert "## A" in page and "**holds**: 1 < 2." in page and "images/lab/a-claim.png" in page
    assert "| A | does a | `a-claim` | **holds** |" in (root / "README.md").read_text()


def test_claims_that_were_not_run_keep_what_was_published(script, tmp_path):
    lab, root = tmp_path / "lab", tmp_path / "root"
    (root / "docs").mkdir(parents=True)
    lab.mkdir()
    (root / "README.md").write_text(README)
    claim = {"title": "T", "source": "archive 1", "statement": "S.", "figure": ""}
    old = [claim | {"name": "a-claim", "verdict": "holds", "summary": "first a"},
           claim | {"name": "b-claim", "verdict": "does not hold here", "summary": "first b"},
           claim | {"name": "gone", "verdict": "holds", "summary": "first c"}]  # fmt: skip
    (lab / "results.json").write_text(json.dumps({"claims": old}))
    order = ["b-claim", "a-claim"]
    script.publish(lab, root, order)
    before = (root / "docs/measured.md").read_text()
    assert before.index("first b") < before.index("first a") and "first c" not in before
    new = [claim | {"name": "a-claim", "verdict": "holds in part", "summary": "new a"}]
    (lab / "results.json").write_text(json.dumps({"claims": new}))
    assert script.publish(lab, root, order) == ["a-claim"]
    after = (root / "docs/measured.md").read_text()
    assert after == before.replace("**holds**: first a", "holds in part: new a")
    assert "`b-claim`, `a-claim` | *does not hold here*, holds in part |" in (root / "README.md").read_text()
