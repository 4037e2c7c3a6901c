"""Papers as they are stored, taken up for merging."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import select

from danlu.papers import schema
from danlu.papers.records import PaperRecord

TEXTS = ("title", "abstract", "comment", "doi", "journal_ref", "license")


@dataclass
class State:
    """One paper while a batch is merged: its row, its children by key, and both as they were stored."""

    row: dict[str, Any]
    stored: dict[str, Any] | None
    versions: dict[int, datetime | None] = field(default_factory=dict)
    listings: dict[tuple[Any, str], dict[str, Any]] = field(default_factory=dict)
    venues: dict[int, dict[str, Any]] = field(default_factory=dict)
    stored_versions: dict[int, datetime | None] = field(default_factory=dict)
    stored_listings: dict[tuple[Any, str], dict[str, Any]] = field(default_factory=dict)
    stored_venues: dict[int, dict[str, Any]] = field(default_factory=dict)


def load(connection: sa.Connection, records: list[PaperRecord]) -> dict[tuple[str, str], State]:
    """The stored state of every paper of the batch that is stored."""
    wanted: dict[str, list[str]] = {}
    for record in records:
        wanted.setdefault(record.paper.source, []).append(record.paper.ext_id)
    states: dict[tuple[str, str], State] = {}
    by_key: dict[int, State] = {}
    for source, ext_ids in wanted.items():
        query = select(schema.paper).where(schema.paper.c.source == source, schema.paper.c.ext_id.in_(set(ext_ids)))
        for row in connection.execute(query).mappings():
            state = State(dict(row), dict(row))
            state.row["origins"] = dict(row["origins"])
            state.row["extra"] = dict(row["extra"])
            states[source, row["ext_id"]] = by_key[row["pk"]] = state
    if by_key:
        _load_children(connection, by_key)
    return states


def _load_children(connection: sa.Connection, by_key: dict[int, State]) -> None:
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


def empty(pk: int, source: str, ext_id: str) -> dict[str, Any]:
    """The row of a paper of which nothing is known yet."""
    return {
        "pk": pk,
        "source": source,
        "ext_id": ext_id,
        "version": None,
        **dict.fromkeys(TEXTS, ""),
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
        "work": None,
        "changed": 0,
    }
