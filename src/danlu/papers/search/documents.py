"""What an index takes from the database: papers in the order of their changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import func, select

from danlu.papers import schema
from danlu.papers.categories import ALIASES
from danlu.papers.store import Store
from danlu.papers.tokens import fold, words

_BATCH = 2000
_KEY_BITS = 32
_SECOND_NAMES = {**ALIASES, **{shown: second for second, shown in ALIASES.items()}}


@dataclass(frozen=True)
class Document:
    """A paper as it is indexed: words joined by spaces, and what restricts a search.

    Args:
        day: of the first list, or else of submission, as a proleptic ordinal; 0 where neither is known.
        categories: codes with their second names.
        venues: ``iclr`` and ``iclr.2024`` for each.
        branches: ``arxiv``, ``venue`` or both.
    """

    pk: int
    changed: int
    title: str
    abstract: str
    authors: str
    day: int
    categories: tuple[str, ...]
    venues: tuple[str, ...]
    branches: tuple[str, ...]

    @property
    def place(self) -> int:
        """A number that grows with the day and, on one day, with the key: newest first is its falling order."""
        return placed(self.day, self.pk)


def placed(day: int, pk: int = 0) -> int:
    """The place of a paper of this day; see `key_at`."""
    return day << _KEY_BITS | pk


def key_at(place: int) -> int:
    """The key of the paper at a place."""
    return place & (1 << _KEY_BITS) - 1


def latest_change(store: Store) -> int:
    """Number of the latest change in the database."""
    with store.reading() as connection:
        return int(connection.scalar(select(schema.meta.c.value).where(schema.meta.c.key == "change")) or 0)


def count_changed(store: Store, after: int) -> int:
    """Papers that have changed since a change."""
    with store.reading() as connection:
        return int(connection.scalar(select(func.count()).where(schema.paper.c.changed > after)) or 0)


def changed(store: Store, after: int) -> Iterator[list[Document]]:
    """Papers that have changed since a change, in batches, in the order of their changes."""
    table = schema.paper
    place = (after, 2**62)  # behind every paper of that change
    while True:
        later = sa.or_(table.c.changed > place[0], sa.and_(table.c.changed == place[0], table.c.pk > place[1]))
        query = select(table).where(later).order_by(table.c.changed, table.c.pk).limit(_BATCH)
        with store.reading() as connection:
            rows = connection.execute(query).mappings().all()
            venues = _venues(connection, [row["pk"] for row in rows])
        if not rows:
            return
        yield [_document(row, venues.get(row["pk"], ())) for row in rows]
        place = (rows[-1]["changed"], rows[-1]["pk"])


def venue_name(text: str) -> str:
    """Name of a venue as it is compared: letters and digits of any case, accents removed, and the signs of names."""
    return " ".join("".join(c if c.isalnum() or c in ".-/&+" else " " for c in fold(text)).split()).strip(". ")


def _venues(connection: sa.Connection, keys: list[int]) -> dict[int, tuple[str, ...]]:
    held, place = schema.venue, schema.venue_paper
    query = (
        select(place.c.pk, held.c.name, held.c.year)
        .join(held, held.c.id == place.c.venue_id)
        .where(place.c.pk.in_(keys))
    )
    found: dict[int, tuple[str, ...]] = {}
    for pk, name, year in connection.execute(query):
        folded = venue_name(name)
        found[pk] = (*found.get(pk, ()), folded, f"{folded}.{year}")
    return found


def _document(row: sa.RowMapping, venues: tuple[str, ...]) -> Document:
    codes = row["categories"].split()
    day = row["announced_on"] or (row["submitted_at"] and row["submitted_at"].date())
    branches = (("arxiv",) if row["source"] == "arxiv" else ()) + (
        ("venue",) if venues or row["source"] != "arxiv" else ()
    )
    return Document(
        row["pk"],
        row["changed"],
        " ".join(words(row["title"])),
        " ".join(words(row["abstract"])),
        " ".join(words(" ".join(row["authors"]))),
        day.toordinal() if day else 0,
        tuple(dict.fromkeys([*codes, *(_SECOND_NAMES[code] for code in codes if code in _SECOND_NAMES)])),
        tuple(dict.fromkeys(venues)),
        branches,
    )
