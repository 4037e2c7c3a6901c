"""Merging what several sources say about a paper, field by field, whatever order they come in."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import select

from danlu.papers import schema
from danlu.papers.records import RANKS, Listing, PaperRecord, VenuePlace, utc
from danlu.papers.states import TEXTS, State, empty, load
from danlu.papers.works import fingerprint

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
    gone_listings: Rows = field(default_factory=list)
    next_key: int = 0


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
    states = load(connection, records)
    venue_ids = _venue_ids(connection, records)
    result = Merged(next_key=next_key)
    for record in records:
        key = (record.paper.source, record.paper.ext_id)
        state = states.get(key)
        if state is None:
            state = states[key] = State(empty(result.next_key, *key), None)
            result.next_key += 1
        _apply(state, record, venue_ids)
    for state in states.values():
        _collect(state, result, change)
    return result


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


def _apply(state: State, record: PaperRecord, venue_ids: dict[tuple[str, int], int]) -> None:
    """Merge one record into a state: every field is the greatest of (rank of the source, version, value)."""
    row = state.row
    # Names split from one string lose against names that the same source gave apart.
    rank = float(RANKS[record.origin])
    claim = [rank, record.version or 0]
    names_claim = [rank - 0.5, claim[1]] if record.authors_provisional else claim
    origins = row["origins"]
    for name in TEXTS:
        value = getattr(record, name)
        if value and (name not in origins or _wins(row, name, claim, value)):
            row[name], origins[name] = value, claim
    if record.authors and _wins(row, "authors", names_claim, record.authors):
        row["authors"], row["authors_provisional"] = list(record.authors), record.authors_provisional
        origins["authors"] = names_claim
    if record.categories and _wins(row, "categories", claim, " ".join(record.categories)):
        row["categories"], row["codes"] = " ".join(record.categories), " ".join(record.codes)
        origins["categories"] = claim
    for name in ("submitted_at", "updated_at"):
        moment = getattr(record, name)
        if moment is not None:
            moment = _naive(moment)
            if _wins(row, name, claim, moment):
                row[name], origins[name] = moment, claim
    for name, value in record.extra.items():
        if value and _wins(row, f"extra.{name}", claim, value):
            row["extra"][name], origins[f"extra.{name}"] = value, claim
    row["withdrawn"] = row["withdrawn"] or record.withdrawn
    for number, created in record.versions:
        known = state.versions.get(number)
        moment = _naive(created)
        state.versions[number] = moment if known is None else min(known, moment)
    if record.version is not None:
        state.versions.setdefault(record.version, None)
    row["version"] = max(state.versions, default=None)
    for venue in record.venues:
        _publish(state, venue, venue_ids[venue.name, venue.year])
    if record.listings:
        for place in record.listings:
            _list(state, place)
        _settle(state)
        dated = [
            (entry["approximate"], day) for (day, _), entry in state.listings.items() if entry["kind"] != "replace"
        ]
        row["announced_on"] = min(dated)[1] if dated else None


def _naive(moment: datetime) -> datetime:
    """A time as the tables keep it: in UTC, without zone and fractions of a second."""
    return moment.astimezone(UTC).replace(tzinfo=None, microsecond=0)


def _wins(row: dict[str, Any], name: str, claim: list[float], value: Any) -> bool:
    """Whether a value takes the place of the one that is there."""
    held = row["origins"].get(name)
    if held is None or held < claim:
        return True
    if held > claim:
        return False
    there = row["extra"][name[6:]] if name.startswith("extra.") else row[name]
    return list(value) > there if name == "authors" else value > there


def _list(state: State, place: Listing) -> None:
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
    if entry["approximate"] and not place.approximate:
        entry.update(kind=place.kind, pos=place.position, late=place.late, approximate=False)
    elif entry["approximate"] == place.approximate:
        entry["kind"] = min(entry["kind"], place.kind, key=_KINDS.__getitem__)
        positions = [value for value in (entry["pos"], place.position) if value is not None]
        entry["pos"] = min(positions) if positions else None
        entry["late"] = entry["late"] and place.late


def _settle(state: State) -> None:
    """Give guessed places the day of the first list that is known, one a category and none where one is known."""
    guessed = [key for key, entry in state.listings.items() if entry["approximate"]]
    if not guessed:
        return
    known = [key for key, entry in state.listings.items() if not entry["approximate"] and entry["kind"] != "replace"]
    day = min(known)[0] if known else min(guessed)[0]
    covered = {cat for _, cat in known}
    for key in guessed:
        if key[1] in covered or key[0] != day:
            entry = state.listings.pop(key)
            if key[1] not in covered:
                _list(state, Listing(day, key[1], entry["kind"], entry["pos"], entry["late"], approximate=True))


def _publish(state: State, place: VenuePlace, venue_id: int) -> None:
    entry = state.venues.setdefault(
        venue_id, {"venue_id": venue_id, "pk": state.row["pk"], "grp": place.group, "pos": place.position}
    )
    if (entry["grp"] == "", entry["pos"], entry["grp"]) > (place.group == "", place.position, place.group):
        entry["grp"], entry["pos"] = place.group, place.position


def _collect(state: State, result: Merged, change: int) -> None:
    """Sort a state into rows that are new, changed or as they were."""
    if state.stored is None:
        _collect_new(state, result, change)
        return
    pk = state.row["pk"]
    touched = state.row != state.stored
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
    for day, cat in state.stored_listings.keys() - state.listings.keys():
        result.gone_listings.append({"key_announced_on": day, "key_cat": cat, "key_pk": pk})
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
    stored = set(state.stored["categories"].split())
    inserted.setdefault(schema.paper_cat, []).extend({"cat": cat, "pk": pk} for cat in sorted(own - stored))
    result.gone_cats.extend({"key_cat": cat, "key_pk": pk} for cat in sorted(stored - own))
    row = state.row
    row["changed"] = change
    if any(row[name] != state.stored[name] for name in ("title", "authors")):
        row["work"] = fingerprint(row["title"], row["authors"])
    result.updated.append({"key": pk, **{name: value for name, value in row.items() if name != "pk"}})


def _collect_new(state: State, result: Merged, change: int) -> None:
    """Rows of a paper that is not stored."""
    row, pk = state.row, state.row["pk"]
    row["changed"], row["work"] = change, fingerprint(row["title"], row["authors"])
    result.new.append(row)
    added = {
        schema.paper_version: [{"pk": pk, "v": v, "created_at": created} for v, created in state.versions.items()],
        schema.listing: [{**entry, "seq": change} for entry in state.listings.values()],
        schema.venue_paper: list(state.venues.values()),
        schema.paper_cat: [{"cat": cat, "pk": pk} for cat in sorted(set(row["categories"].split()))],
    }
    for table, rows in added.items():
        if rows:
            result.children.setdefault(table, []).extend(rows)
