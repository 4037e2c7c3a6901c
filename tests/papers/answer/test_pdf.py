from __future__ import annotations

import json
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danlu.papers.answer import pdf
from danlu.papers.answer.cleaning import clean_pages
from danlu.papers.answer.pdf import Limits, extract
from danlu.papers.answer.types import NoText
from reference import pdf as made

SMALL = Limits(memory=700 * 2**20, cpu=4, wall=15.0)
READERS = ("pypdf", "pdfium")


def _prose(topic: str, lines: int = 14) -> list[str]:
    return [
        f"Line {chr(97 + n)} tells that the {topic} of the system is measured with great care." for n in range(lines)
    ]


def _paper() -> bytes:
    pages = [["A Fine Title", "Abstract", *_prose("abstract"), "1 Introduction", *_prose("introduction")]]
    pages += [["2 Method", *_prose("method")], ["3 Experiments", *_prose("result")], ["4 Conclusion", *_prose("end")]]
    pages += [["References", *(f"[{n}] A. Author and B. Author. A paper on results. 20{n}." for n in range(10, 30))]]
    return made.text_pdf(pages)


@pytest.mark.parametrize("reader", READERS)
def test_text_pages_and_sections_of_a_paper(reader):
    paper = extract(_paper(), "A Fine Title", reader=reader)
    assert [(s.role, s.page_from, s.page_to) for s in paper.sections] == [
        ("other", 1, 1),
        ("abstract", 1, 1),
        ("introduction", 1, 1),
        ("method", 2, 2),
        ("experiments", 3, 3),
        ("conclusion", 4, 4),
        ("references", 5, 5),
    ]
    assert paper.title == "A Fine Title" and paper.notes == () and len(paper.page_starts) == 5
    assert paper.text.count("the method of the system") == 14
    place = paper.text.index("the result of")
    assert paper.page_of(place) == 3 and paper.page_of(0) == 1
    assert "".join(paper.text[s.start : s.end] for s in paper.sections) == paper.text


def test_both_readers_see_the_same_words():
    assert extract(_paper(), reader="pypdf").text.split() == extract(_paper(), reader="pdfium").text.split()


def test_a_file_is_read_like_its_bytes(tmp_path):
    (tmp_path / "a.pdf").write_bytes(_paper())
    assert extract(tmp_path / "a.pdf") == extract(_paper())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html><body>Are you a robot? " + b"Please tell us that you are human. " * 100 + b"</body></html>",
        b" " * 1024 + b"%PDF-1.4",
    ],
)
def test_what_is_no_pdf_is_refused_before_it_is_read(data, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(NoText, match="not a PDF"):
        extract(data)


def test_html_behind_the_magic_is_no_document():
    page = b"%PDF-1.4\n<html><body>" + b"Please tell us that you are human. " * 100 + b"</body></html>"
    with pytest.raises(NoText):
        extract(page, limits=SMALL)


def test_the_bombs_are_what_they_say():
    packed = made._zeros(2**25)
    assert zlib.decompress(packed) == bytes(2**25)
    assert len(made.flate_bomb()) < 2.5e6 and len(made.nested_bomb()) < 2e4


@pytest.mark.parametrize("name", ["flate", "nested", "cyclic", "kids"])
@pytest.mark.parametrize("reader", READERS)
def test_bombs_end_inside_their_limits(name, reader):
    build = {"flate": made.flate_bomb, "nested": made.nested_bomb, "cyclic": made.cyclic, "kids": made.many_kids}
    data = build[name]()
    begin = time.monotonic()
    with pytest.raises(NoText):
        extract(data, limits=SMALL, reader=reader)
    assert time.monotonic() - begin < SMALL.wall + 3


def test_the_reader_has_the_memory_it_was_given_and_no_file_to_write(tmp_path):
    """The worker is run as it is in use, on a reader that takes what it can get."""
    hungry = tmp_path / "pypdf.py"
    for body, reason in (
        ("x = bytearray(2**31)", "more memory"),
        (f"open({str(tmp_path / 'out')!r}, 'w').write('x' * 100000)", "File too large"),
        ("raise KeyError('k')", "KeyError"),
    ):
        hungry.write_text(f"class PdfReader:\n    def __init__(self, path):\n        {body}\n")
        worker = Path(pdf.__file__).with_name("pdf_worker.py")
        limits = json.dumps({"memory": 2**30, "cpu": 4, "pages": 3, "text": 100})
        command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
                   f"sys.argv = ['w', 'f.pdf', 'pypdf', {limits!r}]; import runpy; "
                   f"runpy.run_path({str(worker)!r}, run_name='__main__')"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert done.returncode != 0 and reason in done.stderr


def test_a_reader_that_does_not_end_is_ended():
    begin = time.monotonic()
    with pytest.raises(NoText, match="took more than"):
        extract(_paper(), limits=Limits(wall=0.01), reader="pypdf")
    assert time.monotonic() - begin < 5


def test_more_pages_than_allowed_are_left_out_with_a_note():
    pages = [_prose(f"{part} part", 20) for part in "abcdefg"]
    paper = extract(made.text_pdf(pages), limits=Limits(pages=5))
    assert paper.notes == ("Only the first 5 of 7 pages were read.",) and len(paper.page_starts) == 5


def test_no_more_text_comes_out_than_allowed():
    paper = extract(made.text_pdf([_prose(f"{part} part", 40) for part in "abcd"]), limits=Limits(text=4000))
    assert 3000 < len(paper.text) <= 4100 and "pages were read" in paper.notes[0]


def test_large_documents_are_not_even_read(tmp_path):
    with pytest.raises(NoText, match="bytes"):
        extract(_paper() + b" " * 5000, limits=Limits(input_bytes=4000))
    (tmp_path / "a.pdf").write_bytes(_paper())
    with pytest.raises(NoText, match="bytes"):
        extract(tmp_path / "a.pdf", limits=Limits(input_bytes=400))


def test_a_scan_is_told_from_a_short_text():
    with pytest.raises(NoText, match="scan"):
        extract(made.text_pdf([["Scanned by a machine"]] * 3))
    with pytest.raises(NoText, match="scan"):
        extract(made.text_pdf([_prose("page", 9), *([["1"]] * 20)]))
    assert extract(made.text_pdf([_prose("page", 9)]))


def test_the_slower_reader_helps_where_the_faster_one_fails(monkeypatch):
    asked = []
    read = pdf._read

    def failing(data, title, limits, reader):
        asked.append(reader)
        if reader == "pdfium":
            raise NoText("no")
        return read(data, title, limits, reader)

    monkeypatch.setattr(pdf, "_read", failing)
    assert extract(_paper()).text and asked == ["pdfium", "pypdf"]
    with pytest.raises(NoText):
        extract(_paper(), reader="pdfium")


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cuts=st.lists(st.tuples(st.integers(9, 4000), st.binary(min_size=1, max_size=30)), max_size=6))
def test_broken_documents_give_text_or_no_text(cuts):
    data = bytearray(_paper())
    for place, patch in cuts:
        data[place : place + len(patch)] = patch
    try:
        paper = extract(bytes(data), limits=SMALL, reader="pypdf")
    except NoText:
        return
    assert "".join(paper.text[s.start : s.end] for s in paper.sections) == paper.text


def test_words_that_a_line_end_broke_are_joined():
    text, _ = clean_pages(
        ["self-supervi-\nsed models are ef\ufb01cient, state-\nOf and con\u00ad\ntext, hy\ufffe\nphen"]
    )
    assert text == "self-supervised models are efficient, state-\nOf and context, hyphen\n"


def test_running_heads_and_line_numbers_go_and_paragraphs_stay():
    pages = [f"arXiv:2401.0000{n} [cs.LG]\n\nPage text {w}.\n\n\n\nNext {w}.\n 12\nA. Author, page {n}\n" for n, w in
             enumerate("abcde")]  # fmt: skip
    text, starts = clean_pages(pages)
    assert text == "".join(f"Page text {w}.\n\nNext {w}.\n" for w in "abcde")
    assert [text[start:][:11] for start in starts] == [f"Page text {w}" for w in "abcde"]
    few, _ = clean_pages(pages[:3])
    assert "arXiv" in few and "Author" in few


def test_control_characters_do_not_come_through():
    assert clean_pages(["a\x00b\x1b[31m\u202ec\ud800\r\nd"])[0] == "ab[31mc\nd\n"
