"""Running a site: the pages and the workers, in one process or in several."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from danlu.papers.categories import PHYSICS_GROUP, vocabulary
from danlu.papers.jobs import TODAY, Job, Queue
from danlu.papers.pipeline import Answering
from danlu.papers.sources.polling import PollReport, harvest, names_of, poll
from danlu.papers.web.state import Site
from danlu.papers.worker import Handler, Worker

logger = logging.getLogger("danlu.papers.serving")

POLL, HARVEST = "poll", "harvest"
#: Between two harvests of the archive, two looks of the index at the database, and two renewals of a lease.
DAY, LOOK, RENEW = timedelta(days=1), 60.0, 20.0
Result = TypeVar("Result")


def handlers(site: Site) -> dict[str, Handler]:
    """What a worker of this site does, by kind of job."""
    found: dict[str, Handler] = {}
    if site.engine is not None:
        answering = Answering(site.cards, site.engine, site.fetcher, site.settings.engine.tokens_per_day)
        found["answer"] = answering.run
    if site.fetcher is not None and site.settings.follow:
        found[POLL] = _Polling(site).run
        found[HARVEST] = _Harvesting(site).run
    return found


def make_worker(site: Site) -> Worker:
    """A worker for every kind of job of a site; answers are as many at once as the engine may work on."""
    return Worker(site.queue, handlers(site), {"answer": site.settings.engine.concurrency})


async def run_worker(site: Site) -> None:
    """Work until cancelled: jobs, and the search index beside them."""
    schedule(site.queue, site)
    async with asyncio.TaskGroup() as group:
        group.create_task(make_worker(site).run())
        group.create_task(_keep_index(site))


def schedule(queue: Queue, site: Site) -> None:
    """Ask for the first poll and harvest of a site that follows a subject; those that wait already stay as they are."""
    if site.fetcher is not None and site.settings.follow:
        queue.put(POLL, f"{POLL}:{site.settings.follow}", {}, TODAY)
        queue.put(HARVEST, HARVEST, {}, TODAY + 1)


@contextlib.asynccontextmanager
async def working(site: Site) -> AsyncIterator[None]:
    """Workers beside the pages of the same process, stopped when the block ends; their jobs go back to the queue."""
    task = asyncio.create_task(run_worker(site)) if site.settings.workers else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if site.engine is not None:
            await site.engine.close()


async def serve(site: Site) -> None:
    """Serve a site until it is told to stop."""
    import uvicorn

    from danlu.papers.web.app import create_app

    app = create_app(site)
    config = uvicorn.Config(
        app,
        host=site.settings.host,
        port=site.settings.port,
        log_level="warning",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    async with working(site):
        await uvicorn.Server(config).serve()


async def _keep_index(site: Site) -> None:
    """Catch the index up with what any process has written."""
    while True:
        try:
            await asyncio.to_thread(site.index.update, site.store)
        except Exception:
            logger.exception("the search index could not be updated")
        await asyncio.sleep(LOOK)


async def poll_once(site: Site, archive: bool = False) -> PollReport:
    """Poll what a site follows, and on demand the archive, at once and outside the queue."""
    if site.fetcher is None:
        raise ValueError("contact must be given: requests to sources carry it")
    report = await poll(site.store, site.fetcher, site.settings.follow)
    for name in _archives(site) if archive else ():
        more = await harvest(site.store, site.fetcher, _set_of(name))
        report.written += more.written
        report.errors |= more.errors
    return report


def _archives(site: Site) -> list[str]:
    return sorted({name.split(".")[0] for name in names_of(site.settings.follow)})


class _Polling:
    """One poll of what the site follows; it asks for the next one itself."""

    def __init__(self, site: Site) -> None:
        self.site = site

    async def run(self, job: Job) -> None:
        site, queue = self.site, self.site.queue
        if site.fetcher is None:
            raise RuntimeError("a site without network does not poll")
        report = await _holding(queue, job, poll(site.store, site.fetcher, site.settings.follow))
        await asyncio.to_thread(site.index.update, site.store)
        await asyncio.to_thread(queue.finish, job)
        await asyncio.to_thread(queue.put, POLL, job.key, {}, TODAY, report.again_at)
        logger.info("poll of %s: %s, next at %s", site.settings.follow, report.written, report.again_at)


class _Harvesting:
    """One harvest a day of every change in the archive."""

    def __init__(self, site: Site) -> None:
        self.site = site

    async def run(self, job: Job) -> None:
        site, queue = self.site, self.site.queue
        if site.fetcher is None:
            raise RuntimeError("a site without network does not poll")
        for archive in _archives(site):
            await _holding(queue, job, harvest(site.store, site.fetcher, _set_of(archive)))
        await asyncio.to_thread(queue.finish, job)
        following = (datetime.now(UTC) + DAY).replace(tzinfo=None)
        await asyncio.to_thread(queue.put, HARVEST, job.key, {}, TODAY + 1, following)


async def _holding(queue: Queue, job: Job, work: Coroutine[Any, Any, Result]) -> Result:
    """Do something long under the lease of a job."""

    async def renew() -> None:
        while True:
            await asyncio.sleep(RENEW)
            await asyncio.to_thread(queue.renew, job)

    renewing = asyncio.create_task(renew())
    try:
        return await work
    except asyncio.CancelledError:
        queue.release(job)
        raise
    finally:
        renewing.cancel()


def _set_of(archive: str) -> str:
    """Name of an archive's set at the OAI-PMH interface: those of physics stand under their group."""
    group = vocabulary()[archive].group if archive in vocabulary() else archive
    return f"physics:{archive}" if group == PHYSICS_GROUP and archive != "physics" else archive
