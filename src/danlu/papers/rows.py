"""What the store gives back: one paper as pages show it, and ordered lists of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date, datetime

from danlu.papers import ids
from danlu.papers.ids import PaperId
from danlu.papers.records import VenuePlace


@dataclass(frozen=True)
class Paper:
    """A stored paper.

    Args:
        pk: its key in this store.
        paper: its canonical identifier.
        version: the latest version known, or None.
        categories: raw codes, the primary one first; `danlu.papers.categories.shown` gives those for readers.
        announced_on: the date of its first list, or None.
        venues: where it was published.
        changed: number of its latest change: it grows with every change in the store.
    """

    pk: int
    paper: PaperId
    title: str
    abstract: str
    authors: tuple[str, ...]
    authors_provisional: bool
    categories: tuple[str, ...]
    version: int | None
    comment: str
    doi: str
    journal_ref: str
    license: str
    submitted_at: datetime | None
    updated_at: datetime | None
    announced_on: date | None
    withdrawn: bool
    changed: int
    extra: dict[str, str] = field(default_factory=dict)
    venues: tuple[VenuePlace, ...] = ()

    @property
    def abs_url(self) -> str | None:
        """Address of its page at the source."""
        return self.extra.get("abs_url") or ids.abs_url(self.paper)

    @property
    def pdf_url(self) -> str | None:
        """Address of its PDF at the source, or None."""
        return self.extra.get("pdf_url") or ids.pdf_url(self.paper)


@dataclass(frozen=True)
class Entry:
    """A place in a list: which paper, how it came there, and whether it came after the list was first shown."""

    pk: int
    kind: str = ""
    late: bool = False
    group: str = ""


@dataclass(frozen=True)
class PaperList:
    """An ordered list of papers, by key.

    Args:
        entries: every place of the list in order.
        snapshot: pass it back to get this very list again although more has arrived meanwhile.
        day: of a daily list.
    """

    entries: tuple[Entry, ...]
    snapshot: int = 0
    day: date | None = None
