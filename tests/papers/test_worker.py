from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest

from danlu.papers import jobs
from danlu.papers.jobs import LEASE, LeaseLost, Queue
from danlu.papers.worker import Worker, holding

#: A worker of its own process: it says which jobs it takes, and does each in the time given.
PROCESS = """
import asyncio, sys, time
from danlu.papers.jobs import Queue
from danlu.papers.store import Store
from danlu.papers.worker import Worker

queue = Queue(Store(sys.argv[1], migrate=False))

async def handler(job):
    print(job.key, flush=True)
    await asyncio.sleep(float(sys.argv[2]))
    queue.finish(job)

print("ready", flush=True)
sys.stdin.readline()
print(asyncio.run(Worker(queue, {"k": handler}).drain("k")), flush=True)
"""


def _url(store):
    return store.url.render_as_string(hide_password=False)


def _process(store, seconds):
    words = [sys.executable, "-c", PROCESS, _url(store), str(seconds)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def queue(store):
    return Queue(store)


async def _until(true, seconds=20.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.01)


async def _stop(task):
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_each_kind_goes_at_its_own_pace(queue):
    """Answers that never end hold up no poll, and no more of them run at once than may."""
    for number in range(4):
        queue.put("answer", f"a{number}", {})
        queue.put("poll", f"p{number}", {})
    running, most = 0, 0

    async def answer(job):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.Event().wait()

    async def poll(job):
        await asyncio.to_thread(queue.finish, job)

    async def main():
        worker = asyncio.create_task(Worker(queue, {"answer": answer, "poll": poll}, {"answer": 2}, 0.01).run())
        await _until(lambda: queue.depth().get("poll", {}) == {"done": 4} and running == 2)
        # Two of the kind run and the others wait, however long it takes.
        await asyncio.sleep(0.2)
        await _stop(worker)

    asyncio.run(main())
    # Those that ran are back in the queue, and stopping them was not their fault.
    assert most == 2 and queue.depth()["answer"] == {"queued": 4}
    assert all(queue.live(f"a{number}").attempts == 0 for number in range(4))


def test_a_job_that_its_handler_gave_back_at_a_stop_stays_so(queue):
    queue.put("k", "x", {})

    began = []

    async def handler(job):
        began.append(job)
        try:
            await asyncio.Event().wait()
        finally:
            queue.finish(job)

    async def main():
        worker = asyncio.create_task(Worker(queue, {"k": handler}, idle=0.01).run())
        await _until(lambda: began)
        worker.cancel()
        with pytest.raises(asyncio.CancelledError):
            await worker

    asyncio.run(main())
    assert queue.latest("x").state == "done"


def test_a_job_that_is_claimed_while_the_worker_stops_goes_back(queue, monkeypatch):
    queue.put("k", "x", {})
    claim, claimed, free = queue.claim, threading.Event(), threading.Event()

    def slow(kinds, worker):
        job = claim(kinds, worker)
        claimed.set()
        free.wait(20)
        return job

    monkeypatch.setattr(queue, "claim", slow)

    async def main():
        worker = asyncio.create_task(Worker(queue, {"k": lambda job: None}).run())
        assert await asyncio.to_thread(claimed.wait, 20)
        worker.cancel()
        await asyncio.sleep(0)
        free.set()
        with pytest.raises(asyncio.CancelledError):
            await worker

    asyncio.run(main())
    assert (queue.live("x").state, queue.live("x").attempts) == ("queued", 0)


def test_a_handler_that_raises_fails_its_job_and_the_others_go_on(queue):
    for key in ("bad", "good"):
        queue.put("k", key, {})

    async def handler(job):
        if job.key == "bad":
            raise KeyError("a word" * 200)
        queue.finish(job)

    async def main():
        worker = asyncio.create_task(Worker(queue, {"k": handler}, idle=0.01).run())
        await _until(lambda: queue.live("good") is None and queue.live("bad") is None)
        await _stop(worker)

    asyncio.run(main())
    bad = queue.latest("bad")
    assert (bad.state, bad.error_kind) == ("failed", "error") and bad.error.startswith("KeyError: 'a word")
    assert len(bad.error) == 500 and queue.latest("good").state == "done"


def test_a_queue_that_cannot_be_read_is_tried_again(queue, monkeypatch):
    queue.put("k", "x", {})
    claim, calls = queue.claim, []

    def broken(kinds, worker):
        calls.append(worker)
        if len(calls) == 1:
            raise OSError("the database is gone")
        return claim(kinds, worker)

    monkeypatch.setattr(queue, "claim", broken)

    async def handler(job):
        queue.finish(job)

    async def main():
        worker = asyncio.create_task(Worker(queue, {"k": handler}, idle=0.01).run())
        await _until(lambda: queue.live("x") is None)
        await _stop(worker)

    asyncio.run(main())
    assert queue.latest("x").state == "done"


def test_a_job_that_was_lost_is_not_marked_as_failed(queue):
    queue.put("k", "x", {})

    async def handler(job):
        raise LeaseLost("another has it")

    assert asyncio.run(Worker(queue, {"k": handler}).drain("k")) == 1
    assert queue.latest("x").state == "running"


def test_a_lease_is_renewed_while_something_long_is_done(queue):
    queue.put("k", "x", {})
    job = queue.claim(["k"], "w")

    async def long():
        await _until(lambda: queue.get(job.id).lease_until > job.lease_until)
        return "done"

    assert asyncio.run(holding(queue, job, long(), renew=0.01)) == "done"


def test_work_ends_when_its_lease_is_lost(queue):
    queue.put("k", "x", {})
    job = queue.claim(["k"], "w")
    queue.finish(job)
    ended = []

    async def long():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    with pytest.raises(LeaseLost):
        asyncio.run(asyncio.wait_for(holding(queue, job, long(), renew=0.01), 20))
    assert ended == [True]


def test_what_the_work_raises_comes_through(queue):
    queue.put("k", "x", {})
    job = queue.claim(["k"], "w")

    async def wrong():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(holding(queue, job, wrong()))


def test_two_processes_share_the_queue_and_each_job_runs_once(store, queue):
    for number in range(30):
        queue.put("k", f"job{number}", {})
    processes = [_process(store, 0.01) for _ in range(2)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    taken = [process.communicate(timeout=60)[0].split() for process in processes]
    done = [name for lines in taken for name in lines[:-1]]
    assert sorted(done) == sorted(f"job{number}" for number in range(30))
    # Both had a share.
    assert all(len(lines) > 1 for lines in taken) and queue.depth() == {"k": {"done": 30}}


def test_the_job_of_a_killed_process_is_done_by_another_once_its_lease_is_over(store, queue):
    queue.put("k", "x", {})
    process = _process(store, 600)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "x\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)

    def later(seconds):
        return Queue(store, lambda: jobs._now() + timedelta(seconds=seconds))

    done = []

    def worker(own):
        async def handler(job):
            done.append((job.key, job.attempts))
            own.finish(job)

        return Worker(own, {"k": handler})

    assert asyncio.run(worker(later(LEASE.total_seconds() - 60)).drain("k")) == 0
    assert asyncio.run(worker(later(LEASE.total_seconds() + 1)).drain("k")) == 1
    assert done == [("x", 2)] and queue.latest("x").state == "done"
