"""Search with SQLite's FTS5, in a file of its own.

The words are ours (`danlu.papers.tokens`), joined by spaces; FTS5 only splits at spaces. User text never reaches its
query language: each word is passed as a quoted string. A row's number holds the day of its paper, so that days are
ranges of rows, and the newest papers are the last rows.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import weakref
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from danlu.papers.categories import parse_expression
from danlu.papers.search import ledger
from danlu.papers.search.documents import Document, changed, count_changed, key_at, placed
from danlu.papers.search.index import Branch, Hits, Index, Progress, Sort
from danlu.papers.search.query import Days, Query, Term
from danlu.papers.store import Store

#: Of the tables below: an index of another format is left alone, and a new one is made.
FORMAT = 2
#: A word is very common if it is in more than this share of all papers, once there are this many.
COMMON_SHARE, COMMON_FLOOR = 0.05, 2_000
#: A query of very common words alone looks at this many of the newest papers.
NEWEST = 10_000
_LAST_DAY = 4_000_000

_TABLES = """
CREATE VIRTUAL TABLE doc USING fts5(title, abstract, authors, tokenize = "unicode61 remove_diacritics 0"{options});
CREATE VIRTUAL TABLE vocabulary USING fts5vocab(doc, row);
CREATE TABLE info (
    place INTEGER PRIMARY KEY, pk INTEGER NOT NULL UNIQUE, branches TEXT NOT NULL, cats TEXT NOT NULL,
    venues TEXT NOT NULL
);
"""


class _Connection(sqlite3.Connection):
    """One that can be referred to weakly: it goes with its thread."""


def contentless_options() -> str:
    """Options of a table that keeps no copy of the text, where this SQLite can delete from one."""
    with sqlite3.connect(":memory:") as probe:
        try:
            probe.execute("CREATE VIRTUAL TABLE t USING fts5(x, content='', contentless_delete=1)")
        except sqlite3.OperationalError:
            return ""
    return ", content='', contentless_delete=1"


class FTS5Index(Index):
    """An index in ``<folder>/fts5-<format>``.

    Args:
        folder: beside the database.
    """

    _gone = (sqlite3.Error,)

    def __init__(self, folder: Path) -> None:
        self._local = threading.local()
        self._all: weakref.WeakSet[_Connection] = weakref.WeakSet()
        self._guard = threading.Lock()
        super().__init__(folder / f"fts5-{FORMAT}")

    def _connection(self) -> sqlite3.Connection:
        """One connection a thread, opened again after the files have been swapped."""
        path = self.path
        held = getattr(self._local, "held", None)
        if held is not None and held[0] == path:
            return held[1]
        if held is not None:
            held[1].close()
        connection = _open(path)
        self._local.held = (path, connection)
        with self._guard:
            self._all.add(connection)
        return connection

    def close(self) -> None:
        """Close the connections of all threads."""
        with self._guard:
            for connection in self._all:
                connection.close()
            self._all.clear()
        self._local = threading.local()

    def _count(self) -> int:
        return ledger.state(self._connection(), "count")

    def _change(self) -> int:
        return ledger.state(self._connection(), "change")

    def _frozen(self, words: Sequence[str]) -> tuple[dict[str, int], int]:
        return ledger.frozen(self._connection(), words)

    def _create(self, path: Path) -> None:
        connection = _open(path, "rwc")
        try:
            connection.executescript(_TABLES.format(options=contentless_options()) + ledger.TABLES)
        finally:
            connection.close()

    def _catch_up(self, path: Path, store: Store, progress: Progress | None, whole: bool = False) -> int:
        """Batch by batch; every batch is one transaction, so that a kill loses none."""
        connection = _open(path)
        try:
            after = ledger.state(connection, "change")
            total = count_changed(store, after) if progress else 0
            done = 0
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
            ledger.note(connection, change=after)
            if ledger.is_due(connection):
                ledger.freeze(connection, connection.execute("SELECT term, doc FROM vocabulary"))
            if whole:
                connection.execute("INSERT INTO doc (doc) VALUES ('optimize')")
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            return done
        finally:
            connection.close()

    def _search(
        self, query: Query, limit: int, sort: Sort, branch: Branch | None, within: Collection[int] | None
    ) -> Hits:
        connection = self._connection()
        text, excluded, common = self._match(query, everything=within is not None)
        where, values = _restrictions(query, branch)
        restricted = bool(where) or not text
        # Papers of unknown day are in no stretch of days.
        first, last = 0, placed(_LAST_DAY)
        if query.first_day is not None or query.last_day is not None:
            first, last = _stretch((query.first_day, query.last_day))
        oldest = None
        if common and within is None:
            newest = "SELECT place FROM info WHERE place BETWEEN ? AND ? ORDER BY place DESC LIMIT 1 OFFSET ?"
            oldest = connection.execute(newest, (first, last, NEWEST)).fetchone()
            first = oldest[0] + 1 if oldest else first
        # The words lead: SQLite would otherwise ask for them once a row.
        row = "doc.rowid" if text else "info.place"
        tables = ("doc" + (" CROSS JOIN info ON info.place = doc.rowid" if restricted else "")) if text else "info"
        conditions = [f"{row} BETWEEN ? AND ?", *where]
        arguments: list[str | int] = [first, last, *values]
        if text:
            conditions.append("doc MATCH ?")
            arguments.append(text)
        if excluded and not text:
            conditions.append("info.place NOT IN (SELECT rowid FROM doc WHERE doc MATCH ?)")
            arguments.append(excluded)
        if within is not None:
            conditions.append(f"+{row} IN (SELECT place FROM info WHERE pk IN (SELECT value FROM json_each(?)))")
            arguments.append(json.dumps(sorted(within)))
        ranked = bool(text) and sort == "relevance"
        score = "bm25(doc)" if ranked else "0.0"
        statement = (
            f"SELECT {row}, {score} AS score FROM {tables} WHERE {' AND '.join(conditions)} "
            f"ORDER BY {'score, ' if ranked else ''}{row} DESC LIMIT ?"
        )
        rows = connection.execute(statement, (*arguments, limit)).fetchall()
        # FTS5 gives negative scores, the smaller the better.
        return Hits(tuple(key_at(row[0]) for row in rows), tuple(-row[1] for row in rows), oldest is not None)

    def _match(self, query: Query, everything: bool) -> tuple[str, str, bool]:
        """In FTS5's language the query and what it excludes, and whether very common words alone decide.

        Args:
            query: the query.
            everything: look for very common words too, where rarer ones stand beside them.
        """
        many = max(COMMON_FLOOR, COMMON_SHARE * self._count())
        found = self._current({term.words[0] for term in (*query.should, *query.must) if len(term.words) == 1})
        rare = {term for term in (*query.should, *query.must) if found.get(term.words[0], 0) <= many}
        deciding = query.must or query.should
        common = bool(deciding) and rare.isdisjoint(deciding)
        should = list(query.should)
        if not everything and not (common and not query.must):
            # Beside a rare word, a very common one says little about the rank and costs most of the time.
            should = [term for term in should if term in rare]
        text = " AND ".join(_quoted(term) for term in query.must)
        if should and query.must:
            # Optional words beside required ones only move the rank.
            text = f"({text}) AND ({text} OR {_any(should)})"
        elif should:
            text = f"({_any(should)})"
        excluded = _any(query.must_not)
        if text and excluded:
            text = f"({text}) NOT ({excluded})"
        return text, excluded, common

    def _current(self, terms: Collection[str]) -> dict[str, int]:
        connection = self._connection()
        query = "SELECT term, doc FROM vocabulary WHERE term = ?"
        return dict(row for term in terms for row in connection.execute(query, (term,)))


def _open(path: Path, mode: str = "rw") -> _Connection:
    """Open the file, which must be there unless the mode is ``rwc``."""
    address = f"{(path / 'search.sqlite').absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(
        address, uri=True, timeout=60, check_same_thread=False, isolation_level=None, factory=_Connection
    )
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


def _write(connection: sqlite3.Connection, documents: list[Document]) -> None:
    query = "SELECT place FROM info WHERE pk IN (SELECT value FROM json_each(?))"
    old = connection.execute(query, (json.dumps([document.pk for document in documents]),)).fetchall()
    connection.executemany("DELETE FROM doc WHERE rowid = ?", old)
    connection.executemany("DELETE FROM info WHERE place = ?", old)
    # FTS5 writes a batch at once only while the numbers of its rows grow.
    documents = sorted(documents, key=lambda document: document.place)
    rows = [(d.place, d.title, d.abstract, d.authors) for d in documents]
    connection.executemany("INSERT INTO doc (rowid, title, abstract, authors) VALUES (?, ?, ?, ?)", rows)
    infos = [(d.place, d.pk, _lines(d.branches), _lines(d.categories), _lines(d.venues)) for d in documents]
    connection.executemany("INSERT INTO info VALUES (?, ?, ?, ?, ?)", infos)
    count = ledger.state(connection, "count") + len(documents) - len(old)
    # One change may fill several batches: only a change that is known to be over is ticked off.
    ledger.note(connection, count=count, change=max(document.changed for document in documents) - 1)


def _restrictions(query: Query, branch: Branch | None) -> tuple[list[str], list[str | int]]:
    conditions: list[str] = []
    values: list[str | int] = []

    def one_of(column: str, names: Iterable[str]) -> str:
        listed = sorted(names)
        values.extend(_lines([name]) for name in listed)
        return "(" + (" OR ".join(f"instr(info.{column}, ?)" for _ in listed) or "0") + ")"

    def matching(expressions: Iterable[str]) -> str:
        alternatives = []
        for text in expressions:
            wanted, unwanted = parse_expression(text).codes()
            part = one_of("cats", wanted)
            alternatives.append(f"({part} AND NOT {one_of('cats', unwanted)})" if unwanted else part)
        return "(" + " OR ".join(alternatives) + ")"

    if branch is not None:
        conditions.append(one_of("branches", [branch]))
    if query.categories:
        conditions.append(matching(query.categories))
    if query.not_categories:
        conditions.append("NOT " + matching(query.not_categories))
    if query.venues:
        conditions.append(one_of("venues", query.venues))
    if query.not_venues:
        conditions.append("NOT " + one_of("venues", query.not_venues))
    for days in query.not_days:
        conditions.append("info.place NOT BETWEEN ? AND ?")
        values.extend(_stretch(days))
    return conditions, values


def _stretch(days: Days) -> tuple[int, int]:
    first, last = days
    return placed(first.toordinal() if first else 1), placed(last.toordinal() + 1 if last else _LAST_DAY) - 1


def _any(terms: Iterable[Term]) -> str:
    return " OR ".join(_quoted(term) for term in terms)


def _quoted(term: Term) -> str:
    """A term as a quoted phrase: our words hold letters and digits only."""
    column = "" if term.field == "any" else f"{term.field} : "
    return f'{column}"{" ".join(term.words)}"'


def _lines(names: Iterable[str]) -> str:
    """Names between line ends, which none of them contains."""
    return "".join(f"\n{name}" for name in names) + "\n"
