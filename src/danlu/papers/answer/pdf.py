"""Text of a PDF, taken by a process of its own that may use little memory and time: a document is hostile until read.

A bomb, a cycle or a crash ends that process and is a typed error here. What is no PDF is refused by its first bytes, so
that a page which asks whether a person is reading is never summarised.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from danlu.papers.answer.cleaning import clean_pages
from danlu.papers.answer.sections import from_text
from danlu.papers.answer.types import NoText, PaperText

#: Part of every answer's key: raise it when the text that comes out changes.
VERSION = 1
Reader = Literal["pypdf", "pdfium"]


@dataclass(frozen=True)
class Limits:
    """What reading one document may take.

    Args:
        memory: bytes of address space.
        cpu: seconds of processor time.
        wall: seconds by the clock.
        input_bytes: size of the document.
        pages: that are read; later ones are left out, and a note says so.
        text: characters that come out.
    """

    memory: int = 1536 * 2**20
    cpu: int = 30
    wall: float = 60.0
    input_bytes: int = 64 * 2**20
    pages: int = 300
    text: int = 4 * 2**20


#: Fewer characters than this, in all or on a page, is a scan or broken.
MIN_TEXT, MIN_PAGE = 500, 50


def default_reader() -> Reader:
    """PDFium where it is installed, which is several times faster, else pypdf."""
    from importlib.util import find_spec

    return "pdfium" if find_spec("pypdfium2") is not None else "pypdf"


def extract(
    data: bytes | Path, title: str = "", limits: Limits | None = None, reader: Reader | None = None
) -> PaperText:
    """The text of a PDF, cleaned and cut into sections.

    Args:
        data: the document, or its file.
        title: of the paper, where it is known.
        limits: of the process that reads it.
        reader: library that reads it; the fastest installed one first, and pypdf if that fails.

    Returns:
        The text, with notes on what was left out.

    Raises:
        NoText: no PDF, broken, beyond its limits, or without text.
    """
    bounds = limits or Limits()
    if isinstance(data, Path):
        if data.stat().st_size > bounds.input_bytes:
            raise NoText(f"the document has more than {bounds.input_bytes} bytes")
        data = data.read_bytes()
    if len(data) > bounds.input_bytes:
        raise NoText(f"the document has more than {bounds.input_bytes} bytes")
    if b"%PDF-" not in data[:1024]:
        raise NoText("this is not a PDF: its first bytes say so")
    readers: Sequence[Reader] = (reader,) if reader else tuple(dict.fromkeys((default_reader(), "pypdf")))
    failure: NoText | None = None
    for name in readers:
        try:
            return _read(data, title, bounds, name)
        except NoText as error:
            failure = error
    raise failure or NoText("no reader")


def _read(data: bytes, title: str, limits: Limits, reader: Reader) -> PaperText:
    with tempfile.NamedTemporaryFile(suffix=".pdf") as file:
        file.write(data)
        file.flush()
        command = [
            sys.executable,
            "-I",
            str(Path(__file__).with_name("pdf_worker.py")),
            file.name,
            reader,
            json.dumps(asdict(limits)),
        ]
        try:
            done = subprocess.run(
                command, capture_output=True, timeout=limits.wall, stdin=subprocess.DEVNULL, env={}, check=False
            )
        except subprocess.TimeoutExpired:
            raise NoText(f"reading it took more than {limits.wall:.0f} s") from None
    if done.returncode != 0:
        raise NoText(f"it cannot be read: {_reason(done.returncode, done.stderr)}")
    try:
        found = json.loads(done.stdout)
        pages, total = [str(page) for page in found["pages"]], int(found["total"])
    except (ValueError, KeyError, TypeError) as error:
        raise NoText("it cannot be read: the reader gave no pages") from error
    text, starts = clean_pages(pages)
    if len(text.strip()) < MIN_TEXT or len(text.strip()) < MIN_PAGE * len(pages):
        raise NoText("it holds hardly any text: it may be a scan")
    notes = []
    if total > len(pages):
        notes.append(f"Only the first {len(pages)} of {total} pages were read.")
    return from_text(text, title, starts, tuple(notes))


def _reason(code: int, stderr: bytes) -> str:
    if code < 0:
        return "its reader was stopped at the limit of memory or time"
    lines = [line for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else f"its reader ended with status {code}"
