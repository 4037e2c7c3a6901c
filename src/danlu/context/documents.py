"""Text out of files: plain text, Markdown, HTML and PDF, and long texts cut at their paragraphs."""

from __future__ import annotations

import importlib
import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

_LIGATURES = str.maketrans({"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"})
#: Where a text may be cut, from the best kind of place to the worst; a cut is behind the match.
_BORDERS = tuple(re.compile(pattern) for pattern in (r"\n[ \t]*\n\s*", r"\n+", r"[.!?]+\s+|[。！？；]+\s*", r"\s+"))

_BLOCKS = frozenset(
    "address article aside blockquote dd details dialog div dl dt fieldset figcaption figure footer form h1 h2 h3 h4 "
    "h5 h6 header hgroup hr li main nav ol p pre section summary table title tr ul".split()
)
_UNSEEN = frozenset(("script", "style", "template", "noscript", "svg", "math"))


@dataclass(frozen=True)
class Document:
    """A file's text.

    Attributes:
        name: as it was given.
        text: what can be read in it.
        pages: where each page begins in ``text``; empty where there are none.
    """

    name: str
    text: str
    pages: tuple[int, ...] = ()

    def page(self, offset: int) -> int | None:
        """The page, from 1, that an offset into the text lies on; None without pages."""
        return bisect_right(self.pages, offset) or None if self.pages else None


def read_document(name: str | Path) -> Document:
    """Read a file by its ending and its first bytes: ``.html``, ``.htm``, ``.xhtml``, ``.pdf``; all else is text.

    Args:
        name: path; ``-`` is standard input.

    Returns:
        Its text; offsets count characters of it, not bytes of the file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is empty, damaged, not UTF-8, or has no text.
        ModuleNotFoundError: a PDF without the package that reads it.
    """
    what = "standard input" if str(name) == "-" else str(name)
    content = sys.stdin.buffer.read() if str(name) == "-" else Path(name).read_bytes()
    ending = "" if str(name) == "-" else Path(name).suffix.lower()
    is_pdf = b"%PDF-" in content[:1024]
    if ending == ".pdf" and not is_pdf:
        raise ValueError(f"{what} is named .pdf but is none (no %PDF- at its start): fetch it again")
    if is_pdf:
        return _read_pdf(content, what)
    text = decode_text(content, what)
    if ending in (".html", ".htm", ".xhtml") or re.match(r"\s*(<!doctype html|<html)", text, re.IGNORECASE):
        text = html_text(text)
        if not text:
            raise ValueError(f"{what} has no text between its tags: pass another file")
    return Document(what, text.replace("\r\n", "\n"))


def decode_text(content: bytes, what: str) -> str:
    """Bytes of a text file as text.

    Args:
        content: UTF-8, with a byte-order mark or without.
        what: the file's name, for errors.

    Raises:
        ValueError: empty, not UTF-8, or binary.
    """
    if not content.strip():
        raise ValueError(f"{what} is empty: pass a text")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{what} is not UTF-8 text (byte 0x{content[error.start]:02x} at offset {error.start}): pass a text file"
        ) from error
    if "\0" in text:
        raise ValueError(f"{what} is binary (a zero byte at offset {content.index(0)}): pass a text file")
    return text


def html_text(html: str) -> str:
    """The readable text of a page: paragraphs with a blank line between, no scripts, no styles."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    paragraphs = [paragraph.strip(" \n") for paragraph in "".join(reader.parts).split("\f")]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


class _Reader(HTMLParser):
    """Collects text; a form feed stands for the border of a block."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._unseen = 0
        self._verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _UNSEEN:
            self._unseen += 1
        elif tag in _BLOCKS:
            self.parts.append("\f")
            self._verbatim += tag == "pre"
        elif tag == "br":
            self.parts.append("\n")
        elif tag in ("td", "th"):
            self.parts.append(" ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _UNSEEN:  # <script/> has no end tag to close it
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag in _UNSEEN:
            self._unseen = max(0, self._unseen - 1)
        elif tag in _BLOCKS:
            self.parts.append("\f")
            self._verbatim = max(0, self._verbatim - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if self._unseen:
            return
        if not self._verbatim:
            data = re.sub(r"\s+", " ", data)
            if self.parts and self.parts[-1][-1:] in (" ", "\n", "\f"):
                data = data.removeprefix(" ")
        if data:
            self.parts.append(data.replace("\f", " "))


def _read_pdf(content: bytes, what: str) -> Document:
    try:
        pypdf = importlib.import_module("pypdf")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what} is a PDF file, which needs the package pypdf: pip install 'danlu[pdf]'", name="pypdf"
        ) from error
    try:
        pages = [page.extract_text() or "" for page in pypdf.PdfReader(BytesIO(content)).pages]
    except Exception as error:  # damaged files raise anything, up to RecursionError
        first = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ValueError(f"{what} cannot be read as PDF ({first}): it may be damaged or encrypted") from error
    text, starts = "", []
    for page in pages:
        starts.append(len(text))
        # words cut at the end of a line become whole again
        text += re.sub(r"(\w)-\n(?=[a-z])", r"\1", page.translate(_LIGATURES)).strip() + "\n\n"
    if not text.strip():
        raise ValueError(f"{what} has {len(pages)} pages but no text: it may be scanned, run OCR first")
    return Document(what, text.rstrip("\n"), tuple(starts))


def split_text(text: str, size: int, measure: Callable[[str], int] = len) -> list[tuple[int, int]]:
    """Cut a text into parts of at most ``size``, at paragraphs, else lines, sentences, words, or anywhere.

    Args:
        text: what to cut.
        size: largest measure of a part, >= 1.
        measure: of a part, such as its number of tokens; at least about growing with its length.

    Returns:
        (start, end) of each part, as long as they can be, in order, disjoint; between them is white space only.

    Raises:
        ValueError: ``size`` is below 1, or a single character measures more.
    """
    if size < 1:
        raise ValueError(f"size must be >= 1, got {size}")
    borders: list[Sequence[int]] = [[*(match.end() for match in kind.finditer(text)), len(text)] for kind in _BORDERS]
    borders.append(range(len(text) + 1))
    parts = []
    start = len(text) - len(text.lstrip())
    while start < len(text):
        end = _farthest(text, start, size, measure, borders)
        parts.append((start, start + len(text[start:end].rstrip())))
        start = end + len(text[end:]) - len(text[end:].lstrip())
    return parts


def _farthest(text: str, start: int, size: int, measure: Callable[[str], int], borders: Sequence[Sequence[int]]) -> int:
    """The last border of the best kind up to which the part fits."""
    for kind in borders:
        first = bisect_right(kind, start)

        def fits(place: int, kind: Sequence[int] = kind) -> bool:
            part = text[start : kind[place]].rstrip()
            return not part or measure(part) <= size

        if first >= len(kind) or not fits(first):
            continue
        low, step = first, 1
        while low + step < len(kind) and fits(low + step):  # doubling keeps what is measured near what fits
            low, step = low + step, step * 2
        high = min(low + step, len(kind))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return kind[low]
    raise ValueError(f"size must allow at least one character, but {text[start]!r} alone measures more than {size}")
