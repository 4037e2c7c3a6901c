"""The browser extension's reading of identifiers, run by Node.js and held against the site's own."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib import resources

import pytest

from danlu.papers.ids import InvalidIdentifier, find_arxiv_ids, parse_arxiv

FOLDER = resources.files("danlu.papers") / "extension"
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed")


def _node(expression: str):
    program = (
        f"import * as m from {json.dumps((FOLDER / 'ids.js').as_uri())}; console.log(JSON.stringify({expression}))"
    )
    done = subprocess.run(["node", "--input-type=module", "-e", program], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


@needs_node
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("https://openreview.net/forum?id=aB_c-9d&noteId=x", ["aB_c-9d@OpenReview"]),
        ("https://openreview.net/pdf?foo=1&id=rnJxelIZrq", ["rnJxelIZrq@OpenReview"]),
        ("see hep-th/9901001 and math.CA/0611800", ["hep-th/9901001", "math/0611800"]),
        ("https://doi.org/10.1145/3292500.3330701", []),
        ("https://doi.org/10.48550/arXiv.2310.11453", ["2310.11453"]),
        ("https://aclanthology.org/volumes/2024.acl-long/", []),
        ("https://aclanthology.org/events/acl-2024/", []),
        (
            "https://aclanthology.org/2024.acl-long.17/ and https://aclanthology.org/P19-1001.pdf",
            ["2024.acl-long.17@ACL"],
        ),
        ("https://aclanthology.org/P19-1001/", ["P19-1001@ACL"]),
        ("https://arxiv.org/pdf/2401.6769v2", ["2401.06769v2"]),
        ("2413.00001 1412.12345", []),
        ("", []),
    ],
)
def test_identifiers_are_found_where_there_are_any(text, ids):
    assert _node(f"m.findIds({json.dumps(text)})") == ids


@needs_node
def test_the_extension_and_the_site_read_alike():
    texts = [
        "arXiv:2401.06769v2, 10.1145/3292500.3330701, hep-th/9901001; https://arxiv.org/pdf/1406.2661v1.pdf",
        "math.CA/0611800 12401.06769 2401.067691 2401.0676 x2401.06769 (2401.06769) 2401.06769.",
        "cs/0703001 cs/0704001 hep-th/9106001 1501.00001 0704.0001 0703.0001 1412.9999 1406.02661 2401.00000",
    ]
    assert _node(f"{json.dumps(texts)}.map(m.findIds)") == [[str(i) for i in find_arxiv_ids(text)] for text in texts]
    samples = (
        "2401.06769 2401.6769 1406.02661 1412.12345 2413.00001 math.CA/0611800 math/0704001 hep-th/9901001v2 "
        "2401.06769v0 704.1"
    ).split()

    def site(text):
        try:
            return str(parse_arxiv(text))
        except InvalidIdentifier:
            return None

    assert _node(f"{json.dumps(samples)}.map(m.canonical)") == [site(text) for text in samples]


@needs_node
def test_a_click_looks_at_selection_link_and_page_in_that_order():
    page = {"pageUrl": "https://arxiv.org/abs/2401.00001", "linkUrl": "https://arxiv.org/abs/2401.00002"}
    assert _node(f"m.chosen({json.dumps({**page, 'selectionText': 'on 2401.00003'})})") == {
        "ids": ["2401.00003"],
        "words": "",
    }
    assert _node(f"m.chosen({json.dumps({**page, 'selectionText': 'some words'})})")["ids"] == ["2401.00002"]
    assert _node("m.chosen({selectionText: null})") == {"ids": [], "words": ""}
    assert _node("m.target('http://x/', [], 'some words')") == "http://x/arxiv/search?query=some%20words"
    assert _node("m.target('http://x', ['math/0611800', '2401.00001'])") == "http://x/arxiv/math/0611800,2401.00001"
    assert _node("m.target('http://x', [], ' ')") is None


def test_the_manifest_names_files_that_exist_and_asks_for_little():
    manifest = json.loads((FOLDER / "manifest.json").read_text())
    assert manifest["manifest_version"] == 3 and "host_permissions" not in manifest
    named = [
        manifest["background"]["service_worker"],
        manifest["options_ui"]["page"],
        *manifest["content_scripts"][0]["js"],
    ]
    for name in named:
        assert (FOLDER / name).is_file()
    for script in FOLDER.iterdir():
        assert ".innerHTML" not in script.read_text() and "eval(" not in script.read_text()


@needs_node
def test_the_translator_is_javascript_behind_its_header():
    text = (resources.files("danlu.papers") / "zotero" / "danlu-papers.js").read_text()
    end = text.index("\n}\n") + 2
    assert json.loads(text[:end])["translatorType"] == 4
    subprocess.run(["node", "--check", "-"], input=text[end:], check=True, text=True, capture_output=True)
