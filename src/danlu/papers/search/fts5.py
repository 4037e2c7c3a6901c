"""Search with SQLite's FTS5, in a file of its own.

The words are ours (`danlu.papers.tokens`), joined by spaces; FTS5 only splits at spaces. User text never reaches its
query language: each word is passed as a quoted string.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from danlu.papers.categories import parse_expression
from danlu.papers.search.documents import Document, changed, count_changed
from danlu.papers.search.index import Branch, Hits, Index, Progress, Sort
from danlu.papers.search.query import Query, Term
from danlu.papers.store import Store

FORMAT = 1
#: A word is very common if it is in more than this share of all papers, once there are this many.
COMMON_SHARE, COMMON_FLOOR = 0.05, 2_000
#: A query of very common words alone looks at this many of the newest papers.
NEWEST = 20_000
#: Frequencies are frozen again when the index has grown by this factor.
REFREEZE = 1.25

_TABLES = """
CREATE VIRTUAL TABLE doc USING fts5(title, abstract, authors, tokenize = "unicode61 remove_diacritics 0"{options});
CREATE VIRTUAL TABLE vocabulary USING fts5vocab(doc, row);
CREATE TABLE info (
    pk INTEGER PRIMARY KEY, day INTEGER NOT NULL, branches TEXT NOT NULL, cats TEXT NOT NULL, venues TEXT NOT NULL
);
CREATE INDEX info_day ON info (day);
CREATE TABLE frequency (term TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE state (key TEXT PRIMARY KEY, value INTEGER NOT NULL);
INSERT INTO state VALUES ('format', {format}), ('change', 0), ('frozen', 0), ('count', 0);
"""


def contentless_options() -> str:
    """Options of a table that keeps no copy of the text, where this SQLite can delete from one."""
    with sqlite3.connect(":memory:") as probe:
        try:
            probe.execute("CREATE VIRTUAL TABLE t USING fts5(x, content='', contentless_delete=1)")
        except sqlite3.OperationalError:
            return ""
    return ", content='', contentless_delete=1"


class FTS5Index(Index):
    """An index in ``<folder>/search.sqlite``.

    Args:
        folder: beside the database.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "search.sqlite"
        self._local = threading.local()
        self._all: list[sqlite3.Connection] = []
        self._guard = threading.Lock()
        with self._guard:
            if not self.path.exists():
                _create(self.path)
        found = self._state("format")
        if found != FORMAT:
            raise ValueError(f"{self.path} has format {found}, this version reads {FORMAT}: delete it and reindex")

    def _connection(self) -> sqlite3.Connection:
        """One connection a thread, opened again after the file has been swapped."""
        mark = os.stat(self.path).st_ino
        held = getattr(self._local, "held", None)
        if held is not None and held[0] == mark:
            return held[1]
        connection = _open(self.path)
        self._local.held = (mark, connection)
        with self._guard:
            self._all.append(connection)
        return connection

    def close(self) -> None:
        """Close the connections of all threads."""
        with self._guard:
            for connection in self._all:
                connection.close()
            self._all.clear()
        self._local = threading.local()

    def count(self) -> int:
        """Papers in the index."""
        return self._state("count")

    def update(self, store: Store, progress: Progress | None = None) -> int:
        """Catch up with the database; how many papers were read."""
        connection = _open(self.path)
        try:
            return _catch_up(connection, store, progress)
        finally:
            connection.close()

    def rebuild(self, store: Store, progress: Progress | None = None) -> int:
        """Build a new file and put it in the place of the old one."""
        fresh = self.path.with_suffix(".new")
        for leftover in (fresh, Path(f"{fresh}-wal"), Path(f"{fresh}-shm")):
            leftover.unlink(missing_ok=True)
        _create(fresh)
        connection = _open(fresh)
        try:
            count = _catch_up(connection, store, progress)
            connection.execute("INSERT INTO doc (doc) VALUES ('optimize')")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            connection.close()
        for name in ("-wal", "-shm"):
            Path(f"{self.path}{name}").unlink(missing_ok=True)
        os.replace(fresh, self.path)
        return count

    def _search(
        self, query: Query, limit: int, sort: Sort, branch: Branch | None, within: Collection[int] | None
    ) -> Hits:
        connection = self._connection()
        text, common = self._match(query)
        conditions: list[str] = []
        values: list[str | int] = []
        partial = False
        if text:
            conditions.append("doc MATCH ?")
            values.append(text)
        where, more = _restrictions(query, branch)
        conditions += where
        values += more
        if within is not None:
            conditions.append("info.pk IN (SELECT value FROM json_each(?))")
            values.append(json.dumps(sorted(within)))
        elif common:
            oldest = connection.execute(
                "SELECT pk FROM info ORDER BY day DESC, pk DESC LIMIT 1 OFFSET ?", (NEWEST,)
            ).fetchone()
            if oldest is not None:
                lowest = connection.execute("SELECT day FROM info WHERE pk = ?", oldest).fetchone()[0]
                conditions.append("info.day > ?")
                values.append(lowest)
                partial = True
        score = "bm25(doc)" if text else "0.0"
        order = "info.day DESC, info.pk DESC" if sort == "date" or not text else f"{score}, info.day DESC, info.pk DESC"
        tables = "doc JOIN info ON info.pk = doc.rowid" if text else "info"
        statement = (
            f"SELECT info.pk, {score} FROM {tables} WHERE {' AND '.join(conditions) or '1'} ORDER BY {order} LIMIT ?"
        )
        rows = connection.execute(statement, (*values, limit)).fetchall()
        # FTS5 gives negative scores, the smaller the better.
        return Hits(tuple(row[0] for row in rows), tuple(-row[1] for row in rows), partial)

    def _match(self, query: Query) -> tuple[str, bool]:
        """The query in FTS5's language, and whether it has very common words only."""
        count = self.count()
        many = max(COMMON_FLOOR, COMMON_SHARE * count)
        single = [term for term in query.should if len(term.words) == 1]
        found = self._current([term.words[0] for term in single])
        rare = [term for term in query.should if len(term.words) > 1 or found.get(term.words[0], 0) <= many]
        common = bool(query.should) and not rare and not query.must
        # Beside a rare word, a very common one says little about the rank and costs most of the time.
        should = rare or query.should
        if query.must and len(rare) < len(query.should):
            should = tuple(rare)
        parts = [_quoted(term) for term in query.must]
        if should and not query.must:
            parts.append("(" + " OR ".join(_quoted(term) for term in should) + ")")
        text = " AND ".join(parts)
        if should and query.must:
            # Optional words beside required ones only move the rank.
            text = f"({text}) AND ({text} OR {' OR '.join(_quoted(term) for term in should)})"
        if text and query.must_not:
            text = f"({text}) NOT ({' OR '.join(_quoted(term) for term in query.must_not)})"
        return text, common

    def _current(self, terms: Sequence[str]) -> dict[str, int]:
        connection = self._connection()
        query = "SELECT term, doc FROM vocabulary WHERE term = ?"
        return dict(row for term in terms for row in connection.execute(query, (term,)))

    def _frozen(self, words: Sequence[str]) -> tuple[dict[str, int], int]:
        query = "SELECT term, n FROM frequency WHERE term IN (SELECT value FROM json_each(?))"
        return dict(self._connection().execute(query, (json.dumps(list(words)),))), self._state("frozen")

    def _state(self, key: str) -> int:
        return int(self._connection().execute("SELECT value FROM state WHERE key = ?", (key,)).fetchone()[0])


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


def _create(path: Path) -> None:
    connection = _open(path)
    try:
        connection.executescript(
            "BEGIN IMMEDIATE;" + _TABLES.format(options=contentless_options(), format=FORMAT) + "COMMIT;"
        )
    except sqlite3.OperationalError as error:
        # Another process was first.
        if "already exists" not in str(error):
            raise
    finally:
        connection.close()


def _catch_up(connection: sqlite3.Connection, store: Store, progress: Progress | None) -> int:
    """Read what has changed, batch by batch; every batch is one transaction, so that a kill loses none."""
    done = 0
    after = connection.execute("SELECT value FROM state WHERE key = 'change'").fetchone()[0]
    total = count_changed(store, after) if progress else 0
    for documents in changed(store, after):
        connection.execute("BEGIN IMMEDIATE")
        try:
            _write(connection, documents)
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        done += len(documents)
        after = documents[-1].changed
        if progress:
            progress(done, max(total, done))
    if done:
        connection.execute("UPDATE state SET value = ? WHERE key = 'change'", (after,))
    _freeze(connection)
    return done


def _write(connection: sqlite3.Connection, documents: list[Document]) -> None:
    keys = [(document.pk,) for document in documents]
    connection.executemany("DELETE FROM doc WHERE rowid = ?", _known(connection, keys))
    rows = [(d.pk, d.title, d.abstract, d.authors) for d in documents]
    connection.executemany("INSERT INTO doc (rowid, title, abstract, authors) VALUES (?, ?, ?, ?)", rows)
    infos = [(d.pk, d.day, _spaced(d.branches), _spaced(d.categories), _spaced(d.venues)) for d in documents]
    connection.executemany("INSERT OR REPLACE INTO info VALUES (?, ?, ?, ?, ?)", infos)
    known = connection.execute("SELECT count(*) FROM info").fetchone()[0]
    # One change may fill several batches: only a change that is known to be over is ticked off.
    connection.execute("UPDATE state SET value = ? WHERE key = 'change'", (documents[-1].changed - 1,))
    connection.execute("UPDATE state SET value = ? WHERE key = 'count'", (known,))


def _known(connection: sqlite3.Connection, keys: list[tuple[int]]) -> list[tuple[int]]:
    query = "SELECT pk FROM info WHERE pk IN (SELECT value FROM json_each(?))"
    return connection.execute(query, (json.dumps([key for (key,) in keys]),)).fetchall()


def _freeze(connection: sqlite3.Connection) -> None:
    """Take the frequencies of words as they are, if the index is new or has grown much."""
    state = dict(connection.execute("SELECT key, value FROM state"))
    if not state["count"] or state["count"] < REFREEZE * state["frozen"]:
        return
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("DELETE FROM frequency")
    connection.execute("INSERT INTO frequency SELECT term, doc FROM vocabulary")
    connection.execute("UPDATE state SET value = ? WHERE key = 'frozen'", (state["count"],))
    connection.execute("COMMIT")


def _restrictions(query: Query, branch: Branch | None) -> tuple[list[str], list[str | int]]:
    conditions: list[str] = []
    values: list[str | int] = []

    def one_of(column: str, names: Iterable[str]) -> str:
        listed = list(names)
        values.extend(f"% {name} %" for name in listed)
        return "(" + (" OR ".join(f"info.{column} LIKE ?" for _ in listed) or "0") + ")"

    if branch is not None:
        conditions.append(one_of("branches", [branch]))
    if query.categories:
        alternatives = []
        for text in query.categories:
            wanted, unwanted = parse_expression(text).codes()
            part = one_of("cats", sorted(wanted))
            alternatives.append(f"({part} AND NOT {one_of('cats', sorted(unwanted))})" if unwanted else part)
        conditions.append("(" + " OR ".join(alternatives) + ")")
    if query.venues:
        conditions.append(one_of("venues", query.venues))
    if query.first_day is not None:
        conditions.append("info.day >= ?")
        values.append(query.first_day.toordinal())
    if query.last_day is not None:
        conditions.append("info.day BETWEEN 1 AND ?")
        values.append(query.last_day.toordinal())
    return conditions, values


def _quoted(term: Term) -> str:
    """A term as a quoted phrase: our words hold letters and digits only."""
    column = "" if term.field == "any" else f"{term.field} : "
    return f'{column}"{" ".join(term.words)}"'


def _spaced(names: Iterable[str]) -> str:
    return "".join(f" {name}" for name in names) + " "
