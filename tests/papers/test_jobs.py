from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

import pytest

from danlu.papers.jobs import AGEING, ATTEMPTS, HISTORY, LEASE, TODAY, TOKEN, LeaseLost, Queue
from danlu.papers.store import Store


class Clock:
    def __init__(self):
        self.now = datetime(2024, 1, 1, 12)

    def __call__(self):
        return self.now

    def pass_by(self, seconds=0.0):
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def queue(store, clock):
    return Queue(store, clock)


def test_jobs_start_by_priority_and_age(queue, clock):
    """Arrivals h1 h2 t1 v1 t2 with one start every three seconds: history, today, and a token holder."""
    arrivals = [("h1", HISTORY, 0), ("h2", HISTORY, 0), ("t1", TODAY, 0.5), ("v1", TOKEN, 1.0), ("t2", TODAY, 1.2)]
    started, begin = [], clock.now
    for tick in range(5):
        at = 3.0 * tick
        for name, prio, arrived in arrivals:
            if arrived <= at and not queue.latest(name):
                clock.now = begin + timedelta(seconds=arrived)
                queue.put("answer", name, {}, prio)
        clock.now = begin + timedelta(seconds=at)
        job = queue.claim(["answer"], "w")
        started.append(job.key)
        queue.finish(job)
    assert started == ["h1", "v1", "t1", "t2", "h2"]


def test_a_job_that_waits_long_enough_overtakes(queue, clock):
    queue.put("answer", "old", {}, HISTORY)
    clock.pass_by(2 * AGEING.total_seconds() + 1)
    queue.put("answer", "new", {}, TOKEN)
    assert queue.claim(["answer"], "w").key == "old"


def test_one_key_has_one_live_job_and_more_urgent_asking_moves_it_up(queue):
    first = queue.put("answer", "k", {"a": 1}, HISTORY)
    again = queue.put("answer", "k", {"a": 2}, TOKEN)
    assert again.id == first.id and again.prio == TOKEN and queue.get(first.id).payload == {"a": 1}
    queue.finish(queue.claim(["answer"], "w"))
    assert queue.put("answer", "k", {}).id != first.id and queue.latest("k").state == "queued"


def test_asking_at_once_makes_one_job(store):
    def ask(_):
        other = Store(store.url.render_as_string(hide_password=False), migrate=False)
        try:
            return Queue(other).put("answer", "k", {}).id
        finally:
            other.close()

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(20)))) == 1


def test_claiming_at_once_gives_each_job_to_one_worker(store):
    queue = Queue(store)
    for number in range(12):
        queue.put("answer", f"k{number}", {})

    def claim(name):
        other = Store(store.url.render_as_string(hide_password=False), migrate=False)
        own, held = Queue(other), []
        while (job := own.claim(["answer"], str(name))) is not None:
            held.append(job.id)
        other.close()
        return held

    with ThreadPoolExecutor(4) as pool:
        taken = [job for held in pool.map(claim, range(4)) for job in held]
    assert len(taken) == len(set(taken)) == 12


def test_an_expired_lease_goes_back_and_the_old_worker_has_lost_it(queue, clock):
    queue.put("answer", "k", {})
    job = queue.claim(["answer"], "a")
    clock.pass_by(LEASE.total_seconds() - 1)
    queue.renew(job, "answering", 0.25)
    clock.pass_by(LEASE.total_seconds() - 1)
    assert queue.claim(["answer"], "b") is None
    clock.pass_by(2)
    again = queue.claim(["answer"], "b")
    assert again.id == job.id and again.attempts == 2 and again.progress == 0.25
    for act in (
        lambda: queue.renew(job),
        lambda: queue.finish(job),
        lambda: queue.fail(job, "x", "y"),
        lambda: queue.release(job),
    ):
        with pytest.raises(LeaseLost):
            act()


def test_a_worker_with_the_same_name_after_a_restart_does_not_hold_the_old_lease(queue, clock):
    queue.put("answer", "k", {})
    old = queue.claim(["answer"], "a")
    clock.pass_by(LEASE.total_seconds() + 1)
    queue.claim(["answer"], "a")
    with pytest.raises(LeaseLost):
        queue.finish(old)


def test_a_job_whose_workers_die_has_failed_in_the_end(queue, clock):
    queue.put("answer", "k", {})
    for _ in range(ATTEMPTS):
        assert queue.claim(["answer"], "a") is not None
        clock.pass_by(LEASE.total_seconds() + 1)
    assert queue.claim(["answer"], "a") is None
    job = queue.latest("k")
    assert job.state == "failed" and job.error_kind == "lost"


def test_a_failure_with_a_time_is_tried_again_then(queue, clock):
    queue.put("answer", "k", {})
    job = queue.claim(["answer"], "a")
    queue.fail(job, "upstream", "busy", clock.now + timedelta(minutes=5))
    assert queue.claim(["answer"], "a") is None and queue.live("k").error == "busy"
    clock.pass_by(301)
    again = queue.claim(["answer"], "a")
    assert again.id == job.id
    queue.fail(again, "no_text", "no text in it")
    assert queue.get(job.id).state == "failed" and queue.live("k") is None


def test_a_released_job_is_not_a_try_less(queue):
    queue.put("answer", "k", {})
    for _ in range(ATTEMPTS + 2):
        queue.release(queue.claim(["answer"], "a"))
    assert queue.claim(["answer"], "a").attempts == 1


def test_the_place_in_the_queue_counts_those_ahead(queue):
    jobs = [queue.put("answer", f"k{i}", {}, prio) for i, prio in enumerate([HISTORY, TODAY, HISTORY])]
    assert [queue.ahead(job) for job in jobs] == [1, 0, 2]
    queue.put("poll", "p", {})
    assert queue.depth() == {"answer": {"queued": 3}, "poll": {"queued": 1}}
    running = queue.claim(["answer"], "a")
    assert queue.ahead(running) == 0 and queue.ahead(queue.get(jobs[2].id)) == 1
