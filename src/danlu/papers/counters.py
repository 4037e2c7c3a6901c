"""Anonymous counters: how often papers were opened, each reader once a day, without keeping who.

A reader is a hash with a salt that changes every day and is thrown away after it.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from datetime import date, timedelta
from typing import Literal, get_args

import sqlalchemy as sa
from sqlalchemy import func, select

from danlu.papers import schema
from danlu.papers.store import Store, insert_into

Counted = Literal["pdf", "ask", "copy", "rel"]
COUNTED: tuple[str, ...] = get_args(Counted)
#: What counts as a star: opening the PDF or the answers.
STARS = ("pdf", "ask")


def reader_digest(store: Store, client: str, day: date) -> str:
    """The hash that stands for a reader on one day.

    Args:
        store: keeps the day's salt.
        client: anything that tells readers apart, such as address and browser; it is not stored.
        day: of the count.
    """
    return hashlib.sha256(f"{_salt(store, day)}\n{client}".encode()).hexdigest()


def count(store: Store, pk: int, kind: Counted, day: date, digest: str) -> int:
    """Count one opening, unless this reader has been counted for it today.

    Args:
        store: to write to.
        pk: key of the paper.
        kind: what was opened.
        day: today.
        digest: of `reader_digest`.

    Returns:
        The count of this paper and kind over all days, this one included.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in COUNTED:
        raise ValueError(f"kind must be one of {', '.join(COUNTED)}, got {kind!r}")
    mark = hashlib.sha256(f"{digest}\n{pk}\n{kind}".encode()).hexdigest()
    seen, held = schema.counted, schema.counter
    with store.writing() as connection:
        if not _insert_once(connection, seen, day=day, digest=mark):
            return _total(connection, pk, kind)
        if not _insert_once(connection, held, pk=pk, kind=kind, day=day, n=1):
            here = (held.c.pk == pk, held.c.kind == kind, held.c.day == day)
            connection.execute(held.update().where(*here).values(n=held.c.n + 1))
        return _total(connection, pk, kind)


def counts(store: Store, keys: Sequence[int]) -> dict[int, dict[str, int]]:
    """Counts over all days by paper and kind; papers never opened are absent."""
    held = schema.counter
    query = (
        select(held.c.pk, held.c.kind, func.sum(held.c.n)).where(held.c.pk.in_(keys)).group_by(held.c.pk, held.c.kind)
    )
    found: dict[int, dict[str, int]] = {}
    with store.reading() as connection:
        for pk, kind, total in connection.execute(query):
            found.setdefault(pk, {})[kind] = int(total)
    return found


def stars(store: Store, keys: Sequence[int]) -> dict[int, int]:
    """Stars by paper: openings of PDF or answers; papers without are absent."""
    held = schema.counter
    query = select(held.c.pk, func.sum(held.c.n)).where(held.c.pk.in_(keys), held.c.kind.in_(STARS)).group_by(held.c.pk)
    with store.reading() as connection:
        return {pk: int(total) for pk, total in connection.execute(query)}


def _salt(store: Store, day: date) -> str:
    key, meta = f"salt:{day.isoformat()}", schema.meta
    with store.reading() as connection:
        found = connection.scalar(select(meta.c.value).where(meta.c.key == key))
    if found is not None:
        return str(found)
    with store.writing() as connection:
        # Yesterday's stays for requests that began before midnight; older salts and marks go.
        old = day - timedelta(days=1)
        connection.execute(meta.delete().where(meta.c.key.like("salt:%"), meta.c.key < f"salt:{old.isoformat()}"))
        connection.execute(schema.counted.delete().where(schema.counted.c.day < old))
        _insert_once(connection, meta, key=key, value=secrets.token_hex(16))
        return str(connection.scalar(select(meta.c.value).where(meta.c.key == key)))


def _insert_once(connection: sa.Connection, table: sa.Table, **values: object) -> bool:
    """Insert a row unless its key is there; whether it was inserted."""
    statement = (
        insert_into(connection, table)
        .values(**values)
        .on_conflict_do_nothing()
        .returning(next(iter(table.primary_key)))
    )
    return connection.execute(statement).first() is not None


def _total(connection: sa.Connection, pk: int, kind: str) -> int:
    held = schema.counter
    query = select(func.coalesce(func.sum(held.c.n), 0)).where(held.c.pk == pk, held.c.kind == kind)
    return int(connection.scalar(query) or 0)
