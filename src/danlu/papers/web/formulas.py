r"""Text with TeX mathematics in it, as HTML: formulas in elements of their own, everything else escaped once.

A formula keeps its source as text, so that a page without JavaScript shows it; a browser's translator must leave it
alone. Formulas stand between ``$``, ``$$``, ``\(`` and ``\)``, or ``\[`` and ``\]``; a dollar sign that is followed by
a space, or whose partner is followed by a digit, is money.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from markupsafe import Markup, escape

from danlu.papers.tokens import fold, words

_FORMULA = re.compile(
    r"(?P<display>\$\$(?!\s*\$)(?:[^$\\]|\\.){1,2000}?\$\$|\\\[.{1,2000}?\\\])"
    r"|(?P<inline>\\\(.{1,1000}?\\\)|(?<![\\$])\$(?![\s$])(?:[^$\\]|\\.){0,1000}?(?:[^$\\\s]|\\.)\$(?![0-9$]))",
    re.DOTALL,
)
_WORD = re.compile(r"[^\W_]+")


def pieces(text: str) -> Iterator[tuple[str, str]]:
    """A text in parts: ``text``, ``inline`` or ``display``, and the part with its delimiters."""
    place = 0
    for match in _FORMULA.finditer(text):
        if match.start() > place:
            yield "text", text[place : match.start()]
        yield match.lastgroup or "inline", match.group()
        place = match.end()
    if place < len(text):
        yield "text", text[place:]


def element(kind: str, source: str) -> Markup:
    """The element of one formula."""
    display = " display" if kind == "display" else ""
    return Markup('<span class="tex{} notranslate" translate="no">{}</span>').format(display, source)


def has_formulas(text: str) -> bool:
    """Whether a text has formulas."""
    return _FORMULA.search(text) is not None


def to_html(text: str, highlight: Collection[str] = ()) -> Markup:
    """A text as HTML.

    Args:
        text: of a title or an abstract.
        highlight: folded words to mark, as `danlu.papers.tokens.words` gives them; formulas are left alone.
    """
    return Markup("").join(
        _marked(part, highlight) if kind == "text" else element(kind, part) for kind, part in pieces(text)
    )


def _marked(text: str, highlight: Collection[str]) -> Markup:
    if not highlight:
        return escape(text)
    found, place = Markup(""), 0
    for start, end in _hits(text, highlight):
        found += escape(text[place:start]) + Markup("<mark>{}</mark>").format(text[start:end])
        place = end
    return found + escape(text[place:])


def _hits(text: str, highlight: Collection[str]) -> Iterator[tuple[int, int]]:
    """Places of the words: whole words, and pairs of characters within runs of scripts without spaces."""
    for match in _WORD.finditer(text):
        run = match.group()
        parts = words(run)
        if not any(part in highlight for part in parts):
            continue
        if len(parts) == 1 or len(fold(run)) != len(run):
            yield match.span()
            continue
        marked = [False] * len(run)
        place, folded = 0, fold(run)
        for part in parts:
            place = folded.index(part, place)
            if part in highlight:
                marked[place : place + len(part)] = [True] * len(part)
        for start, end in _runs(marked):
            yield match.start() + start, match.start() + end


def _runs(marked: list[bool]) -> Iterator[tuple[int, int]]:
    start = None
    for place, on in enumerate([*marked, False]):
        if on and start is None:
            start = place
        elif not on and start is not None:
            yield start, place
            start = None
