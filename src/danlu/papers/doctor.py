"""Looking at an installation: what works, what does not, and what to do about it."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from danlu.papers import schema
from danlu.papers.jobs import Queue
from danlu.papers.search import open_index
from danlu.papers.search.documents import count_changed
from danlu.papers.settings import Settings
from danlu.papers.store import Store

_OPTIONAL = {"psycopg": "PostgreSQL", "tantivy": "search over millions of papers", "pypdfium2": "faster text of PDFs"}
_LEAST_DISK = 2**30
_SILENT = timedelta(hours=26)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: ``ok``, ``note`` or ``bad``, and what to do."""

    state: Literal["ok", "note", "bad"]
    about: str
    text: str


def examine(settings: Settings) -> Iterator[Finding]:
    """Look at everything that a site rests on.

    Args:
        settings: of the site.

    Yields:
        Findings in the order in which things depend on each other.
    """
    for package, purpose in _OPTIONAL.items():
        there = importlib.util.find_spec(package) is not None
        yield Finding(
            "ok" if there else "note",
            package,
            purpose if there else f'not installed: {purpose} (pip install "danlu[papers-scale]")',
        )
    yield Finding("ok", "SQLite", sqlite3.sqlite_version)
    folder = settings.data
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    yield Finding("ok" if free > _LEAST_DISK else "bad", "disk", f"{free / 2**30:.1f} GiB free at {folder}")
    try:
        store = Store(settings.database_url)
    except (SQLAlchemyError, OSError, ImportError, ValueError) as error:
        yield Finding("bad", "database", f"cannot be opened: {str(error).splitlines()[0]}")
        return
    try:
        yield from _stored(store, settings)
    finally:
        store.close()


def _stored(store: Store, settings: Settings) -> Iterator[Finding]:
    with store.reading() as connection:
        count = connection.scalar(select(func.count()).select_from(schema.paper)) or 0
        polls = connection.execute(select(schema.poll).where(schema.poll.c.source != "snapshot")).mappings().all()
    yield Finding("ok" if count else "note", "database", f"{count} papers in {store.url.render_as_string()}")
    yield from _indexed(store, settings.data / "search", settings)
    if not settings.follow:
        yield Finding("note", "polling", "off: give follow and contact to keep subjects up to date")
    now = datetime.now(UTC).replace(tzinfo=None)
    for row in polls:
        name = f"{row['source']} {row['key']}".strip()
        late = row["last_ok"] is None or (now - row["last_ok"] > _SILENT and now.weekday() < 5)
        text = f"last success {row['last_ok'] or 'never'}" + (f"; {row['error']}" if row["error"] else "")
        yield Finding("bad" if late and settings.follow else "ok", name, text)
    depth = Queue(store).depth()
    for kind, states in sorted(depth.items()):
        text = ", ".join(f"{n} {state}" for state, n in sorted(states.items()))
        yield Finding("note" if states.get("failed") else "ok", f"jobs: {kind}", text)
    engine = settings.engine
    yield Finding("ok", "engine", engine.kind + (f" ({engine.model})" if engine.model else ""))


def _indexed(store: Store, folder: Path, settings: Settings) -> Iterator[Finding]:
    try:
        index = open_index(folder, settings.search)
        with contextlib.closing(index):
            behind = count_changed(store, 0) - index.count()
    except (ValueError, ImportError, sqlite3.Error, OSError) as error:
        yield Finding("bad", "search index", f"{error}: danlu papers reindex builds it again")
        return
    yield Finding("ok" if behind <= 0 else "note", "search index", f"{settings.search}, {max(behind, 0)} papers behind")
