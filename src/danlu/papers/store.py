"""The store: opening a database, and writing what sources say so that neither order nor repetition matters."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event, select

from danlu.papers import schema
from danlu.papers.bulk import insert
from danlu.papers.merging import Merged, merge
from danlu.papers.records import PaperRecord

#: Records written in one transaction.
BATCH = 1000


@dataclass
class Written:
    """How many papers a write added, changed and found as they were."""

    added: int = 0
    changed: int = 0
    unchanged: int = 0

    def __add__(self, other: Written) -> Written:
        return Written(self.added + other.added, self.changed + other.changed, self.unchanged + other.unchanged)


class Store:
    """A database of papers.

    Args:
        url: of SQLAlchemy: ``sqlite:///FILE``, ``sqlite://`` (in memory, for tests) or ``postgresql://...``.
        migrate: bring the tables up to date first.

    Raises:
        ValueError: a database of another kind.
    """

    def __init__(self, url: str = "sqlite://", migrate: bool = True) -> None:
        self.url = sa.make_url(url)
        if self.url.drivername == "postgresql":
            self.url = self.url.set(drivername="postgresql+psycopg")
        if self.url.get_backend_name() not in ("sqlite", "postgresql"):
            raise ValueError(f"url must name SQLite or PostgreSQL, got {self.url.render_as_string()!r}")
        self.engine = _engine(self.url)
        # A database in memory has one connection, so that threads must take turns.
        self._turn: AbstractContextManager = (
            threading.RLock() if isinstance(self.engine.pool, sa.StaticPool) else nullcontext()
        )
        if migrate:
            from danlu.papers.migrations import upgrade

            upgrade(self.engine)

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that holds the right to write from its start: committed at the end, rolled back on an error."""
        with self._turn, self.engine.connect().execution_options(writes=True) as connection, connection.begin():
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection that sees one state of the database from its first query on."""
        with self._turn, self.engine.connect() as connection:
            yield connection

    def secret(self, name: str) -> str:
        """A random secret of this installation, made on first use: forms and counters are signed with it."""
        key = f"secret:{name}"
        with self.writing() as connection:
            found = connection.scalar(select(schema.meta.c.value).where(schema.meta.c.key == key))
            if found is None:
                found = secrets.token_hex(32)
                connection.execute(schema.meta.insert().values(key=key, value=found))
        return str(found)

    def upsert(self, records: Iterable[PaperRecord], batch: int = BATCH) -> Written:
        """Write what a source says about papers.

        Every field keeps the value of the best source that has one; lists, versions and venues only grow. Writing the
        same again changes no row, and the order in which sources are written does not matter.

        Args:
            records: from any source; they are consumed as they come.
            batch: records in one transaction.

        Returns:
            Counts of papers added, changed and left alone.
        """
        written = Written()
        waiting: list[PaperRecord] = []
        for record in records:
            waiting.append(record)
            if len(waiting) >= batch:
                written += self._write(waiting)
                waiting = []
        return written + self._write(waiting) if waiting else written

    def _write(self, records: list[PaperRecord]) -> Written:
        with self.writing() as connection:
            next_key, change = _counters(connection)
            result = merge(connection, records, next_key, change + 1)
            _save(connection, result)
            if result.new or result.updated:
                _set(connection, "next_pk", result.next_key)
                _set(connection, "change", change + 1)
        return Written(len(result.new), len(result.updated), result.unchanged)


def _engine(url: sa.URL) -> sa.Engine:
    if url.get_backend_name() == "postgresql":
        return sa.create_engine(url, pool_pre_ping=True)
    options: dict[str, Any] = {"connect_args": {"check_same_thread": False, "timeout": 30}}
    if url.database in (None, "", ":memory:"):
        options["poolclass"] = sa.StaticPool
    else:
        Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(url, **options)

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _: Any) -> None:
        # The driver would begin transactions by itself, and only when a statement writes.
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA busy_timeout = 30000")
        # An import writes the same pages of its indexes again and again: they reach the file less often.
        connection.execute("PRAGMA wal_autocheckpoint = 8000")
        connection.execute("PRAGMA cache_size = -32000")

    @event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        # A transaction that reads first and writes later fails at once when another has written meanwhile.
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _counters(connection: sa.Connection) -> tuple[int, int]:
    """Next free key of a paper and number of the latest change; the row is locked, so that writers take turns."""
    query = select(schema.meta.c.key, schema.meta.c.value).where(schema.meta.c.key.in_(("next_pk", "change")))
    rows = connection.execute(query.order_by(schema.meta.c.key).with_for_update())
    found = {row.key: row.value for row in rows}
    return int(found["next_pk"]), int(found["change"])


def _set(connection: sa.Connection, key: str, value: int) -> None:
    connection.execute(schema.meta.update().where(schema.meta.c.key == key).values(value=str(value)))


def _save(connection: sa.Connection, result: Merged) -> None:
    insert(connection, schema.paper, result.new)
    if result.updated:
        changes = schema.paper.update().where(schema.paper.c.pk == sa.bindparam("key"))
        columns: dict[str, Any] = {name: sa.bindparam(name) for name in result.updated[0] if name != "key"}
        connection.execute(changes.values(columns), result.updated)
    for table, rows in result.children.items():
        insert(connection, table, rows)
    for table, rows in result.changed_children.items():
        if rows:
            keys = [column.name for column in table.primary_key]
            statement = table.update().where(*(table.c[name] == sa.bindparam(f"key_{name}") for name in keys))
            connection.execute(
                statement.values({name: sa.bindparam(name) for name in rows[0] if not name.startswith("key_")}), rows
            )
    for table, gone in ((schema.paper_cat, result.gone_cats), (schema.listing, result.gone_listings)):
        if gone:
            keys = [column.name for column in table.primary_key]
            where = [table.c[name] == sa.bindparam(f"key_{name}") for name in keys]
            connection.execute(table.delete().where(*where), gone)


def insert_into(connection: sa.Connection, table: sa.Table) -> Any:
    """An insert of the database's own kind, which may say what happens where the key is taken."""
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects import postgresql

        return postgresql.insert(table)
    from sqlalchemy.dialects import sqlite

    return sqlite.insert(table)
