"""What sources hand to the store: papers, where and when they were announced, and where they were published."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Literal

from danlu.papers.ids import PaperId

Kind = Literal["new", "cross", "replace"]

#: Sources of metadata from worst to best: a field is kept from the best that has it.
RANKS = {"rss": 1, "bibtex": 1, "generic": 1, "sample": 1, "kaggle": 2, "venue": 2, "api": 3, "oai": 3}

#: Most versions that a paper may have.
VERSIONS = 9999


@dataclass(frozen=True)
class Listing:
    """One line of a daily list.

    Args:
        announced_on: the date of the mailing, as the feed itself dates it, never the date of submission.
        category: of the list.
        kind: new here, crossed from another category, or a replacement.
        position: in the source's own order, from 0; None where the source has no order.
        late: it came after the list was first shown.
        approximate: the date was inferred, because the source of the record does not say.
    """

    announced_on: date
    category: str
    kind: Kind = "new"
    position: int | None = 0
    late: bool = False
    approximate: bool = False


@dataclass(frozen=True)
class VenuePlace:
    """Where a paper was published: ``NAME.YEAR`` with its group (Oral, Poster, ...) and place in it."""

    name: str
    year: int
    group: str = ""
    position: int = 0


@dataclass(frozen=True)
class PaperRecord:
    """What one source says about one paper. Empty text and None mean that it does not say.

    Args:
        paper: the canonical identifier, without version.
        origin: the kind of source, a key of `RANKS`.
        title: plain text with TeX mathematics between dollars, accents as Unicode.
        abstract: likewise.
        authors: full names in order.
        authors_provisional: the names were split from one string and may be split wrongly.
        categories: codes of the vocabulary, the primary one first.
        codes: ACM and MSC codes.
        version: the latest version that the source knows.
        versions: when each version was submitted, in UTC.
        submitted_at: when version 1 was, in UTC.
        updated_at: when the latest was, in UTC.
        withdrawn: the source has deleted it.
        listings: daily lists that it stood in.
        venues: where it was published.
        extra: anything else that an importer wants to keep, by name.
    """

    paper: PaperId
    origin: str
    title: str = ""
    abstract: str = ""
    authors: tuple[str, ...] = ()
    authors_provisional: bool = False
    categories: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    comment: str = ""
    doi: str = ""
    journal_ref: str = ""
    license: str = ""
    version: int | None = None
    versions: tuple[tuple[int, datetime], ...] = ()
    submitted_at: datetime | None = None
    updated_at: datetime | None = None
    withdrawn: bool = False
    listings: tuple[Listing, ...] = ()
    venues: tuple[VenuePlace, ...] = ()
    extra: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.origin not in RANKS:
            raise ValueError(f"origin must be one of {', '.join(RANKS)}, got {self.origin!r}")
        for name in ("submitted_at", "updated_at"):
            value = getattr(self, name)
            if value is not None and value.tzinfo is None:
                raise ValueError(f"{name} must carry its time zone, got {value.isoformat()}")
        if self.version is not None and not 1 <= self.version <= VERSIONS:
            raise ValueError(f"version must be in 1..{VERSIONS}, got {self.version}")
        if self.paper.version is not None:
            object.__setattr__(self, "paper", self.paper._replace(version=None))


def utc(value: datetime) -> datetime:
    """A time with zone, in UTC and without fractions of a second."""
    return value.astimezone(UTC).replace(microsecond=0)
