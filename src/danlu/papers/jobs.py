"""A queue of jobs in the database: priorities that age, leases that expire, one live job for each key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func, select

from danlu.papers.schema import job as table
from danlu.papers.store import Store

QUEUED, RUNNING, DONE, FAILED = "queued", "running", "done", "failed"
#: Priorities: whoever holds the admin token, papers of the latest day, everything else.
TOKEN, TODAY, HISTORY = 0, 1, 2
#: A waiting job rises by one priority in this time, so that none waits for ever.
AGEING = timedelta(minutes=30)
LEASE = timedelta(seconds=120)
ATTEMPTS = 3


class LeaseLost(RuntimeError):
    """The job is no longer this worker's: its lease ran out and another has it, or it is finished."""


@dataclass(frozen=True)
class Job:
    """A job as it stood when it was read."""

    id: int
    kind: str
    key: str
    payload: dict[str, Any]
    prio: int
    state: str
    attempts: int
    created_at: datetime
    not_before: datetime | None
    lease_until: datetime | None
    worker: str | None
    stage: str
    progress: float
    error_kind: str
    error: str

    @property
    def live(self) -> bool:
        """Whether it waits or runs."""
        return self.state in (QUEUED, RUNNING)


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)


class Queue:
    """The jobs of a store, for any number of processes.

    Args:
        store: the database.
        clock: gives the time in UTC without zone.
    """

    def __init__(self, store: Store, clock: Callable[[], datetime] = _now) -> None:
        self.store = store
        self.clock = clock

    def put(
        self, kind: str, key: str, payload: dict[str, Any], prio: int = HISTORY, not_before: datetime | None = None
    ) -> Job:
        """Ask for a job; if one with this key waits or runs, that one is returned, moved up if this asks for more.

        Args:
            kind: which worker does it.
            key: what makes two jobs the same.
            payload: what the worker must know; JSON.
            prio: 0 is first.
            not_before: earliest start, in UTC without zone.
        """
        with self.store.writing() as connection:
            if connection.dialect.name == "postgresql":
                # Two processes that ask for one key at once must not both insert.
                connection.execute(select(func.pg_advisory_xact_lock(func.hashtext(key))))
            found = (
                connection.execute(select(table).where(table.c.key == key, table.c.state.in_((QUEUED, RUNNING))))
                .mappings()
                .first()
            )
            if found is not None:
                if prio < found["prio"]:
                    connection.execute(table.update().where(table.c.id == found["id"]).values(prio=prio))
                return _job({**found, "prio": min(prio, found["prio"])})
            values = {
                "kind": kind,
                "key": key,
                "payload": payload,
                "prio": prio,
                "state": QUEUED,
                "attempts": 0,
                "created_at": self.clock(),
                "not_before": not_before,
            }
            inserted = connection.execute(table.insert().values(values)).inserted_primary_key
            return self._read(connection, int(inserted[0]))  # type: ignore[index]

    def get(self, job_id: int) -> Job | None:
        """A job by its number, or None."""
        with self.store.reading() as connection:
            row = connection.execute(select(table).where(table.c.id == job_id)).mappings().first()
        return None if row is None else _job(row)

    def live(self, key: str) -> Job | None:
        """The job of a key that waits or runs, or None."""
        with self.store.reading() as connection:
            query = select(table).where(table.c.key == key, table.c.state.in_((QUEUED, RUNNING)))
            row = connection.execute(query).mappings().first()
        return None if row is None else _job(row)

    def latest(self, key: str) -> Job | None:
        """The latest job of a key in any state, or None."""
        with self.store.reading() as connection:
            row = (
                connection.execute(select(table).where(table.c.key == key).order_by(table.c.id.desc()).limit(1))
                .mappings()
                .first()
            )
        return None if row is None else _job(row)

    def ahead(self, job: Job) -> int:
        """How many jobs of its kind will start before this one; 0 once it runs."""
        if job.state != QUEUED:
            return 0
        waiting = self._waiting((job.kind,))
        order = [each.id for each in waiting]
        return order.index(job.id) if job.id in order else len(order)

    def depth(self) -> dict[str, dict[str, int]]:
        """How many jobs there are, by kind and state."""
        query = select(table.c.kind, table.c.state, func.count()).group_by(table.c.kind, table.c.state)
        found: dict[str, dict[str, int]] = {}
        with self.store.reading() as connection:
            for kind, state, count in connection.execute(query):
                found.setdefault(kind, {})[state] = count
        return found

    def claim(self, kinds: Iterable[str], worker: str) -> Job | None:
        """Take the job that is next, with a lease; jobs whose lease has run out go back first.

        Args:
            kinds: that this worker can do.
            worker: its name, unique among all processes.

        Returns:
            The job, or None where nothing may start now.
        """
        kinds = tuple(kinds)
        with self.store.writing() as connection:
            self._requeue(connection)
            chosen = self._waiting(kinds, connection)
            for job in chosen:
                if job.not_before is not None and job.not_before > self.clock():
                    continue
                values = {
                    "state": RUNNING,
                    "worker": worker,
                    "attempts": job.attempts + 1,
                    "lease_until": self.clock() + LEASE,
                    "error_kind": "",
                    "error": "",
                    "not_before": None,
                }
                where = (table.c.id == job.id, table.c.state == QUEUED)
                if connection.execute(table.update().where(*where).values(values)).rowcount == 1:
                    return self._read(connection, job.id)
        return None

    def renew(self, job: Job, stage: str | None = None, progress: float | None = None) -> None:
        """Prolong the lease, and say how far the job is.

        Raises:
            LeaseLost: the job is not this worker's any more.
        """
        values: dict[str, Any] = {"lease_until": self.clock() + LEASE}
        if stage is not None:
            values["stage"] = stage
        if progress is not None:
            values["progress"] = min(max(progress, 0.0), 1.0)
        self._own(job, values)

    def finish(self, job: Job) -> None:
        """Mark a job as done."""
        self._own(job, {"state": DONE, "progress": 1.0, "lease_until": None, "stage": ""})

    def fail(self, job: Job, kind: str, message: str, retry_at: datetime | None = None) -> None:
        """Give a job up, or put it back for a later try.

        Args:
            job: that failed.
            kind: a word for programs.
            message: a sentence for readers.
            retry_at: when to try again; None, or attempts used up: the job has failed.
        """
        again = retry_at is not None and job.attempts < ATTEMPTS
        self._own(
            job,
            {
                "state": QUEUED if again else FAILED,
                "not_before": retry_at,
                "lease_until": None,
                "worker": None,
                "stage": "",
                "error_kind": kind,
                "error": message,
            },
        )

    def release(self, job: Job) -> None:
        """Give a job back unfinished, as at a shutdown: it does not count as a try."""
        self._own(
            job,
            {"state": QUEUED, "attempts": max(0, job.attempts - 1), "lease_until": None, "worker": None, "stage": ""},
        )

    def again(self, job: Job, at: datetime, error_kind: str = "", error: str = "") -> None:
        """Put a job that recurs back for its next time: it stays the one live job of its key.

        Args:
            job: that is over for now.
            at: when it may start again, in UTC without zone.
            error_kind: what went wrong this time, a word for programs.
            error: likewise, a sentence.
        """
        values = {"state": QUEUED, "attempts": 0, "not_before": at, "lease_until": None, "worker": None, "stage": ""}
        self._own(job, {**values, "progress": 0.0, "error_kind": error_kind, "error": error})

    def _requeue(self, connection: sa.Connection) -> int:
        expired = (table.c.state == RUNNING, table.c.lease_until < self.clock())
        gone = connection.execute(
            table.update()
            .where(*expired, table.c.attempts >= ATTEMPTS)
            .values(state=FAILED, lease_until=None, error_kind="lost", error=f"its worker stopped {ATTEMPTS} times")
        ).rowcount
        back = connection.execute(
            table.update()
            .where(*expired, table.c.attempts < ATTEMPTS)
            .values(state=QUEUED, lease_until=None, worker=None, stage="")
        ).rowcount
        return int(gone + back)

    def _waiting(self, kinds: Sequence[str], connection: sa.Connection | None = None) -> list[Job]:
        """Queued jobs in the order in which they start."""
        query = select(table).where(table.c.state == QUEUED, table.c.kind.in_(kinds))
        if connection is None:
            with self.store.reading() as own:
                rows = own.execute(query).mappings().all()
        else:
            rows = connection.execute(query).mappings().all()
        now = self.clock()
        jobs = [_job(row) for row in rows]
        return sorted(jobs, key=lambda job: (job.prio - (now - job.created_at) // AGEING, job.id))

    def _own(self, job: Job, values: dict[str, Any]) -> None:
        where = (
            table.c.id == job.id,
            table.c.state == RUNNING,
            table.c.worker == job.worker,
            table.c.attempts == job.attempts,
        )
        with self.store.writing() as connection:
            if connection.execute(table.update().where(*where).values(values)).rowcount != 1:
                raise LeaseLost(f"job {job.id} ({job.kind} {job.key}) is no longer held by {job.worker}")

    def _read(self, connection: sa.Connection, job_id: int) -> Job:
        return _job(connection.execute(select(table).where(table.c.id == job_id)).mappings().one())


def _job(row: Any) -> Job:
    return Job(**{name: row[name] for name in Job.__dataclass_fields__})
