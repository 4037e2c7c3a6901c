"""One pace for each host, over all processes: a row in the database says who may ask next, and when.

A permit is held until the body has been read, so that there is never a second request under way, and the starts of two
requests are at least an interval apart. Waiting callers are served by priority, then in the order they came. The same
row counts failures in a row: after five the host is left alone for fifteen minutes, then one request may try.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import sqlalchemy as sa
from sqlalchemy import select

from danlu.papers.net.errors import CircuitOpen
from danlu.papers.schema import gate as table
from danlu.papers.schema import gate_queue as tickets
from danlu.papers.store import Store, insert_into

#: A permit of a process that has died is free again after this time: longer than any request may take.
LEASE = 150.0
#: A waiting caller that has not looked for this long has died.
TICKET = 30.0
FAILURES, COOL_DOWN = 5, 900.0


class RateGate:
    """The gate of one host.

    Args:
        store: whose database is shared by all processes.
        host: a name for the pace: hosts that count together share one.
        interval: seconds between the starts of two requests, at least 0.
        clock: gives the time in seconds since the epoch; it is compared between processes.
    """

    def __init__(self, store: Store, host: str, interval: float = 3.0, clock: Callable[[], float] = time.time) -> None:
        if interval < 0:
            raise ValueError(f"interval must be at least 0 seconds, got {interval}")
        self.store, self.host, self.interval, self.clock = store, host, interval, clock

    @asynccontextmanager
    async def permit(self, prio: int = 1) -> AsyncIterator[float]:
        """Wait for the turn, and hold it.

        Args:
            prio: 0 comes first.

        Yields:
            The time of the start.

        Raises:
            CircuitOpen: the host is left alone after failures; ``retry_after`` says for how long.
        """
        holder = f"{os.getpid()}-{secrets.token_hex(8)}"
        await asyncio.to_thread(self._queue, holder, prio)
        try:
            while True:
                started, wait = await asyncio.to_thread(self._try, holder)
                if started is not None:
                    break
                await asyncio.sleep(wait)
            yield started
        finally:
            # To be undone even when the caller is cancelled, and quick: no await.
            self._leave(holder)

    def succeeded(self) -> None:
        """Note that the host answered: failures are forgotten."""
        self._note(failures=0, open_until=0.0)

    def failed(self) -> bool:
        """Note that the host failed; whether it is now left alone."""
        with self.store.writing() as connection:
            self._ensure(connection)
            row = connection.execute(select(table).where(table.c.host == self.host).with_for_update()).mappings().one()
            failures = row["failures"] + 1
            values: dict[str, float] = {"failures": failures}
            if failures >= FAILURES:
                values["open_until"] = self.clock() + COOL_DOWN
            connection.execute(table.update().where(table.c.host == self.host).values(values))
        return failures >= FAILURES

    def open_for(self) -> float:
        """Seconds for which the host is still left alone; 0 where it may be asked."""
        with self.store.reading() as connection:
            until = connection.scalar(select(table.c.open_until).where(table.c.host == self.host))
        return max(0.0, until - self.clock()) if until else 0.0

    def _queue(self, holder: str, prio: int) -> None:
        closed = self.open_for()
        if closed > 0:
            raise CircuitOpen(f"{self.host} failed {FAILURES} times in a row and is left alone", retry_after=closed)
        with self.store.writing() as connection:
            self._ensure(connection)
            connection.execute(tickets.insert().values(host=self.host, holder=holder, prio=prio, seen=self.clock()))

    def _try(self, holder: str) -> tuple[float | None, float]:
        """The start, if it is this caller's turn; else None and how long to wait before looking again."""
        with self.store.writing() as connection:
            now = self.clock()
            row = connection.execute(select(table).where(table.c.host == self.host).with_for_update()).mappings().one()
            connection.execute(tickets.update().where(tickets.c.holder == holder).values(seen=now))
            connection.execute(tickets.delete().where(tickets.c.host == self.host, tickets.c.seen < now - TICKET))
            order = (tickets.c.prio, tickets.c.id)
            first = connection.scalar(
                select(tickets.c.holder).where(tickets.c.host == self.host).order_by(*order).limit(1)
            )
            if first != holder:
                return None, min(max(self.interval / 4, 0.01), 1.0)
            if row["holder"] is not None and row["lease_until"] > now:
                return None, min(max(self.interval / 20, 0.01), 0.25)
            # A clock that was set back must not close the gate for longer than an interval.
            wait = min(row["next_start"] - now, self.interval)
            if wait > 0:
                return None, wait
            connection.execute(tickets.delete().where(tickets.c.holder == holder))
            values = {"holder": holder, "lease_until": now + LEASE, "next_start": now + self.interval}
            connection.execute(table.update().where(table.c.host == self.host).values(values))
            return now, 0.0

    def _leave(self, holder: str) -> None:
        with self.store.writing() as connection:
            connection.execute(tickets.delete().where(tickets.c.holder == holder))
            mine = (table.c.host == self.host, table.c.holder == holder)
            connection.execute(table.update().where(*mine).values(holder=None, lease_until=0.0))

    def _note(self, **values: float) -> None:
        with self.store.writing() as connection:
            connection.execute(table.update().where(table.c.host == self.host).values(**values))

    def _ensure(self, connection: sa.Connection) -> None:
        if connection.scalar(select(table.c.host).where(table.c.host == self.host)) is None:
            connection.execute(insert_into(connection, table).values(host=self.host).on_conflict_do_nothing())
