"""Daily lists of arXiv, as RSS 2.0 or Atom: the first source of what is new today.

The day of a list is the date of its mailing in the feed's own offset. An empty feed is a day without mailing, and says
nothing about earlier days.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime
from functools import cached_property
from xml.etree.ElementTree import Element

from danlu.papers.categories import members, shown, split_codes
from danlu.papers.ids import ARXIV, PaperId, parse_arxiv
from danlu.papers.records import Kind, Listing, PaperRecord
from danlu.papers.sources.latex import doi, originals, plain
from danlu.papers.sources.moments import mail_date
from danlu.papers.sources.xml import BadDocument, parse_xml, text_of

_ATOM = "{http://www.w3.org/2005/Atom}"
_ARXIV = "{http://arxiv.org/schemas/atom}"
_DC = "{http://purl.org/dc/elements/1.1/}"
_TYPES: dict[str, Kind] = {"new": "new", "cross": "cross", "replace": "replace", "replace-cross": "replace"}
_DESCRIPTION = re.compile(r"\s*arXiv:\s*(\S+)\s+Announce Type:\s*([a-z-]+)\s+(?:Abstract:\s*)?(.*)", re.DOTALL)


@dataclass(frozen=True)
class Feed:
    """A daily list.

    Args:
        day: of the mailing; None where the list is empty.
        records: in the order of the source.
        skipped: entries that could not be read.
    """

    day: date | None
    records: tuple[PaperRecord, ...]
    skipped: int = 0


@dataclass(frozen=True)
class _Wanted:
    """What a feed is the list of: names, and the codes under them."""

    names: tuple[str, ...]

    @cached_property
    def codes(self) -> frozenset[str]:
        return frozenset().union(*(members(name) for name in self.names))


def feed_url(names: Iterable[str]) -> str:
    """Address of the list of some archives or categories."""
    return "https://rss.arxiv.org/atom/" + "+".join(names)


def parse_feed(body: bytes, names: Iterable[str]) -> Feed:
    """Read a daily list of either kind.

    Args:
        body: as fetched.
        names: archives or categories that it is the list of: a paper is listed in those of its categories under them.

    Returns:
        The list.

    Raises:
        BadDocument: not a feed.
    """
    root = parse_xml(body, "a feed of arXiv")
    wanted = _Wanted(tuple(names))
    if root.tag == "rss" and root.find("channel") is not None:
        items, read = root.findall("./channel/item"), _rss_item
    elif root.tag == f"{_ATOM}feed":
        items, read = root.findall(f"{_ATOM}entry"), _atom_entry
    else:
        raise BadDocument(f"expected a feed of arXiv, got an element {root.tag[:60]!r}")
    records: list[PaperRecord] = []
    skipped = 0
    for position, item in enumerate(items):
        try:
            records.append(read(item, position, wanted))
        except (ValueError, KeyError):
            skipped += 1
    days = [place.announced_on for record in records for place in record.listings]
    if items and not records:
        raise BadDocument(f"none of the {len(items)} entries of the feed can be read")
    return Feed(max(days, default=None), tuple(records), skipped)


def _rss_item(item: Element, position: int, wanted: _Wanted) -> PaperRecord:
    moment = mail_date(text_of(item.find("pubDate")))
    return _record(
        item, position, wanted, moment, text_of(item.find("guid")), item.findtext("description") or "",
        [text_of(each) for each in item.findall("category")],
    )  # fmt: skip


def _atom_entry(item: Element, position: int, wanted: _Wanted) -> PaperRecord:
    moment = datetime.fromisoformat(text_of(item.find(f"{_ATOM}published")))
    return _record(
        item, position, wanted, moment, text_of(item.find(f"{_ATOM}id")), item.findtext(f"{_ATOM}summary") or "",
        [each.get("term", "") for each in item.findall(f"{_ATOM}category")],
    )  # fmt: skip


def _record(
    item: Element,
    position: int,
    wanted: _Wanted,
    moment: datetime,
    guid: str,
    description: str,
    terms: list[str],
) -> PaperRecord:
    found = parse_arxiv(guid.rpartition(":")[2])
    match = _DESCRIPTION.match(description)
    kind_text = text_of(item.find(f"{_ARXIV}announce_type")) or (match.group(2) if match else "")
    kind = _TYPES[kind_text]
    categories, codes = split_codes(terms)
    # The calendar date in the feed's own offset: in another zone it may be a day off.
    day = moment.date()
    # The categories of a paper's cross-lists were announced on their own days, so a cross is one for this list alone.
    # What stands in a list belongs to it, even if its categories do not say so.
    listed = [category for category in categories if category in wanted.codes] or [wanted.names[0]]
    title = text_of(item.find("title")) or text_of(item.find(f"{_ATOM}title"))
    return PaperRecord(
        PaperId(ARXIV, found.identifier),
        "rss",
        title=plain(title),
        abstract=plain(match.group(3) if match else description),
        authors=split_names(text_of(item.find(f"{_DC}creator"))),
        authors_provisional=True,
        categories=categories,
        codes=codes,
        doi=doi(text_of(item.find(f"{_ARXIV}DOI"))),
        journal_ref=plain(text_of(item.find(f"{_ARXIV}journal_reference"))),
        license=text_of(item.find(f"{_DC}rights")),
        version=found.version,
        listings=tuple(Listing(day, code, _kind(kind, code, categories, listed), position) for code in listed),
        extra=originals(title=title),
    )


def _kind(kind: Kind, code: str, categories: tuple[str, ...], listed: list[str]) -> Kind:
    """Kind of a place in one category's list: a paper is new in that of its first category, and crossed into others."""
    if kind != "new":
        return kind
    primary = shown(categories[:1])
    own = [each for each in listed if shown([each]) == primary]
    return "new" if code in (own or listed[:1]) else "cross"


def split_names(text: str) -> tuple[str, ...]:
    """Names of authors written as one string: commas part them, but a suffix such as Jr. belongs to the name."""
    names: list[str] = []
    for part in plain(text).split(", "):
        part = part.strip(" ,")
        if names and re.fullmatch(r"Jr\.?|Sr\.?|I{2,3}|IV|Ph\.?D\.?|M\.?D\.?", part):
            names[-1] = f"{names[-1]}, {part}"
        elif part:
            names.append(part)
    return tuple(names)
