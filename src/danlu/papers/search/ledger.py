"""What an index notes beside its words: its place in the database, and frequencies of words, frozen for keywords."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence

#: Frequencies are frozen again when the index has grown by this factor.
REFREEZE = 1.25

TABLES = """
CREATE TABLE frequency (term TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE state (key TEXT PRIMARY KEY, value INTEGER NOT NULL);
INSERT INTO state VALUES ('change', 0), ('frozen', 0), ('count', 0);
"""


def state(connection: sqlite3.Connection, key: str) -> int:
    """``change`` (everything up to it is indexed), ``count`` (of papers) or ``frozen`` (papers at the last freeze)."""
    return int(connection.execute("SELECT value FROM state WHERE key = ?", (key,)).fetchone()[0])


def note(connection: sqlite3.Connection, **values: int) -> None:
    """Set values of the state."""
    connection.executemany("UPDATE state SET value = ? WHERE key = ?", [(n, key) for key, n in values.items()])


def frozen(connection: sqlite3.Connection, words: Sequence[str]) -> tuple[dict[str, int], int]:
    """In how many papers each word was at the last freeze, and of how many."""
    query = "SELECT term, n FROM frequency WHERE term IN (SELECT value FROM json_each(?))"
    return dict(connection.execute(query, (json.dumps(list(words)),))), state(connection, "frozen")


def is_due(connection: sqlite3.Connection) -> bool:
    """Whether the index is new, or has grown so much that frequencies have to be taken again."""
    count = state(connection, "count")
    return count > 0 and count >= REFREEZE * state(connection, "frozen")


def freeze(connection: sqlite3.Connection, frequencies: Iterable[tuple[str, int]]) -> None:
    """Keep these frequencies until the next freeze."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute("DELETE FROM frequency")
        connection.executemany("INSERT INTO frequency VALUES (?, ?)", frequencies)
        note(connection, frozen=state(connection, "count"))
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
