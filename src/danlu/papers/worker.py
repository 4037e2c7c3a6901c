"""Workers: tasks that take jobs from the queue, each kind at its own pace, until they are told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping

from danlu.papers.jobs import Job, LeaseLost, Queue

logger = logging.getLogger("danlu.papers.worker")

#: Seconds between two looks at an empty queue.
IDLE = 0.5
Handler = Callable[[Job], Awaitable[None]]


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
                job = await asyncio.to_thread(self.queue.claim, [kind], name)
                if job is None:
                    await asyncio.sleep(self.idle)
                else:
                    await self._do(handler, job)
            except Exception:
                # Whatever it was, the other jobs must go on: say it, and look again.
                logger.exception("worker %s stumbled", name)
                await asyncio.sleep(10 * self.idle)

    async def _do(self, handler: Handler, job: Job) -> None:
        try:
            await handler(job)
        except LeaseLost as error:
            logger.warning("%s", error)
        except Exception as error:
            logger.exception("job %d (%s) failed", job.id, job.key)
            await asyncio.to_thread(self.queue.fail, job, "error", f"{type(error).__name__}: {error}"[:500])
