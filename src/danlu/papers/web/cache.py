"""Answers of the database that hold until the next change of it, kept in this process."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from danlu.papers.search.documents import latest_change
from danlu.papers.store import Store

#: Entries that are kept; the one that was not asked for longest goes first.
SIZE = 512
T = TypeVar("T")


class Cache:
    """What was read, by what was asked and by the number of the latest change: a write by any process makes it stale.

    Args:
        store: whose changes count.
        size: entries that are kept.
    """

    def __init__(self, store: Store, size: int = SIZE) -> None:
        self.store, self.size = store, size
        self._held: OrderedDict[Hashable, tuple[int, Any]] = OrderedDict()
        self._guard = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T], lasting: bool = False) -> T:
        """The value of a key, made anew where the database has changed since.

        Args:
            key: everything that the value depends on, but for the database.
            make: reads it.
            lasting: it never changes, such as a list of a snapshot.
        """
        change = 0 if lasting else latest_change(self.store)
        with self._guard:
            held = self._held.get(key)
            if held is not None and held[0] == change:
                self._held.move_to_end(key)
                return held[1]
        value = make()
        with self._guard:
            self._held[key] = (change, value)
            self._held.move_to_end(key)
            while len(self._held) > self.size:
                self._held.popitem(last=False)
        return value
