"""Linking records of different sources that seem to be one work. They are never merged: a link may be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import select

from danlu.papers import schema
from danlu.papers.store import Store

Reason = Literal["doi", "title"]
#: Changes that are looked through in one transaction: each of them is a batch of papers.
_CHANGES = 20
_MARK = "linked"


@dataclass(frozen=True)
class Link:
    """Another record of what seems to be the same work, and why it seems so."""

    other: int
    reason: Reason


def link(store: Store) -> int:
    """Link the papers that are new or changed since the last call: by DOI, else by title and first author.

    Returns:
        Links found, those that were known before included.
    """
    found = 0
    while (more := _link_some(store)) is not None:
        found += more
    return found


def links(store: Store, keys: Sequence[int]) -> dict[int, list[Link]]:
    """Links of stored papers, by their keys; papers without any are absent."""
    table = schema.duplicate
    found: dict[int, list[Link]] = {}
    with store.reading() as connection:
        for here, there in ((table.c.pk, table.c.other), (table.c.other, table.c.pk)):
            query = select(here, there, table.c.reason).where(here.in_(keys))
            for key, other, reason in connection.execute(query):
                found.setdefault(key, []).append(Link(other, reason))
    return {key: sorted(each, key=lambda link: link.other) for key, each in found.items()}


def _link_some(store: Store) -> int | None:
    """Look through some changes; None where there are none left."""
    table, meta = schema.duplicate, schema.meta
    with store.writing() as connection:
        # The row of the counter is locked, so that processes take turns.
        query = select(meta.c.value).where(meta.c.key == "change").with_for_update()
        latest = int(connection.scalar(query) or 0)
        mark = connection.scalar(select(meta.c.value).where(meta.c.key == _MARK))
        done = int(mark or 0)
        if done >= latest:
            return None
        until = min(done + _CHANGES, latest)
        changed = select(schema.paper.c.pk).where(schema.paper.c.changed > done, schema.paper.c.changed <= until)
        connection.execute(table.delete().where(table.c.pk.in_(changed) | table.c.other.in_(changed)))
        pairs: dict[tuple[int, int], str] = {}
        for reason, name in (("title", "work"), ("doi", "doi")):
            for one, other in connection.execute(_pairs(name, done, until)):
                pairs[min(one, other), max(one, other)] = reason
        if pairs:
            rows = [{"pk": pk, "other": other, "reason": reason} for (pk, other), reason in sorted(pairs.items())]
            connection.execute(table.insert(), rows)
        if mark is None:
            connection.execute(meta.insert().values(key=_MARK, value=str(until)))
        else:
            connection.execute(meta.update().where(meta.c.key == _MARK).values(value=str(until)))
        return len(pairs)


def _pairs(name: str, after: int, until: int) -> sa.Select[Any]:
    """Keys of changed papers, and of papers of other sources that are equal in a column."""
    one, other = schema.paper.alias("one"), schema.paper.alias("other")
    filled = one.c[name] != "" if name == "doi" else one.c[name].is_not(None)
    return (
        select(one.c.pk, other.c.pk)
        .join(other, sa.and_(one.c[name] == other.c[name], one.c.source != other.c.source))
        .where(one.c.changed > after, one.c.changed <= until, filled)
    )
