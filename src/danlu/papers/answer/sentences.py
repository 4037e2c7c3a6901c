"""Sentences of a paper, with their places in its text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from danlu.papers.answer.sections import RUN_IN
from danlu.papers.answer.types import PaperText, Section
from danlu.papers.tokens import words

_END = re.compile(r"[.!?](?:[\"'”’)\]]*)(?=\s+[\"'“‘(\[]?[A-Z0-9$]|\s*\Z)|[。！？](?=.)|[。！？]\Z|\n\s*\n", re.DOTALL)
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|cf|etc|vs|resp|al|Fig|Figs|Eq|Eqs|Sec|Secs|Tab|Thm|Ref|Refs|No|Dr|Prof|Mr|Ms|St|approx|w\.r\.t)|\b[A-Z])\.\Z"
)
_MIN_WORDS, _MAX_CHARACTERS = 5, 600


@dataclass(frozen=True)
class Sentence:
    """A sentence: ``text[start:end]`` of the paper, its section and its words."""

    start: int
    end: int
    section: Section
    words: tuple[str, ...]


def sentences(paper: PaperText, roles: frozenset[str] | None = None) -> list[Sentence]:
    """The sentences of a paper in order, without headings, captions' remains and lists of references.

    Args:
        paper: to be read.
        roles: only of sections that play one of these parts.
    """
    found = []
    for section in paper.sections:
        if (
            section.role in ("references", "acknowledgements")
            or (section.title == "Front" and section.role != "abstract")
            or (roles is not None and section.role not in roles)
        ):
            continue
        for start, end in _spans(paper.text, *_body(paper.text, section)):
            own = words(paper.text[start:end])
            if len(own) >= _MIN_WORDS and end - start <= _MAX_CHARACTERS and _reads(paper.text[start:end]):
                found.append(Sentence(start, end, section, tuple(own)))
    return found


def _body(text: str, section: Section) -> tuple[int, int]:
    """A section without its heading, be that a line of its own or the word that its first sentence follows."""
    start = section.start
    line_end = text.find("\n", start, section.end)
    first = text[start : line_end if line_end >= 0 else section.end].strip()
    if line_end >= 0 and first == section.title:
        return line_end + 1, section.end
    run_in = RUN_IN.match(text, start, section.end)
    return (run_in.end() if run_in else start), section.end


def _spans(text: str, start: int, end: int) -> list[tuple[int, int]]:
    spans = []
    place = start
    for match in _END.finditer(text, start, end):
        # Only the end is looked at: a text full of initials would otherwise be read once for each of them.
        if match.group() == "." and _ABBREVIATION.search(text, max(place, match.start() - 12), match.end()):
            continue
        spans.append((place, match.end()))
        place = match.end()
    spans.append((place, end))
    return [trimmed for first, last in spans if (trimmed := _trim(text, first, last)) is not None]


def _trim(text: str, start: int, end: int) -> tuple[int, int] | None:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return (start, end) if start < end else None


def _reads(text: str) -> bool:
    """Whether it is prose: mostly letters, which tables and broken formulas are not."""
    dense = text.replace(" ", "").replace("\n", "")
    return sum(character.isalpha() for character in dense) >= 0.6 * len(dense)
