from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from datetime import timedelta

import pytest

from danlu.papers import jobs, serving
from danlu.papers.jobs import LEASE, TODAY, Queue
from danlu.papers.settings import load_settings
from danlu.papers.sources.polling import AGAIN, PollReport
from danlu.papers.store import Store
from danlu.papers.synthetic import generate
from danlu.papers.web.state import open_site


@pytest.fixture
def settings(tmp_path):
    return load_settings(environment={}, data=tmp_path, follow="cs.AI+cs.LG", contact="me@example.org", port=0)


@pytest.fixture
def site(settings):
    opened = open_site(settings)
    yield opened
    opened.close()


def _wait(true, seconds=20.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def _drain(site, kind):
    return asyncio.run(serving.make_worker(site).drain(kind))


def _jobs(site):
    found = (site.queue.get(number) for number in range(1, 20))
    return [(job.kind, job.state) for job in found if job is not None]


def test_a_site_has_workers_for_what_it_can_do(settings, tmp_path):
    def kinds(**changes):
        opened = open_site(load_settings(environment={}, data=tmp_path, **changes))
        try:
            return set(serving.handlers(opened))
        finally:
            opened.close()

    assert kinds() == {"answer"}
    assert kinds(contact="me@example.org") == {"answer"}
    assert kinds(contact="me@example.org", follow="cs.AI") == {"answer", "poll", "harvest"}
    assert kinds(engine__kind="none") == set()


def test_asking_again_for_polls_changes_nothing(site):
    for _ in range(3):
        serving.schedule(site)
    assert _jobs(site) == [("poll", "queued"), ("harvest", "queued")]


def test_nothing_is_scheduled_for_a_site_without_subjects(tmp_path):
    opened = open_site(load_settings(environment={}, data=tmp_path, contact="me@example.org"))
    serving.schedule(opened)
    assert opened.queue.depth() == {}
    opened.close()


def test_a_poll_writes_indexes_and_asks_for_the_next_one(site, monkeypatch):
    serving.schedule(site)
    again_at = site.queue.clock().replace(microsecond=0) + timedelta(hours=3)
    record = next(generate(1))

    async def poll(store, fetcher, expression):
        assert (store, fetcher, expression) == (site.store, site.fetcher, "cs.AI+cs.LG")
        return PollReport(written=store.upsert([record]), again_at=again_at)

    monkeypatch.setattr(serving, "poll", poll)
    before = site.index.count()
    assert _drain(site, "poll") == 1
    (job,) = [site.queue.get(n) for n in (1, 2) if site.queue.get(n).kind == "poll"]
    assert (job.state, job.not_before, job.attempts, job.error) == ("queued", again_at, 0, "")
    assert site.index.count() == before + 1
    serving.schedule(site)
    assert len(_jobs(site)) == 2 and _drain(site, "poll") == 0
    # It can be polled for ever: trying again next time is no attempt to do the same.
    for number in range(1, 6):
        later = Queue(site.store, lambda number=number: again_at + timedelta(days=number))
        held = later.claim(["poll"], "w")
        later.again(held, later.clock() + timedelta(hours=1))
        assert held.id == job.id


def test_a_poll_that_breaks_is_tried_again_later_and_says_why(site, monkeypatch):
    serving.schedule(site)

    async def poll(store, fetcher, expression):
        raise OSError("no route")

    monkeypatch.setattr(serving, "poll", poll)
    for _ in range(jobs.ATTEMPTS + 1):
        before = site.queue.clock()
        assert _drain(site, "poll") == 1
        job = site.queue.get(1)
        assert job.state == "queued" and job.error == "OSError: no route"
        assert before + AGAIN <= job.not_before <= site.queue.clock() + AGAIN
        with site.store.writing() as connection:
            connection.execute(jobs.table.update().values(not_before=None))


def test_a_harvest_reads_every_archive_and_comes_back_the_next_day(site, monkeypatch):
    serving.schedule(site)
    sets = []

    async def harvest(store, fetcher, name):
        sets.append(name)

    monkeypatch.setattr(serving, "harvest", harvest)
    before = site.queue.clock()
    assert _drain(site, "harvest") == 1
    assert sets == ["cs"]
    assert timedelta(hours=23) < site.queue.get(2).not_before - before < timedelta(hours=25)


@pytest.mark.parametrize(
    ("archive", "name"),
    [("cs", "cs"), ("hep-th", "physics:hep-th"), ("physics", "physics"), ("cond-mat", "physics:cond-mat")],
)
def test_archives_of_physics_stand_under_their_group(archive, name):
    assert serving._set_of(archive) == name


def test_a_poll_of_what_is_not_followed_any_more_ends(site, settings, monkeypatch):
    serving.schedule(site)
    other = open_site(settings.model_copy(update={"follow": "math.CO"}))
    serving.schedule(other)
    polled = []

    async def poll(store, fetcher, expression):
        polled.append(expression)
        return PollReport(again_at=jobs._now() + timedelta(hours=3))

    monkeypatch.setattr(serving, "poll", poll)
    assert _drain(other, "poll") == 2
    other.close()
    assert polled == ["math.CO"] and site.queue.depth()["poll"] == {"done": 1, "queued": 1}


def test_a_poll_whose_workers_died_is_asked_for_again_but_not_at_once(site):
    serving.schedule(site)
    now = jobs._now()
    for number in range(jobs.ATTEMPTS):
        later = Queue(site.store, lambda number=number: now + (number + 1) * 2 * LEASE)
        assert later.claim(["poll"], "w") is not None
    assert Queue(site.store, lambda: now + 20 * LEASE).claim(["poll"], "w") is None
    assert site.queue.get(1).state == "failed"
    serving.schedule(site)
    (again,) = [job for job in map(site.queue.get, range(1, 9)) if job and job.kind == "poll" and job.live]
    assert again.not_before >= now + AGAIN


def test_a_long_subject_expression_fits_into_the_queue(store, tmp_path):
    from danlu.papers.categories import vocabulary

    follow = "+".join(code for code, category in vocabulary().items() if category.active and "." in code)
    assert len(follow) > 400
    opened = open_site(
        load_settings(
            environment={}, data=tmp_path, follow=follow, contact="me@example.org",
            database=store.url.render_as_string(hide_password=False),
        )
    )  # fmt: skip
    serving.schedule(opened)
    assert _jobs(opened) == [("poll", "queued"), ("harvest", "queued")]
    opened.close()


def test_a_stopped_worker_gives_a_poll_back(site, monkeypatch):
    serving.schedule(site)
    began = threading.Event()

    async def poll(store, fetcher, expression):
        began.set()
        await asyncio.Event().wait()

    async def harvest(store, fetcher, name):
        await asyncio.Event().wait()

    monkeypatch.setattr(serving, "poll", poll)
    monkeypatch.setattr(serving, "harvest", harvest)
    with serving.working(site):
        assert began.wait(20)
        _wait(lambda: _jobs(site) == [("poll", "running"), ("harvest", "running")])
    assert _jobs(site) == [("poll", "queued"), ("harvest", "queued")] and site.queue.get(1).attempts == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "danlu-papers-worker"]


def test_workers_stand_in_a_thread_so_that_a_busy_one_holds_up_no_page(site, monkeypatch):
    serving.schedule(site)
    began, free = threading.Event(), threading.Event()

    async def poll(store, fetcher, expression):
        began.set()
        free.wait(20)  # As a large write does, without awaiting anything.
        return PollReport(again_at=jobs._now())

    monkeypatch.setattr(serving, "poll", poll)

    async def pages():
        with serving.working(site):
            assert await asyncio.to_thread(began.wait, 20)
            # Were it the same loop, this line would not be reached before the write is over.
            await asyncio.sleep(0)
            blocked = not free.is_set()
            free.set()
        return blocked

    assert asyncio.run(pages())


def test_a_site_told_so_does_no_jobs_itself(site):
    alone = type(site)(**{**vars(site), "settings": site.settings.model_copy(update={"workers": 0})})
    with serving.working(alone):
        assert not [thread for thread in threading.enumerate() if thread.name == "danlu-papers-worker"]
    assert site.queue.depth() == {}


def test_the_index_catches_up_with_what_others_write(site, settings):
    with serving.working(site):
        _wait(lambda: len(_jobs(site)) >= 2)
    site.store.upsert(generate(50))
    before = site.index.count()
    with serving.working(site):
        _wait(lambda: site.index.count() == before + 50)


def test_indexing_stops_at_the_next_batch(site, monkeypatch):
    going, told = threading.Event(), []

    def update(store, progress):
        going.set()
        try:
            for done in range(1000):
                progress(done, 1000)
                time.sleep(0.02)
        except RuntimeError as error:
            told.append(str(error))
            raise

    monkeypatch.setattr(site.index, "update", update)

    async def main():
        task = asyncio.create_task(serving._update_index(site))
        await asyncio.to_thread(going.wait, 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    started = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - started < 10 and "papers" in told[0]


def test_port_nought_is_a_free_port_and_a_taken_one_is_named():
    with serving.listen("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        assert port > 0
        with pytest.raises(ValueError, match=f"port {port}: .*in use"):
            serving.listen("127.0.0.1", port)
    with pytest.raises(ValueError, match="cannot listen on host '203.0.113.7'"):
        serving.listen("203.0.113.7", 0)


def test_sigterm_ends_a_block_as_ctrl_c_does():
    before = signal.getsignal(signal.SIGTERM)
    ended = []
    with serving.until_stopped():
        try:
            signal.raise_signal(signal.SIGTERM)
            ended.append("went on")
        finally:
            ended.append("cleaned up")
    assert ended == ["cleaned up"] and signal.getsignal(signal.SIGTERM) == before


class _Silent:
    """A server of a model that takes requests and never answers."""

    def __enter__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.held, self.asked = [], threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                connection.recv(65536)
                self.held.append(connection)
                self.asked.set()

    def __exit__(self, *_):
        self.socket.close()
        for connection in self.held:
            connection.close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"


@contextlib.contextmanager
def _command(*words, config=""):
    process = subprocess.Popen(
        [sys.executable, "-m", "danlu", "papers", *words],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/",
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=20)


def _get(address, **headers):
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=20) as answer:
        return answer.status, answer.read()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_answers_on_a_free_port_and_stops_with_unfinished_jobs_back_in_the_queue(tmp_path, number):
    data = tmp_path / "data"
    config = tmp_path / "site.toml"
    with _Silent() as model:
        config.write_text(f'[engine]\nkind = "endpoint"\nmodel = "m"\nurl = "{model.url}"\n')
        with _command("serve", "--port", "0", "--data", str(data), "--config", str(config)) as process:
            address = process.stderr.readline().split()[0]
            assert address.startswith("http://127.0.0.1:") and not address.endswith(":0")
            assert b"<html" in _get(f"{address}/")[1]
            status, health = _get(f"{address}/health", Accept="application/json")
            assert status == 200 and json.loads(health)["papers"] == 44
            store = Store(f"sqlite:///{data / 'papers.db'}", migrate=False)
            queue = Queue(store)
            job = queue.put("answer", "asked", {"pk": 1, "version": 1, "lang": "en"}, TODAY)
            assert model.asked.wait(20) and queue.get(job.id).state == "running"
            with store.reading() as connection:
                name = connection.exec_driver_sql("SELECT ext_id FROM paper WHERE pk = 1").scalar()
            # A reader follows the answer: the connection of a stream never ends by itself.
            reader = urllib.request.urlopen(f"{address}/answers/{name}/stream?job={job.id}", timeout=20)
            assert reader.readline() == b"retry: 1000\n"
            started = time.monotonic()
            process.send_signal(number)
            assert process.wait(timeout=20) == 0
            assert time.monotonic() - started < 5
            assert "Traceback" not in process.stderr.read()
            # What was being said was said to its end.
            assert reader.read().endswith(b"\n\n")
        held = queue.get(job.id)
        store.close()
    assert (held.state, held.attempts, held.worker) == ("queued", 0, None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_process_gives_its_jobs_back_when_it_is_stopped(tmp_path, number):
    data, config = tmp_path / "data", tmp_path / "site.toml"
    site = open_site(load_settings(environment={}, data=data))
    with _Silent() as model:
        config.write_text(f'[engine]\nkind = "endpoint"\nmodel = "m"\nurl = "{model.url}"\n')
        job = site.queue.put("answer", "asked", {"pk": 1, "version": 1, "lang": "en"}, TODAY)
        with _command("worker", "--data", str(data), "--config", str(config)) as process:
            assert model.asked.wait(20)
            process.send_signal(number)
            assert process.wait(timeout=20) == 0 and "Traceback" not in process.stderr.read()
    held = site.queue.get(job.id)
    site.close()
    assert (held.state, held.attempts) == ("queued", 0)


def test_a_taken_port_is_one_sentence(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = str(held.getsockname()[1])
        with _command("serve", "--port", port, "--data", str(tmp_path)) as process:
            assert process.wait(timeout=20) == 2
            assert f"port {port}" in process.stderr.read()
