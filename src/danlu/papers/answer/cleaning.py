"""Text of pages made readable: ligatures, words broken at line ends, running heads, line numbers."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_BROKEN = re.compile(r"([^\W\d_])[-\u2010]\n(?=[a-z\u00df-\u00f6\u00f8-\u00ff])")
_LINE_NUMBER = re.compile(r"\s*[0-9]{1,4}\s*\Z")
#: A line that stands on more than this share of the pages, where there are enough of them, is no part of the text.
_REPEATED, _PAGES = 0.6, 4


def clean_pages(pages: Sequence[str]) -> tuple[str, tuple[int, ...]]:
    """The text of a document, and the place at which each page begins.

    Args:
        pages: as a reader gave them.
    """
    lines = [[line.rstrip() for line in _normal(page).split("\n")] for page in pages]
    heads = _running_heads(lines)
    parts: list[str] = []
    starts: list[int] = []
    place = 0
    for page in lines:
        kept = [line for line in page if _mark(line) not in heads and not _LINE_NUMBER.match(line)]
        text = _BROKEN.sub(r"\1", "\n".join(kept)).strip("\n") + "\n"
        text = re.sub(r"\n{3,}", "\n\n", text)
        starts.append(place)
        parts.append(text)
        place += len(text)
    return "".join(parts), tuple(starts)


def _normal(text: str) -> str:
    """Compatible characters made one, control characters gone, line ends alike."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # Readers give a hyphen that only breaks a line as one of these.
    text = unicodedata.normalize("NFKC", re.sub(r"[\u00ad\ufffe\x02](?=\s*\n)", "-", text))
    return "".join(character for character in text if character in "\n\t" or unicodedata.category(character)[0] != "C")


def _mark(line: str) -> str:
    """What is the same in a running head of every page: digits change with the page."""
    return re.sub(r"[0-9]+", "0", " ".join(line.split())).lower()


def _running_heads(pages: Sequence[Sequence[str]]) -> set[str]:
    if len(pages) < _PAGES:
        return set()
    seen = Counter(mark for page in pages for mark in {_mark(line) for line in page} if len(mark) > 2)
    return {mark for mark, count in seen.items() if count > _REPEATED * len(pages)}
