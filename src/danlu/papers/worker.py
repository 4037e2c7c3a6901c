"""Workers: tasks that take jobs from the queue, each kind at its own pace, until they are told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from danlu.papers.jobs import Job, LeaseLost, Queue

logger = logging.getLogger("danlu.papers.worker")

#: Seconds between two looks at an empty queue, and between two renewals of a lease.
IDLE, RENEW = 0.5, 20.0
Result = TypeVar("Result")
Handler = Callable[[Job], Awaitable[None]]


async def holding(queue: Queue, job: Job, work: Coroutine[Any, Any, Result], renew: float = RENEW) -> Result:
    """Do something long under the lease of a job; it is stopped when the lease is lost.

    Args:
        queue: of the job.
        job: that this worker holds.
        work: to be done.
        renew: seconds between two renewals.

    Raises:
        LeaseLost: another worker has the job by now.
    """

    async def keep() -> None:
        while True:
            await asyncio.sleep(renew)
            await asyncio.to_thread(queue.renew, job)

    keeping, working = asyncio.create_task(keep()), asyncio.create_task(work)
    try:
        await asyncio.wait({keeping, working}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        keeping.result()
        raise RuntimeError("a lease is renewed until its work is done")
    finally:
        keeping.cancel()
        working.cancel()
        # The work must have ended before anybody else may begin it.
        await asyncio.gather(keeping, working, return_exceptions=True)


class Worker:
    """A worker for some kinds of jobs; kinds do not hold each other up.

    Args:
        queue: the jobs.
        handlers: what does a job of each kind; it brings the job to its end in the queue.
        concurrency: jobs of each kind at the same time, 1 unless given.
        idle: seconds between two looks at an empty queue.
    """

    def __init__(
        self,
        queue: Queue,
        handlers: Mapping[str, Handler],
        concurrency: Mapping[str, int] | None = None,
        idle: float = IDLE,
    ) -> None:
        self.queue, self.handlers, self.idle = queue, dict(handlers), idle
        self.concurrency = dict(concurrency or {})
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"

    async def run(self) -> None:
        """Work until cancelled; running jobs then go back to the queue."""
        async with asyncio.TaskGroup() as group:
            for kind, handler in self.handlers.items():
                for number in range(self.concurrency.get(kind, 1)):
                    group.create_task(self._serve(kind, handler, f"{self.name}-{kind}-{number}"))

    async def drain(self, kind: str) -> int:
        """Do the jobs of a kind that may start now, and return how many there were: for commands and tests."""
        count = 0
        while (job := await asyncio.to_thread(self.queue.claim, [kind], f"{self.name}-{kind}")) is not None:
            await self._do(self.handlers[kind], job)
            count += 1
        return count

    async def _serve(self, kind: str, handler: Handler, name: str) -> None:
        while True:
            try:
                job = await self._claim(kind, name)
                if job is None:
                    await asyncio.sleep(self.idle)
                else:
                    await self._do(handler, job)
            except Exception:
                # Whatever it was, the other jobs must go on: say it, and look again.
                logger.exception("worker %s stumbled", name)
                await asyncio.sleep(10 * self.idle)

    async def _claim(self, kind: str, name: str) -> Job | None:
        claiming = asyncio.create_task(asyncio.to_thread(self.queue.claim, [kind], name))
        try:
            return await asyncio.shield(claiming)
        except asyncio.CancelledError:
            # The thread goes on: what it takes after the stop must go back.
            job = await claiming
            if job is not None:
                self.queue.release(job)
            raise

    async def _do(self, handler: Handler, job: Job) -> None:
        try:
            await handler(job)
        except asyncio.CancelledError:
            # A handler may have given it back itself.
            with contextlib.suppress(LeaseLost):
                self.queue.release(job)
            raise
        except LeaseLost as error:
            logger.warning("%s", error)
        except Exception as error:
            logger.exception("job %d (%s) failed", job.id, job.key)
            await asyncio.to_thread(self.queue.fail, job, "error", f"{type(error).__name__}: {error}"[:500])
