"""Following an answer while it is written, by any number of readers in any process.

One task for each job reads new chunks from the database; its readers wait for it, so that five hundred readers cost as
much as one. Every chunk has a number: a reader that lost its connection names the last one and goes on without a gap or
a repetition.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from danlu.papers.cards import Cards
from danlu.papers.jobs import QUEUED, Job

logger = logging.getLogger("danlu.papers.streams")

#: Seconds between two looks at the database, and after which a silent stream says that it lives.
LOOK, BEAT = 0.2, 15.0


@dataclass(frozen=True)
class Event:
    """Something to tell a reader.

    Args:
        kind: ``queue`` (jobs ahead), ``stage`` (stage and progress), ``text`` (question and text), ``restart`` (a
            question begins anew), ``done``, ``failed`` (kind and reason) or ``beat``.
        data: what it says.
        id: number of the chunk, for ``text`` and ``restart``.
    """

    kind: str
    data: dict[str, str | int | float] = field(default_factory=dict)
    id: int = 0


@dataclass
class _Followed:
    """One job as its readers see it."""

    events: list[Event] = field(default_factory=list)
    status: Event | None = None
    ended: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    readers: int = 0
    task: asyncio.Task[None] | None = None

    def tell(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class Streams:
    """The streams of one process.

    Args:
        cards: whose chunks are followed.
        look: seconds between two looks at the database.
    """

    def __init__(self, cards: Cards, look: float = LOOK) -> None:
        self.cards, self.look = cards, look
        self._followed: dict[int, _Followed] = {}
        self._closed = False

    def close(self) -> None:
        """End every stream where it is, as when the process stops: its readers come back and go on from there."""
        self._closed = True
        for followed in self._followed.values():
            followed.tell()

    async def follow(self, job_id: int, after: int = 0) -> AsyncIterator[Event]:
        """The events of a job.

        Args:
            job_id: of the job.
            after: number of the last chunk that the reader has.

        Yields:
            Every chunk behind that one in order, changes of the job's state between, and ``done`` or ``failed`` last.
        """
        followed = self._followed.setdefault(job_id, _Followed())
        followed.readers += 1
        if followed.task is None:
            followed.task = asyncio.create_task(self._watch(job_id, followed))
        told, status = 0, None
        try:
            while True:
                changed = followed.changed
                while told < len(followed.events):
                    event = followed.events[told]
                    told += 1
                    if event.id > after:
                        yield event
                if followed.status is not None and followed.status != status:
                    status = followed.status
                    yield status
                if self._closed or (followed.ended and told == len(followed.events)):
                    return
                try:
                    await asyncio.wait_for(changed.wait(), BEAT)
                except TimeoutError:
                    yield Event("beat")
        finally:
            followed.readers -= 1
            if followed.readers == 0 and followed.task is not None:
                followed.task.cancel()
                self._followed.pop(job_id, None)

    async def _watch(self, job_id: int, followed: _Followed) -> None:
        try:
            await self._read(job_id, followed)
        except Exception as error:
            # Readers must not wait for ever for a task that is gone; their browsers ask again.
            logger.exception("job %d cannot be followed", job_id)
            followed.status = Event("failed", {"kind": "error", "error": type(error).__name__})
            followed.ended = True
            followed.tell()

    async def _read(self, job_id: int, followed: _Followed) -> None:
        last = 0
        while True:
            # The state first: once it says that the job has ended, every chunk is there to be read.
            job = await asyncio.to_thread(self.cards.queue.get, job_id)
            ahead = await asyncio.to_thread(self.cards.queue.ahead, job) if job is not None else 0
            chunks = await asyncio.to_thread(self.cards.chunks, job_id, last)
            followed.events.extend(_chunk(*chunk) for chunk in chunks)
            last = chunks[-1][0] if chunks else last
            followed.status, ended = _status(job, ahead), job is None or not job.live
            followed.ended = ended
            followed.tell()
            if ended:
                return
            await asyncio.sleep(self.look)


def _chunk(number: int, q: int, text: str) -> Event:
    # An empty chunk says that what was written for this question is void.
    return Event("text", {"q": q, "text": text}, number) if text else Event("restart", {"q": q}, number)


def _status(job: Job | None, ahead: int) -> Event:
    if job is None:
        return Event("failed", {"kind": "gone", "error": "there is no such job"})
    if job.state == QUEUED:
        return Event("queue", {"ahead": ahead, "error": job.error})
    if job.live:
        return Event("stage", {"stage": job.stage, "progress": round(job.progress, 3)})
    if job.error_kind:
        return Event("failed", {"kind": job.error_kind, "error": job.error})
    return Event("done")
