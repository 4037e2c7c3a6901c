"""Reading: papers by identifier, daily lists of a subject expression, venues."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date

import sqlalchemy as sa
from sqlalchemy import func, select

from danlu.papers import schema
from danlu.papers.categories import Expression
from danlu.papers.ids import PaperId
from danlu.papers.records import VenuePlace
from danlu.papers.rows import Entry, Paper, PaperList
from danlu.papers.store import Store

#: Kinds of entries that a daily list shows: a replacement updates a paper and does not announce it.
ANNOUNCED = ("new", "cross")
_ORDER = {"new": 0, "cross": 1}


@dataclass(frozen=True)
class Venue:
    """A venue of one year: how many papers it has in the store, by group."""

    name: str
    year: int
    groups: dict[str, int]

    @property
    def slug(self) -> str:
        """``NAME.YEAR``, as in addresses."""
        return f"{self.name}.{self.year}"

    @property
    def count(self) -> int:
        """Papers in the store."""
        return sum(self.groups.values())


def papers(store: Store, keys: Sequence[int]) -> list[Paper]:
    """The papers of these keys, in this order; keys that are gone are left out."""
    if not keys:
        return []
    place, held = schema.venue_paper, schema.venue
    with store.reading() as connection:
        rows = {
            row["pk"]: row
            for row in connection.execute(select(schema.paper).where(schema.paper.c.pk.in_(keys))).mappings()
        }
        joined = select(place.c.pk, held.c.name, held.c.year, place.c.grp, place.c.pos).join(
            held, held.c.id == place.c.venue_id
        )
        venues: dict[int, list[VenuePlace]] = {}
        for row in connection.execute(joined.where(place.c.pk.in_(keys)).order_by(held.c.year, held.c.name)):
            venues.setdefault(row.pk, []).append(VenuePlace(row.name, row.year, row.grp, row.pos))
    return [_paper(rows[key], tuple(venues.get(key, ()))) for key in keys if key in rows]


def find(store: Store, wanted: Iterable[PaperId]) -> dict[PaperId, int]:
    """Keys of stored papers by identifier; those that are not stored are absent. Versions do not matter."""
    asked = list(wanted)
    by_source: dict[str, dict[str, list[PaperId]]] = {}
    for paper in asked:
        by_source.setdefault(paper.source, {}).setdefault(paper.ext_id, []).append(paper)
    found: dict[PaperId, int] = {}
    table = schema.paper
    with store.reading() as connection:
        for source, ext_ids in by_source.items():
            query = select(table.c.pk, table.c.ext_id).where(table.c.source == source, table.c.ext_id.in_(ext_ids))
            for row in connection.execute(query):
                found.update(dict.fromkeys(ext_ids[row.ext_id], row.pk))
    return {paper: found[paper] for paper in asked if paper in found}


def versions(store: Store, key: int) -> list[int]:
    """The versions known of a paper, in order."""
    table = schema.paper_version
    with store.reading() as connection:
        return list(connection.scalars(select(table.c.v).where(table.c.pk == key).order_by(table.c.v)))


def days(store: Store, expression: Expression, limit: int = 30, before: date | None = None) -> list[tuple[date, int]]:
    """The latest days on which a subject was announced, newest first, with the number of papers.

    Args:
        store: to read.
        expression: of subjects.
        limit: how many days.
        before: only days before this one.
    """
    table = schema.listing
    query = select(table.c.announced_on, func.count(table.c.pk.distinct())).where(*_announced(expression))
    if before is not None:
        query = query.where(table.c.announced_on < before)
    query = query.group_by(table.c.announced_on).order_by(table.c.announced_on.desc()).limit(limit)
    with store.reading() as connection:
        return [(row[0], row[1]) for row in connection.execute(query)]


def latest_day(store: Store, expression: Expression, not_after: date | None = None) -> date | None:
    """The latest day on which a subject was announced, or None."""
    table = schema.listing
    query = select(func.max(table.c.announced_on)).where(*_announced(expression))
    if not_after is not None:
        query = query.where(table.c.announced_on <= not_after)
    with store.reading() as connection:
        return connection.scalar(query)


def day_list(store: Store, expression: Expression, day: date, snapshot: int | None = None) -> PaperList:
    """The list of a day in the source's own order; what came later stands at its end.

    Args:
        store: to read.
        expression: of subjects.
        day: of the mailing.
        snapshot: of a list read before, to get the same again.

    Returns:
        Every entry of the day, and its snapshot.
    """
    table = schema.listing
    query = (
        select(table.c.pk, table.c.kind, table.c.late, table.c.pos, schema.paper.c.ext_id)
        .join(schema.paper, schema.paper.c.pk == table.c.pk)
        .where(table.c.announced_on == day, *_announced(expression))
    )
    if snapshot is not None:
        query = query.where(table.c.seq <= snapshot)
    with store.reading() as connection:
        rows = connection.execute(query).all()
        if snapshot is None:
            snapshot = int(connection.scalar(select(schema.meta.c.value).where(schema.meta.c.key == "change")) or 0)
    best: dict[int, tuple[bool, bool, int, str, str]] = {}
    for row in rows:
        place = (row.late, row.pos is None, row.pos or 0, row.ext_id, row.kind)
        held = best.get(row.pk)
        if held is None:
            best[row.pk] = place
        else:
            kind = min(held[4], row.kind, key=_ORDER.__getitem__)
            best[row.pk] = (*min(held, place)[:4], kind)
    ordered = sorted(best.items(), key=lambda item: item[1][:4])
    return PaperList(tuple(Entry(pk, place[4], place[0]) for pk, place in ordered), snapshot, day)


def venues(store: Store) -> list[Venue]:
    """Every venue, newest year first, by name within a year."""
    held, place = schema.venue, schema.venue_paper
    query = (
        select(held.c.name, held.c.year, place.c.grp, func.count(place.c.pk))
        .join(place, place.c.venue_id == held.c.id, isouter=True)
        .group_by(held.c.name, held.c.year, place.c.grp)
        .order_by(held.c.year.desc(), held.c.name, place.c.grp)
    )
    found: dict[tuple[str, int], Venue] = {}
    with store.reading() as connection:
        for name, year, group, count in connection.execute(query):
            venue = found.setdefault((name, year), Venue(name, year, {}))
            if count:
                venue.groups[group] = count
    return list(found.values())


def venue_list(store: Store, name: str, year: int, group: str | None = None) -> PaperList | None:
    """The papers of a venue in its own order, of one group or of all; None where there is no such venue."""
    held, place = schema.venue, schema.venue_paper
    with store.reading() as connection:
        key = connection.scalar(select(held.c.id).where(held.c.name == name, held.c.year == year))
        if key is None:
            return None
        query = (
            select(place.c.pk, place.c.grp)
            .join(schema.paper, schema.paper.c.pk == place.c.pk)
            .where(place.c.venue_id == key)
            .order_by(place.c.pos, schema.paper.c.ext_id)
        )
        if group is not None:
            query = query.where(place.c.grp == group)
        return PaperList(tuple(Entry(row.pk, group=row.grp) for row in connection.execute(query)))


def _announced(expression: Expression) -> list[sa.ColumnElement[bool]]:
    """That an entry announces a paper in one of the wanted categories, and the paper is in none of the unwanted."""
    table, cats = schema.listing, schema.paper_cat
    wanted, unwanted = expression.codes()
    conditions: list[sa.ColumnElement[bool]] = [table.c.cat.in_(sorted(wanted)), table.c.kind.in_(ANNOUNCED)]
    if unwanted:
        excluded = select(cats.c.pk).where(cats.c.pk == table.c.pk, cats.c.cat.in_(sorted(unwanted)))
        conditions.append(~excluded.exists())
    return conditions


def _paper(row: sa.RowMapping, venues: tuple[VenuePlace, ...]) -> Paper:
    return Paper(
        pk=row["pk"],
        paper=_identifier(row["source"], row["ext_id"]),
        title=row["title"],
        abstract=row["abstract"],
        authors=tuple(row["authors"]),
        authors_provisional=row["authors_provisional"],
        categories=tuple(row["categories"].split()),
        version=row["version"],
        comment=row["comment"],
        doi=row["doi"],
        journal_ref=row["journal_ref"],
        license=row["license"],
        submitted_at=row["submitted_at"],
        updated_at=row["updated_at"],
        announced_on=row["announced_on"],
        withdrawn=row["withdrawn"],
        changed=row["changed"],
        extra=dict(row["extra"]),
        venues=venues,
    )


def _identifier(source: str, ext_id: str) -> PaperId:
    identifier, _, volume = ext_id.partition("@")
    return PaperId(source, identifier, volume or None)
