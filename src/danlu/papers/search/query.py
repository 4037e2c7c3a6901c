"""Reading what a reader types into the search box. Nothing that can be typed is an error.

``words`` are optional and ranked, ``+word`` must be there, ``-word`` must not, ``"a phrase"`` stands together, and
``ti:`` ``au:`` ``cat:`` ``date:`` ``venue:`` look in one field, or with ``-`` before them exclude. What cannot be
understood is read as words.
"""

from __future__ import annotations

import re
from calendar import monthrange
from dataclasses import dataclass, field
from datetime import date
from typing import Literal

from danlu.papers.categories import InvalidExpression, parse_expression
from danlu.papers.search.documents import venue_name
from danlu.papers.tokens import QUERY_WORDS, words

Field = Literal["any", "title", "authors"]
Days = tuple[date | None, date | None]
_TEXT_FIELDS: dict[str, Field] = {"ti": "title", "au": "authors"}
_PART = re.compile(r'([+-]?)(?:(ti|au|cat|date|venue):)?(?:"([^"]*)"|(\S+))', re.IGNORECASE)
_DAY = re.compile(r"([0-9]{4})(?:-([0-9]{1,2})(?:-([0-9]{1,2}))?)?\Z")


@dataclass(frozen=True)
class Term:
    """Words that stand together: one word, or a phrase."""

    words: tuple[str, ...]
    field: Field = "any"


@dataclass(frozen=True)
class Query:
    """A search.

    Args:
        should: terms that raise the rank; at least one must match unless ``must`` has any.
        must: terms that have to be there.
        must_not: terms that may not.
        categories: subject expressions, one of which must match.
        venues: names of venues such as ``iclr`` or ``iclr.2024``, one of which must match, in lower case.
        first_day: earliest day.
        last_day: latest day.
        not_categories: subject expressions, none of which may match.
        not_venues: names of venues, none of which may match.
        not_days: first and last day (None: without end) of stretches in which a paper may not be.
    """

    should: tuple[Term, ...] = ()
    must: tuple[Term, ...] = ()
    must_not: tuple[Term, ...] = ()
    categories: tuple[str, ...] = ()
    venues: tuple[str, ...] = ()
    first_day: date | None = None
    last_day: date | None = None
    not_categories: tuple[str, ...] = ()
    not_venues: tuple[str, ...] = ()
    not_days: tuple[Days, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether it asks for nothing: what it excludes alone is no request."""
        wanted = (self.should, self.must, self.categories, self.venues)
        return not any(wanted) and self.first_day is None and self.last_day is None

    def highlighted(self) -> tuple[str, ...]:
        """The words to mark in a result."""
        return tuple(dict.fromkeys(word for term in (*self.should, *self.must) for word in term.words))


@dataclass
class _Reading:
    should: list[Term] = field(default_factory=list)
    must: list[Term] = field(default_factory=list)
    must_not: list[Term] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    venues: list[str] = field(default_factory=list)
    days: list[Days] = field(default_factory=list)
    not_categories: list[str] = field(default_factory=list)
    not_venues: list[str] = field(default_factory=list)
    not_days: list[Days] = field(default_factory=list)
    left: int = QUERY_WORDS


def parse_query(text: str) -> Query:
    """Read a query; any text gives one.

    Args:
        text: what was typed; at most 32 words and restrictions of it are used.

    Returns:
        The query.
    """
    reading = _Reading()
    for match in _PART.finditer(text[:2000]):
        sign, name, phrase, bare = match.groups()
        value = phrase if phrase is not None else bare
        if reading.left > 0 and not _restricts(reading, sign == "-", (name or "").lower(), value):
            _add_words(reading, sign, (name or "").lower(), value, phrase is not None)
    first = [start for start, _ in reading.days if start is not None]
    last = [end for _, end in reading.days if end is not None]
    return Query(
        tuple(dict.fromkeys(reading.should)),
        tuple(dict.fromkeys(reading.must)),
        tuple(dict.fromkeys(reading.must_not)),
        tuple(reading.categories),
        tuple(reading.venues),
        max(first, default=None),
        min(last, default=None),
        tuple(reading.not_categories),
        tuple(reading.not_venues),
        tuple(reading.not_days),
    )


def query_of(terms: list[str]) -> Query:
    """A query of any of these words, as they are."""
    return Query(should=tuple(Term((word,)) for word in terms[:QUERY_WORDS]))


def _restricts(reading: _Reading, excluding: bool, name: str, value: str) -> bool:
    """Note a restriction; False where the value is none, so that it is read as words."""
    if name == "cat":
        try:
            text = str(parse_expression(value))
        except InvalidExpression:
            return False
        (reading.not_categories if excluding else reading.categories).append(text)
    elif name == "venue":
        folded = venue_name(value)
        if not folded:
            return False
        (reading.not_venues if excluding else reading.venues).append(folded)
    elif name == "date":
        start, dots, end = value.partition("..")
        first = _days(start)
        last = _days(end) if dots else first
        if first is None and last is None:
            return False
        days = (first[0] if first else None, last[1] if last else None)
        (reading.not_days if excluding else reading.days).append(days)
    else:
        return False
    reading.left -= 1
    return True


def _days(text: str) -> tuple[date, date] | None:
    """First and last day of ``2024``, ``2024-05`` or ``2024-05-17``."""
    match = _DAY.match(text)
    if not match:
        return None
    year, month, day = (int(part) if part else None for part in match.groups())
    try:
        if day:
            return date(year or 0, month or 0, day), date(year or 0, month or 0, day)
        if month:
            return date(year or 0, month, 1), date(year or 0, month, monthrange(year or 0, month)[1])
        return date(year or 0, 1, 1), date(year or 0, 12, 31)
    except ValueError:
        return None


def _add_words(reading: _Reading, sign: str, name: str, value: str, phrase: bool) -> None:
    target = {"+": reading.must, "-": reading.must_not}.get(sign, reading.must if phrase else reading.should)
    where = _TEXT_FIELDS.get(name, "any")
    if name and name not in _TEXT_FIELDS:
        value = f"{name} {value}"
    found = words(value)[: reading.left]
    reading.left -= len(found)
    if not found:
        return
    # Parts of state-of-the-art rank apart; a run of Chinese, or what was asked for by a sign, stands as it was typed.
    together = phrase or sign != "" or where != "any" or not value.isascii()
    target.extend([Term(tuple(found), where)] if together else [Term((word,), where) for word in found])
