"""What a store holds, without the numbers that only say when it was written."""

from __future__ import annotations

import hashlib
import json

import sqlalchemy as sa

from danlu.papers import schema

TABLES = (schema.paper, schema.paper_version, schema.paper_cat, schema.listing, schema.venue_paper, schema.duplicate)
HIDDEN = {"pk", "other", "changed", "seq", "added_at", "id", "venue_id"}


def contents(store):
    """Rows of every table of papers; keys are replaced by identifiers."""
    found = {}
    with store.reading() as connection:
        rows = connection.execute(sa.select(schema.paper.c.pk, schema.paper.c.source, schema.paper.c.ext_id))
        names = {row.pk: f"{row.ext_id}@{row.source}" for row in rows}
        venues = {row.id: f"{row.name}.{row.year}" for row in connection.execute(sa.select(schema.venue))}
        for table in TABLES:
            kept = []
            for row in connection.execute(sa.select(table)).mappings():
                values = {name: value for name, value in row.items() if name not in HIDDEN}
                values["pk"] = sorted([names[row["pk"]], names.get(row.get("other"), "")])
                values["venue_id"] = venues.get(row.get("venue_id"))
                kept.append(json.dumps(values, sort_keys=True, default=str))
            found[table.name] = sorted(kept)
    return found


def digest(store):
    """A hash of `contents`."""
    return hashlib.sha256(json.dumps(contents(store)).encode()).hexdigest()
