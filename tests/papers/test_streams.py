from __future__ import annotations

import asyncio
import random

import pytest

from danlu.papers import streams as module
from danlu.papers.streams import Event, Streams
from reference.answering import cards_of, stored


def _job(store):
    paper, cards = stored(store), cards_of(store)
    return cards, cards.ask(paper, None, "en")


async def _all(streams, job_id, after=0):
    return [event async for event in streams.follow(job_id, after)]


def text_of(events, before=""):
    """What a reader has in the end: a restart makes what came before for a question void."""
    parts = dict(before) if before else {}
    for event in events:
        if event.kind == "restart":
            parts[event.data["q"]] = ""
        elif event.kind == "text":
            parts[event.data["q"]] = parts.get(event.data["q"], "") + event.data["text"]
    return parts


def test_a_reader_sees_the_queue_the_stages_the_text_and_the_end(store):
    cards, job = _job(store)

    async def go():
        streams = Streams(cards, look=0.01)
        reading = asyncio.create_task(_all(streams, job.id))
        await asyncio.sleep(0.1)
        held = cards.queue.claim(["answer"], "w")
        cards.queue.renew(held, "answering", 0.5)
        cards.append(job.id, 1, "Hello ")
        await asyncio.sleep(0.1)
        cards.append(job.id, 1, "world")
        cards.queue.finish(held)
        return await asyncio.wait_for(reading, 10)

    events = asyncio.run(go())
    assert events[0] == Event("queue", {"ahead": 0, "error": ""})
    assert Event("stage", {"stage": "answering", "progress": 0.5}) in events
    assert events[-1] == Event("done") and text_of(events) == {1: "Hello world"}
    assert [event.id for event in events if event.id] == sorted({event.id for event in events if event.id})


def test_a_stream_cut_anywhere_goes_on_without_gap_or_repetition(store):
    cards, job = _job(store)
    held = cards.queue.claim(["answer"], "w")
    for q in (1, 2):
        for part in ("A", "bb", "ccc", "d "):
            cards.append(job.id, q, part)
        if q == 1:
            cards.restart(job.id, 1)
            cards.append(job.id, 1, "anew ")
            cards.append(job.id, 1, "and whole")
    cards.queue.finish(held)

    async def go():
        streams = Streams(cards, look=0.01)
        whole = await _all(streams, job.id)
        for cut in range(len(whole)):
            seen = whole[:cut]
            last = max((event.id for event in seen), default=0)
            rest = await _all(streams, job.id, last)
            assert [e for e in seen if e.id] + [e for e in rest if e.id] == [e for e in whole if e.id]
            assert rest[-1] == Event("done")
        return whole

    assert text_of(asyncio.run(go())) == {1: "anew and whole", 2: "Abbcccd "}


def test_five_hundred_readers_lose_nothing_and_look_at_the_database_once(store, monkeypatch):
    cards, job = _job(store)
    looks = []
    chunks = cards.chunks
    monkeypatch.setattr(cards, "chunks", lambda *where: looks.append(where) or chunks(*where))
    words = [f"word{n} " for n in range(40)]

    async def go():
        streams, dice = Streams(cards, look=0.02), random.Random(0)

        async def reader():
            await asyncio.sleep(dice.random() * 0.6)
            parts, last, left = {}, 0, 2
            while True:
                async for event in streams.follow(job.id, last):
                    last = max(last, event.id)
                    parts = text_of([event], parts)
                    if event.kind == "done":
                        return parts
                    if left and dice.random() < 0.1:
                        left -= 1
                        break

        readers = [asyncio.create_task(reader()) for _ in range(500)]
        held = cards.queue.claim(["answer"], "w")
        for word in words:
            await asyncio.to_thread(cards.append, job.id, 1, word)
            await asyncio.sleep(0.01)
        cards.queue.finish(held)
        found = await asyncio.wait_for(asyncio.gather(*readers), 60)
        assert streams._followed == {}
        return found

    found = asyncio.run(go())
    assert len(found) == 500 and all(parts == {1: "".join(words)} for parts in found)
    assert len(looks) < 400


@pytest.mark.parametrize(("kind", "retry"), [("no_text", False), ("engine_unavailable", True)])
def test_failures_are_told_and_a_job_that_will_try_again_goes_on(store, kind, retry):
    from datetime import UTC, datetime, timedelta

    cards, job = _job(store)
    held = cards.queue.claim(["answer"], "w")
    moment = (datetime.now(UTC) - timedelta(seconds=1)).replace(tzinfo=None) if retry else None
    cards.queue.fail(held, kind, "a reason", moment)

    async def go():
        streams = Streams(cards, look=0.01)
        reading = asyncio.create_task(_all(streams, job.id))
        await asyncio.sleep(0.1)
        if retry:
            assert not reading.done()
            cards.queue.finish(cards.queue.claim(["answer"], "w"))
        return await asyncio.wait_for(reading, 10)

    events = asyncio.run(go())
    if retry:
        assert events[0] == Event("queue", {"ahead": 0, "error": "a reason"}) and events[-1] == Event("done")
    else:
        assert events == [Event("failed", {"kind": kind, "error": "a reason"})]


def test_an_unknown_job_ends_at_once(store):
    events = asyncio.run(_all(Streams(cards_of(store)), 12345))
    assert [event.kind for event in events] == ["failed"] and events[0].data["kind"] == "gone"


def test_a_silent_stream_says_that_it_lives(store, monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.05)
    cards, job = _job(store)

    async def go():
        streams = Streams(cards, look=10.0)
        found = []
        async for event in streams.follow(job.id):
            found.append(event.kind)
            if found.count("beat") == 2:
                return found

    assert asyncio.run(asyncio.wait_for(go(), 10)) == ["queue", "beat", "beat"]


def test_a_database_that_fails_ends_the_stream_with_an_error(store, monkeypatch):
    cards, job = _job(store)

    def broken(*_):
        raise OSError("disk gone at /secret/place")

    monkeypatch.setattr(cards, "chunks", broken)
    events = asyncio.run(asyncio.wait_for(_all(Streams(cards, look=0.01), job.id), 10))
    assert events == [Event("failed", {"kind": "error", "error": "OSError"})]
