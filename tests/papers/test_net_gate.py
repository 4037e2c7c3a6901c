from __future__ import annotations

import asyncio
import subprocess
import sys
import time

import pytest

from danlu.papers.net.errors import CircuitOpen
from danlu.papers.net.gate import COOL_DOWN, FAILURES, LEASE, RateGate
from danlu.papers.store import Store

_CALLER = """
import asyncio, sys, time
from danlu.papers.net.gate import RateGate
from danlu.papers.store import Store
async def main():
    gate = RateGate(Store(sys.argv[1], migrate=False), "h", 0.1)
    for _ in range(3):
        async with gate.permit() as start:
            await asyncio.sleep(0.03)
            print(start, time.time(), flush=True)
asyncio.run(main())
"""


def test_three_processes_share_one_pace_and_never_overlap(store):
    url = store.url.render_as_string(hide_password=False)
    callers = [
        subprocess.Popen([sys.executable, "-c", _CALLER, url], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    spans = sorted(
        tuple(map(float, line.split())) for caller in callers for line in caller.communicate()[0].splitlines()
    )
    assert len(spans) == 9 and all(caller.returncode == 0 for caller in callers)
    for (start, end), (following, _) in zip(spans, spans[1:], strict=False):
        assert following - start >= 0.1 - 1e-3 and following >= end


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def _run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 10))


def test_starts_are_an_interval_apart_by_the_gate_s_own_clock():
    async def main():
        gate = RateGate(Store(), "h", 0.05)
        starts = []

        async def ask():
            async with gate.permit() as start:
                starts.append(start)

        await asyncio.gather(*(ask() for _ in range(5)))
        return starts

    starts = _run(main())
    assert all(b - a >= 0.05 - 1e-6 for a, b in zip(starts, starts[1:], strict=False)) and len(starts) == 5


def test_urgent_callers_go_first_and_equals_in_their_order():
    async def main():
        gate = RateGate(Store(), "h", 0.02)
        order = []

        async def ask(name, prio):
            async with gate.permit(prio):
                order.append(name)

        async with gate.permit():
            tasks = []
            for name, prio in (("a", 2), ("b", 2), ("c", 0), ("d", 1)):
                tasks.append(asyncio.create_task(ask(name, prio)))
                await asyncio.sleep(0.05)
        await asyncio.gather(*tasks)
        return order

    assert _run(main()) == ["c", "d", "a", "b"]


def test_the_permit_of_a_dead_holder_comes_free(clock):
    async def main():
        store = Store()
        gate = RateGate(store, "h", 3.0, clock)
        dead = gate.permit()
        await dead.__aenter__()
        gate._leave = lambda holder: None
        clock.now += LEASE + 1
        async with RateGate(store, "h", 3.0, clock).permit() as start:
            return start

    assert _run(main()) == 1000.0 + LEASE + 1


def test_a_cancelled_caller_leaves_at_once_and_holds_nobody_up():
    async def main():
        gate = RateGate(Store(), "h", 0.0)
        async with gate.permit():
            waiting = asyncio.create_task(gate.permit().__aenter__())
            await asyncio.sleep(0.05)
            waiting.cancel()
            begin = time.perf_counter()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert time.perf_counter() - begin < 0.5
        async with gate.permit():
            pass

    _run(main())


def test_a_clock_set_back_closes_the_gate_for_one_interval_at_most(clock):
    async def main():
        gate = RateGate(Store(), "h", 3.0, clock)
        async with gate.permit():
            pass
        clock.now -= 10_000
        _, wait = await asyncio.to_thread(_peek, gate)
        return wait

    def _peek(gate):
        gate._queue("x", 0)
        return gate._try("x")

    assert 0 < _run(main()) <= 3.0


def test_the_circuit_opens_after_exactly_five_failures_in_a_row_and_one_may_try_later(store, clock):
    async def main():
        gate = RateGate(store, "h", 0.0, clock)
        async with gate.permit():
            pass
        for number in range(FAILURES - 1):
            assert not gate.failed(), number
        gate.succeeded()
        for _ in range(FAILURES - 1):
            assert not gate.failed()
        async with gate.permit():
            pass
        assert gate.failed()
        with pytest.raises(CircuitOpen) as caught:
            async with gate.permit():
                pass
        assert caught.value.retry_after == pytest.approx(COOL_DOWN)
        clock.now += COOL_DOWN + 1
        async with gate.permit():
            pass
        assert gate.failed() and gate.open_for() == pytest.approx(COOL_DOWN)
        clock.now += COOL_DOWN + 1
        gate.succeeded()
        assert gate.open_for() == 0

    _run(main())


def test_an_interval_below_zero_is_refused():
    with pytest.raises(ValueError, match="interval must be at least 0"):
        RateGate(Store(), "h", -1)
