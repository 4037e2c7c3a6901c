"""Running a site: the pages and the workers, in one process or in several."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from danlu.papers.categories import PHYSICS_GROUP, vocabulary
from danlu.papers.jobs import TODAY, Job, LeaseLost
from danlu.papers.net.fetch import Fetcher
from danlu.papers.pipeline import Answering
from danlu.papers.sources.polling import AGAIN, PollReport, harvest, names_of, poll
from danlu.papers.web.state import Site
from danlu.papers.worker import Handler, Worker, holding

logger = logging.getLogger("danlu.papers.serving")

POLL, HARVEST = "poll", "harvest"
#: Between two harvests of the archive, and seconds between two looks of the index at the database.
DAY, LOOK = timedelta(days=1), 60.0
#: Seconds that running requests are given when the site stops.
GRACE = 2


def handlers(site: Site) -> dict[str, Handler]:
    """What a worker of this site does, by kind of job."""
    found: dict[str, Handler] = {}
    if site.engine is not None:
        answering = Answering(site.cards, site.engine, site.fetcher, site.settings.engine.tokens_per_day)
        found["answer"] = answering.run
    if site.fetcher is not None and site.settings.follow:
        found[POLL] = _Recurring(site, _poll_and_index).run
        found[HARVEST] = _Recurring(site, _harvest).run
    return found


def make_worker(site: Site) -> Worker:
    """A worker for every kind of job of a site; answers are as many at once as the engine may work on."""
    return Worker(site.queue, handlers(site), {"answer": site.settings.engine.concurrency})


async def run_worker(site: Site) -> None:
    """Work until cancelled: jobs, and the search index beside them. Unfinished jobs then go back to the queue."""
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(make_worker(site).run())
            group.create_task(_look_after(site))
    finally:
        if site.engine is not None:
            await site.engine.close()


def schedule(site: Site) -> None:
    """See to it that a site that follows a subject polls it and harvests its archive; what waits stays as it is."""
    if site.fetcher is None or not site.settings.follow:
        return
    follow = site.settings.follow
    mark = hashlib.sha256(follow.encode()).hexdigest()[:16]
    for number, kind in enumerate((POLL, HARVEST)):
        key = f"{kind}:{mark}"
        latest = site.queue.latest(key)
        # One that has failed for good, as where its workers died, is asked for again, but not at once.
        later = site.queue.clock() + AGAIN if latest is not None and latest.state == "failed" else None
        site.queue.put(kind, key, {"follow": follow}, TODAY + number, later)


@contextlib.contextmanager
def working(site: Site) -> Iterator[None]:
    """Workers in a thread beside the pages, so that a large write holds up no page; they stop when the block ends."""
    if not site.settings.workers:
        yield
        return
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[None]]] = Future()

    async def work() -> None:
        task = asyncio.create_task(run_worker(site))
        started.set_result((asyncio.get_running_loop(), task))
        try:
            await task
        except asyncio.CancelledError:
            pass
        except Exception:
            logger.exception("the workers have stopped: only pages are served")

    thread = threading.Thread(target=lambda: asyncio.run(work()), name="danlu-papers-worker")
    thread.start()
    loop, task = started.result()
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # The loop has ended by itself.
            loop.call_soon_threadsafe(task.cancel)
        thread.join()


@contextlib.contextmanager
def until_stopped() -> Iterator[None]:
    """Let SIGTERM end a block as Ctrl-C does; by itself it ends the process, and jobs wait for their lease to end."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits for readers; its name says which port it is where 0 was asked for.

    Raises:
        ValueError: the address cannot be listened on.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise ValueError(f"cannot listen on host {host!r}, port {port}: {error.strerror}; is it in use?") from error


def serve(site: Site, listening: socket.socket) -> None:
    """Serve a site until SIGINT: pages here, workers beside them.

    Args:
        site: to serve; whoever opened it closes it.
        listening: from `listen`; it is closed at the end.

    Raises:
        KeyboardInterrupt: the signal, once everything has stopped.
    """
    import uvicorn

    from danlu.papers.web.app import create_app

    config = uvicorn.Config(
        create_app(site),
        log_level="warning",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE,
    )

    class Server(uvicorn.Server):
        """Ends streams first: a response that never ends by itself would be cut off with an error."""

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            site.streams.close()
            await super().shutdown(sockets)

    with listening, working(site):
        Server(config).run(sockets=[listening])


async def _look_after(site: Site) -> None:
    """See that the site goes on polling, and catch the index up with what any process has written."""
    while True:
        try:
            await asyncio.to_thread(schedule, site)
            await _update_index(site)
        except Exception:
            logger.exception("the search index could not be updated")
        await asyncio.sleep(LOOK)


async def _update_index(site: Site) -> None:
    """Catch the index up; when the task is cancelled it stops after the batch that it is writing."""
    stopped = threading.Event()

    def go_on(done: int, total: int) -> None:
        if stopped.is_set():
            raise RuntimeError(f"stopped after {done} of {total} papers")

    try:
        await asyncio.to_thread(site.index.update, site.store, go_on)
    finally:
        stopped.set()


async def poll_once(site: Site, archive: bool = False) -> PollReport:
    """Poll what a site follows, and on demand the archive, at once and outside the queue."""
    report = await poll(site.store, _network(site), site.settings.follow)
    for more in await _harvests(site) if archive else ():
        report.written += more.written
        report.errors |= more.errors
    return report


async def _poll_and_index(site: Site) -> datetime:
    """Poll what the site follows; when to do so again."""
    report = await poll_once(site)
    await _update_index(site)
    logger.info("poll of %s: %s, next at %s", site.settings.follow, report.written, report.again_at)
    return report.again_at or site.queue.clock() + AGAIN


async def _harvest(site: Site) -> datetime:
    """Bring every change of the archives that the site follows; when to do so again."""
    await _harvests(site)
    return (datetime.now(UTC) + DAY).replace(tzinfo=None)


async def _harvests(site: Site) -> list[PollReport]:
    """Bring every change of each archive that the site follows."""
    fetcher = _network(site)
    archives = sorted({name.split(".")[0] for name in names_of(site.settings.follow)})
    return [await harvest(site.store, fetcher, _set_of(archive)) for archive in archives]


def _network(site: Site) -> Fetcher:
    """What asks sources.

    Raises:
        ValueError: the site has no network.
    """
    if site.fetcher is None:
        raise ValueError("contact must be given: requests to sources carry it")
    return site.fetcher


@dataclass
class _Recurring:
    """A job that goes back into the queue for its next time, whether or not this one went well."""

    site: Site
    work: Callable[[Site], Coroutine[Any, Any, datetime]]

    async def run(self, job: Job) -> None:
        queue = self.site.queue
        if job.payload.get("follow") != self.site.settings.follow:
            # The operator follows something else by now.
            await asyncio.to_thread(queue.finish, job)
            return
        try:
            again_at, error = await holding(queue, job, self.work(self.site)), None
        except LeaseLost:
            raise
        except Exception as failure:
            logger.exception("job %d (%s) failed", job.id, job.key)
            again_at, error = queue.clock() + AGAIN, failure
        text = "" if error is None else f"{type(error).__name__}: {error}"[:500]
        await asyncio.to_thread(queue.again, job, again_at, "" if error is None else "error", text)


def _set_of(archive: str) -> str:
    """Name of an archive's set at the OAI-PMH interface: those of physics stand under their group."""
    group = vocabulary()[archive].group if archive in vocabulary() else archive
    return f"physics:{archive}" if group == PHYSICS_GROUP and archive != "physics" else archive
