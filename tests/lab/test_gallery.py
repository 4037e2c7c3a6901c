import importlib.util
from html.parser import HTMLParser
from pathlib import Path

from danlu.lab.gallery import draw, figure_path, format_cell, render

_spec = importlib.util.spec_from_file_location("lab_records", Path(__file__).with_name("test_claim.py"))
_records = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_records)
record = _records.record


class Page(HTMLParser):
    """Collects tags, their attributes and the text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_shows_claims_numbers_and_verdicts(tmp_path):
    page = Page(render([record(True), record(False, name="other", title="Another")], tmp_path))
    assert [entry["id"] for entry in page.all("article")] == ["a-claim", "other"]
    assert "holds: 1" in page.text and "does not hold here: 1" in page.text and "holds in part: 0" in page.text
    assert "4.250" in page.text and "1.00 against 0.25" in page.text and "a departure" in page.text


def test_the_page_is_self_contained(tmp_path):
    page = Page(render([record(True)], tmp_path))
    (image,) = page.all("img")
    assert image["src"].startswith("data:image/png;base64,") and image["alt"] == "Figure: A title"
    assert not page.all("script") and not page.all("link")
    assert figure_path("a-claim", tmp_path).is_file()


def test_words_are_escaped(tmp_path):
    html = render([record(True, title="<script>alert(1)</script>", summary="a < b & c")], tmp_path)
    assert not Page(html).all("script")
    assert "a &lt; b &amp; c" in html


def test_an_empty_lab_says_how_to_fill_it(tmp_path):
    page = Page(render([], tmp_path))
    assert "danlu lab run" in page.text and not page.all("article")


def test_a_figure_is_drawn_from_the_record_alone(tmp_path):
    first = draw(record(True), tmp_path).read_bytes()
    again = draw(type(record(True)).from_json(record(True).to_json()), tmp_path).read_bytes()
    assert first == again and first.startswith(b"\x89PNG")


def test_cells():
    assert [format_cell(value) for value in (None, 0.12345, 12345.6, 3, "x", 0.0, 2e-5)] == [
        "-", "0.123", "1.235e+04", "3", "x", "0.000", "2e-05",
    ]  # fmt: skip
