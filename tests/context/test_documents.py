"""Text out of files, and long texts cut where it hurts least."""

from __future__ import annotations

import io
import sys
import types

import pytest

from danlu.context.documents import Document, decode_text, html_text, read_document, split_text


def test_text_and_markdown_are_taken_as_they_are(tmp_path):
    path = tmp_path / "notes.md"
    path.write_bytes("\ufeff# Title\r\n\r\nWörds <b>here</b>\r\n".encode())
    document = read_document(path)
    assert document == Document(str(path), "# Title\n\nWörds <b>here</b>\n")
    assert document.page(3) is None


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"typed text")))
    assert read_document("-") == Document("standard input", "typed text")


PAGE = """<!DOCTYPE html><html><head><title>A page</title><style>p { color: red }</style>
<script>var x = "<p>not text</p>";</script></head><body><h1>Head&amp;line</h1><p>One   <b>bold</b>
 word.<br>Next line</p><ul><li>first</li><li>second &eacute;</li></ul><noscript>no</noscript>
<table><tr><td>a</td><td>b</td></tr></table><pre>  kept
    as is</pre><svg><text>drawn</text></svg><script src="x"/>seen</body></html>"""


def test_html_becomes_paragraphs_without_scripts():
    assert html_text(PAGE) == (
        "A page\n\nHead&line\n\nOne bold word.\nNext line\n\nfirst\n\nsecond é\n\na b\n\nkept\n    as is\n\nseen"
    )


@pytest.mark.parametrize("name", ["page.html", "page.HTM", "page"])
def test_html_is_known_by_its_name_or_its_beginning(tmp_path, name):
    path = tmp_path / name
    path.write_text(PAGE)
    assert read_document(path).text.startswith("A page\n\nHead&line")


def fake_pdf(monkeypatch, pages, error=None):
    class Reader:
        def __init__(self, stream):
            assert stream.read().startswith(b"%PDF-")
            if error:
                raise error
            self.pages = [types.SimpleNamespace(extract_text=lambda text=text: text) for text in pages]

    monkeypatch.setitem(sys.modules, "pypdf", types.SimpleNamespace(PdfReader=Reader))


@pytest.fixture
def pdf(tmp_path):
    path = tmp_path / "paper.pdf"
    path.write_bytes(b"%PDF-1.7 whatever")
    return path


def test_pdf_pages_keep_their_offsets_and_words_become_whole(pdf, monkeypatch):
    fake_pdf(monkeypatch, ["A ﬁrst extra-\nordinary page.\n", None, "Non-\nEnglish third"])
    document = read_document(pdf)
    assert document.text == "A first extraordinary page.\n\n\n\nNon-\nEnglish third"
    assert [document.page(offset) for offset in (0, 28, 31, len(document.text) - 1)] == [1, 1, 3, 3]


def test_a_real_pdf_file_is_read_page_by_page(tmp_path):
    pytest.importorskip("pypdf")
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_pdf import PdfPages
    from matplotlib.figure import Figure

    path = tmp_path / "two.pdf"
    with matplotlib.rc_context({"pdf.fonttype": 42}), PdfPages(path) as pages:
        for words in ("The furnace is lit.", "The second page is short."):
            figure = Figure()
            figure.text(0.1, 0.5, words)
            pages.savefig(figure)
    document = read_document(path)
    assert document.text == "The furnace is lit.\n\nThe second page is short."
    assert document.pages == (0, 21)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match="two.pdf"):
        read_document(path)


def test_pdf_is_known_by_its_first_bytes(tmp_path, monkeypatch):
    fake_pdf(monkeypatch, ["text"])
    path = tmp_path / "paper"
    path.write_bytes(b"%PDF-1.4")
    assert read_document(path).text == "text"


def test_a_missing_pdf_reader_is_named_with_its_extra(pdf, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(ModuleNotFoundError, match=r"paper.pdf is a PDF file, .* pip install 'danlu\[pdf\]'"):
        read_document(pdf)


def test_damaged_scanned_and_disguised_pdfs(pdf, tmp_path, monkeypatch):
    fake_pdf(monkeypatch, [], RecursionError("cyclic page tree"))
    with pytest.raises(ValueError, match=r"cannot be read as PDF \(cyclic page tree\)"):
        read_document(pdf)
    fake_pdf(monkeypatch, ["", " \n"])
    with pytest.raises(ValueError, match="has 2 pages but no text: it may be scanned"):
        read_document(pdf)
    fake = tmp_path / "captcha.pdf"
    fake.write_text("<html>are you a robot?</html>")
    with pytest.raises(ValueError, match="named .pdf but is none"):
        read_document(fake)


def test_files_that_are_no_text(tmp_path):
    for content, message in (
        (b" \n", "is empty: pass a text"),
        (b"ab\xff", "byte 0xff at offset 2"),
        (b"a\0b", "zero byte at offset 1"),
    ):
        with pytest.raises(ValueError, match=f"x.txt .*{message}|x.txt {message}"):
            decode_text(content, "x.txt")
    with pytest.raises(FileNotFoundError):
        read_document(tmp_path / "none.txt")
    empty = tmp_path / "empty.html"
    empty.write_text("<html><script>x</script></html>")
    with pytest.raises(ValueError, match="no text between its tags"):
        read_document(empty)


def words(text: str) -> int:
    return len(text.split())


def check(text, size, measure=len):
    spans = split_text(text, size, measure)
    end = 0
    for start, stop in spans:
        assert text[end:start].strip() == "" and start < stop
        assert measure(text[start:stop]) <= size
        assert text[start:stop] == text[start:stop].strip()
        end = stop
    assert text[end:].strip() == ""
    return [text[start:stop] for start, stop in spans]


def test_cuts_are_at_paragraphs_then_lines_then_sentences_then_words_then_anywhere():
    text = "one two\n\nthree four\n\nfive six seven eight. nine ten. eleven\nx y"
    assert check(text, 4, words) == ["one two\n\nthree four", "five six seven eight.", "nine ten. eleven", "x y"]
    assert check("one two three four five", 2, words) == ["one two", "three four", "five"]
    assert check("abcdefgh", 3) == ["abc", "def", "gh"]
    assert check("一。二三。四", 3) == ["一。", "二三。", "四"]


def test_a_text_that_fits_is_one_part_and_white_space_is_none():
    assert split_text("  all of it \n", 99) == [(2, 11)]
    assert split_text(" \n\n ", 5) == []


def test_parts_cover_random_texts_and_are_as_long_as_they_can_be():
    import random

    random.seed(0)
    for _ in range(40):
        text = "".join(random.choice("ab. \n") for _ in range(random.randrange(1, 200)))
        for size in (1, 2, 7, 30):
            check(text, size)


def test_measuring_stays_near_what_fits():
    measured = []

    def measure(text: str) -> int:
        measured.append(len(text))
        return len(text)

    split_text("word word word.\n\n" * 5000, 200, measure)
    assert max(measured) <= 500
    assert sum(measured) < 25 * 5000 * 17


def test_bad_sizes():
    with pytest.raises(ValueError, match="size must be >= 1, got 0"):
        split_text("a", 0)
    with pytest.raises(ValueError, match="'é' alone measures more than 1"):
        split_text("é", 1, lambda text: len(text.encode()))
