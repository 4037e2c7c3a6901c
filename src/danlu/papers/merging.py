"""Merging what several sources say about a paper, field by field, whatever order they come in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import select

from danlu.papers import schema
from danlu.papers.records import RANKS, Listing, PaperRecord, VenuePlace, utc

_TEXTS = ("title", "abstract", "comment", "doi", "journal_ref", "license")
_KINDS = {"new": 0, "cross": 1, "replace": 2}
Rows = list[dict[str, Any]]


@dataclass
class Merged:
    """Rows to insert and to update, made from a batch of records and the tables as they are."""

    new: Rows = field(default_factory=list)
    updated: Rows = field(default_factory=list)
    unchanged: int = 0
    children: dict[sa.Table, Rows] = field(default_factory=dict)
    changed_children: dict[sa.Table, Rows] = field(default_factory=dict)
    gone_cats: Rows = field(default_factory=list)
    next_key: int = 0


@dataclass
class _State:
    """One paper while a batch is merged: its row, its children by key, and both as they were stored."""

    row: dict[str, Any]
    stored: dict[str, Any] | None
    versions: dict[int, datetime | None] = field(default_factory=dict)
    listings: dict[tuple[Any, str], dict[str, Any]] = field(default_factory=dict)
    venues: dict[int, dict[str, Any]] = field(default_factory=dict)
    stored_versions: dict[int, datetime | None] = field(default_factory=dict)
    stored_listings: dict[tuple[Any, str], dict[str, Any]] = field(default_factory=dict)
    stored_venues: dict[int, dict[str, Any]] = field(default_factory=dict)


def merge(connection: sa.Connection, records: list[PaperRecord], next_key: int, change: int) -> Merged:
    """Work out what a batch of records changes.

    Args:
        connection: inside a writing transaction.
        records: the batch; a paper may stand in it more than once.
        next_key: first free key.
        change: number that changed rows get.

    Returns:
        The rows to write; nothing is written here but new venues.
    """
    states = _load(connection, records)
    venue_ids = _venue_ids(connection, records)
    result = Merged(next_key=next_key)
    for record in records:
        key = (record.paper.source, record.paper.ext_id)
        state = states.get(key)
        if state is None:
            state = states[key] = _State(_empty(result.next_key, *key), None)
            result.next_key += 1
        _apply(state, record, venue_ids)
    for state in states.values():
        _collect(state, result, change)
    return result


def _load(connection: sa.Connection, records: list[PaperRecord]) -> dict[tuple[str, str], _State]:
    """The stored state of every paper of the batch that is stored."""
    wanted: dict[str, list[str]] = {}
    for record in records:
        wanted.setdefault(record.paper.source, []).append(record.paper.ext_id)
    states: dict[tuple[str, str], _State] = {}
    by_key: dict[int, _State] = {}
    for source, ext_ids in wanted.items():
        query = select(schema.paper).where(schema.paper.c.source == source, schema.paper.c.ext_id.in_(set(ext_ids)))
        for row in connection.execute(query).mappings():
            state = _State(dict(row), dict(row))
            state.row["origins"] = dict(row["origins"])
            state.row["extra"] = dict(row["extra"])
            states[source, row["ext_id"]] = by_key[row["pk"]] = state
    if by_key:
        _load_children(connection, by_key)
    return states


def _load_children(connection: sa.Connection, by_key: dict[int, _State]) -> None:
    def rows(table: sa.Table) -> Iterable[Any]:
        return connection.execute(select(table).where(table.c.pk.in_(by_key))).mappings()

    for row in rows(schema.paper_version):
        state = by_key[row["pk"]]
        state.versions[row["v"]] = state.stored_versions[row["v"]] = row["created_at"]
    for row in rows(schema.listing):
        state, place = by_key[row["pk"]], (row["announced_on"], row["cat"])
        state.listings[place], state.stored_listings[place] = dict(row), dict(row)
    for row in rows(schema.venue_paper):
        state = by_key[row["pk"]]
        state.venues[row["venue_id"]], state.stored_venues[row["venue_id"]] = dict(row), dict(row)


def _venue_ids(connection: sa.Connection, records: list[PaperRecord]) -> dict[tuple[str, int], int]:
    """Keys of the venues of a batch; those that are new are written."""
    wanted = {(place.name, place.year) for record in records for place in record.venues}
    if not wanted:
        return {}
    table = schema.venue
    names = {name for name, _ in wanted}
    query = select(table.c.id, table.c.name, table.c.year).where(table.c.name.in_(names))
    found = {(row.name, row.year): row.id for row in connection.execute(query)}
    now = utc(datetime.now().astimezone()).replace(tzinfo=None)
    for name, year in sorted(wanted - found.keys()):
        inserted = connection.execute(table.insert().values(name=name, year=year, added_at=now))
        found[name, year] = int(inserted.inserted_primary_key[0])  # type: ignore[index]
    return found


def _empty(pk: int, source: str, ext_id: str) -> dict[str, Any]:
    return {
        "pk": pk,
        "source": source,
        "ext_id": ext_id,
        "version": None,
        **dict.fromkeys(_TEXTS, ""),
        "authors": [],
        "authors_provisional": False,
        "categories": "",
        "codes": "",
        "submitted_at": None,
        "updated_at": None,
        "announced_on": None,
        "withdrawn": False,
        "extra": {},
        "origins": {},
        "changed": 0,
    }


def _apply(state: _State, record: PaperRecord, venue_ids: dict[tuple[str, int], int]) -> None:
    """Merge one record into a state: every field is the greatest of (rank of the source, version, value)."""
    row, rank, version = state.row, float(RANKS[record.origin]), record.version or 0
    for name in _TEXTS:
        value = getattr(record, name)
        if value and _wins(row, name, rank, version, value):
            row[name] = value
    if record.authors:
        # Names split from one string lose against names that the same source gave apart.
        own_rank = rank - 0.5 if record.authors_provisional else rank
        if _wins(row, "authors", own_rank, version, "\n".join(record.authors)):
            row["authors"], row["authors_provisional"] = list(record.authors), record.authors_provisional
    if record.categories and _wins(row, "categories", rank, version, " ".join(record.categories)):
        row["categories"], row["codes"] = " ".join(record.categories), " ".join(record.codes)
    for name in ("submitted_at", "updated_at"):
        moment = getattr(record, name)
        if moment is not None:
            moment = utc(moment).replace(tzinfo=None)
            if _wins(row, name, rank, version, moment.isoformat()):
                row[name] = moment
    for name, value in record.extra.items():
        if value and _wins(row, f"extra.{name}", rank, version, value):
            row["extra"][name] = value
    row["withdrawn"] = row["withdrawn"] or record.withdrawn
    for number, created in record.versions:
        known = state.versions.get(number)
        moment = utc(created).replace(tzinfo=None)
        state.versions[number] = moment if known is None else min(known, moment)
    if record.version is not None:
        state.versions.setdefault(record.version, None)
    row["version"] = max(state.versions, default=None)
    for place in record.listings:
        _list(state, place)
    for venue in record.venues:
        _publish(state, venue, venue_ids[venue.name, venue.year])
    dated = [(entry["approximate"], day) for (day, _), entry in state.listings.items() if entry["kind"] != "replace"]
    row["announced_on"] = min(dated)[1] if dated else None


def _wins(row: dict[str, Any], name: str, rank: float, version: int, value: str) -> bool:
    """Whether a value takes the place of the one that is there; if so, its rank is noted."""
    held = row["origins"].get(name)
    claim = [rank, version, value]
    if held is not None and held[:2] >= claim[:2]:
        if held[:2] > claim[:2] or _text(row, name) >= value:
            return False
    row["origins"][name] = claim[:2]
    return True


def _text(row: dict[str, Any], name: str) -> str:
    """The value that a row holds, as it is compared."""
    value = row["extra"][name[6:]] if name.startswith("extra.") else row[name]
    if isinstance(value, list):
        return "\n".join(value)
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _list(state: _State, place: Listing) -> None:
    key = (place.announced_on, place.category)
    entry = state.listings.get(key)
    if entry is None:
        state.listings[key] = {
            "announced_on": place.announced_on,
            "cat": place.category,
            "pk": state.row["pk"],
            "kind": place.kind,
            "pos": place.position,
            "late": place.late,
            "approximate": place.approximate,
        }
        return
    entry["kind"] = min(entry["kind"], place.kind, key=_KINDS.__getitem__)
    positions = [value for value in (entry["pos"], place.position) if value is not None]
    entry["pos"] = min(positions) if positions else None
    entry["late"] = entry["late"] and place.late
    entry["approximate"] = entry["approximate"] and place.approximate


def _publish(state: _State, place: VenuePlace, venue_id: int) -> None:
    entry = state.venues.setdefault(
        venue_id, {"venue_id": venue_id, "pk": state.row["pk"], "grp": place.group, "pos": place.position}
    )
    if (entry["grp"] == "", entry["pos"], entry["grp"]) > (place.group == "", place.position, place.group):
        entry["grp"], entry["pos"] = place.group, place.position


def _collect(state: _State, result: Merged, change: int) -> None:
    """Sort a state into rows that are new, changed or as they were."""
    pk = state.row["pk"]
    touched = state.stored is None or state.row != state.stored
    inserted, changed = result.children, result.changed_children
    for number, created in state.versions.items():
        if number not in state.stored_versions:
            inserted.setdefault(schema.paper_version, []).append({"pk": pk, "v": number, "created_at": created})
        elif created != state.stored_versions[number]:
            changed.setdefault(schema.paper_version, []).append({"key_pk": pk, "key_v": number, "created_at": created})
        else:
            continue
        touched = True
    for (day, cat), entry in state.listings.items():
        before = state.stored_listings.get((day, cat))
        if before is None:
            inserted.setdefault(schema.listing, []).append({**entry, "seq": change})
        elif entry != before:
            values = {name: entry[name] for name in ("kind", "pos", "late", "approximate")}
            keys = {"key_announced_on": day, "key_cat": cat, "key_pk": pk}
            changed.setdefault(schema.listing, []).append({**keys, **values})
        else:
            continue
        touched = True
    for venue_id, entry in state.venues.items():
        before = state.stored_venues.get(venue_id)
        if before is None:
            inserted.setdefault(schema.venue_paper, []).append(entry)
        elif entry != before:
            values = {"grp": entry["grp"], "pos": entry["pos"]}
            changed.setdefault(schema.venue_paper, []).append({"key_venue_id": venue_id, "key_pk": pk, **values})
        else:
            continue
        touched = True
    if not touched:
        result.unchanged += 1
        return
    own = set(state.row["categories"].split())
    stored = set(state.stored["categories"].split()) if state.stored else set()
    inserted.setdefault(schema.paper_cat, []).extend({"cat": cat, "pk": pk} for cat in sorted(own - stored))
    result.gone_cats.extend({"key_cat": cat, "key_pk": pk} for cat in sorted(stored - own))
    state.row["changed"] = change
    if state.stored is None:
        result.new.append(state.row)
    else:
        result.updated.append({"key": pk, **{name: value for name, value in state.row.items() if name != "pk"}})
