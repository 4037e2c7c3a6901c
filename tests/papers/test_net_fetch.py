from __future__ import annotations

import asyncio
import gzip
import time
import zlib
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import pytest

from danlu.papers.ids import Source
from danlu.papers.net.errors import BadContent, CircuitOpen, NotFound, Refused, Rejected, TooLarge, Unavailable
from danlu.papers.net.fetch import Fetcher
from danlu.papers.net.policy import Policy
from danlu.papers.store import Store

SOURCE = Source("Test", "", None, ("papers.example", "other.example"))
URL = "https://papers.example/feed?x=1"
QUICK = Policy(attempts=5, deadline=900.0, wait_initial=3.0, jitter=0.0)


def _reply(status=200, body=b"hello", **headers):
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


RESET, TRUNCATED = b"", b"HTTP/1.1 200 X\r\nContent-Length: 100\r\nConnection: close\r\n\r\nhalf"


@asynccontextmanager
async def _served(*script):
    """A server that plays a script, one answer a connection, and keeps what it was asked."""
    asked, answers = [], list(script)

    async def handle(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        asked.append(head)
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if callable(answer):
            answer = await answer()
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        yield f"http://127.0.0.1:{port}", asked


@pytest.fixture
def waits(monkeypatch):
    """The waits between tries, in no time."""
    found, sleep = [], asyncio.sleep

    async def quick(seconds, *rest):
        if seconds >= 0.5:
            found.append(seconds)
            seconds = 0
        await sleep(seconds, *rest)

    monkeypatch.setattr(asyncio, "sleep", quick)
    return found


def _fetcher(base, policy=QUICK, **options):
    paces = {"papers.example": ("papers", 0.0), "other.example": ("other", 0.0)}
    mirrors = {"papers.example": base, "other.example": base}
    return Fetcher(Store(), "me@example.org", policy, mirrors, random=lambda: 0.0, paces=paces, **options)


def _get(*script, policy=QUICK, **options):
    async def main():
        async with _served(*script) as (base, asked):
            fetcher = _fetcher(base, policy)
            try:
                return await fetcher.get(URL, SOURCE, **options), asked
            except Exception as error:
                return error, asked

    return asyncio.run(asyncio.wait_for(main(), 20))


def test_an_answer_comes_back_whole_with_its_marks():
    found, asked = _get(
        _reply(ETag='"a"', Last_Modified="yesterday", Content_Type="Text/XML; charset=x"),
        etag='"b"',
        last_modified="before",
    )
    assert (found.status, found.body, found.etag, found.last_modified, found.content_type) == (
        200,
        b"hello",
        '"a"',
        "yesterday",
        "text/xml",
    )
    assert asked[0].startswith("GET /feed?x=1 HTTP/1.1") and "host: papers.example" in asked[0].lower()
    assert (
        'if-none-match: "b"' in asked[0].lower()
        and "me@example.org" in asked[0]
        and "if-modified-since: before" in asked[0].lower()
    )
    assert _get(_reply(304, b""))[0].not_modified


def test_what_fails_for_a_while_is_tried_again(waits):
    found, asked = _get(_reply(503), _reply(429, Retry_After="1"), RESET, TRUNCATED, _reply())
    assert found.body == b"hello" and len(asked) == 5
    assert waits == [3.0, 1.0, 12.0, 24.0]


@pytest.mark.parametrize(
    ("status", "kind"), [(404, NotFound), (410, NotFound), (400, Rejected), (403, Rejected), (422, Rejected)]
)
def test_what_a_new_try_will_not_change_is_not_tried_again(status, kind):
    found, asked = _get(_reply(status), _reply())
    assert isinstance(found, kind) and len(asked) == 1 and found.attempts == 1 and found.retry_at is None


def test_tries_end_and_the_error_is_the_last_one_with_its_story(waits):
    found, asked = _get(_reply(503), _reply(500), _reply(502))
    assert isinstance(found, Unavailable) and "502" in str(found) and len(asked) == 5
    assert found.attempts == 5 and found.waited == 45.0 == sum(waits) and "after 5 tries" in found.__notes__[0]


def test_a_delay_beyond_the_deadline_fails_now_and_says_when_to_come_back(waits):
    policy = Policy(attempts=5, deadline=180.0, wait_initial=3.0, jitter=0.0)
    found, asked = _get(_reply(429, Retry_After="99999"), policy=policy)
    assert isinstance(found, Unavailable) and len(asked) == 1 and waits == []
    assert 590 < (found.retry_at - datetime.now(UTC).replace(tzinfo=None)).total_seconds() <= 600


def test_the_waits_never_exceed_the_deadline(waits):
    found, asked = _get(_reply(503), policy=Policy(attempts=50, deadline=22.0, wait_initial=3.0, jitter=0.0))
    assert waits == [3.0, 6.0, 12.0] and len(asked) == 4 and found.waited <= 22


def test_a_host_that_keeps_failing_is_left_alone(waits):
    async def main():
        async with _served(_reply(503)) as (base, asked):
            fetcher = _fetcher(base)
            for kind in (Unavailable, CircuitOpen):
                with pytest.raises(kind) as caught:
                    await fetcher.get(URL, SOURCE)
            return len(asked), caught.value.retry_at

    asked, retry_at = asyncio.run(main())
    assert asked == 5 and retry_at is not None


def test_retries_have_a_budget_over_all_requests(waits):
    async def main():
        async with _served(_reply(200)) as (base, _):
            fetcher = _fetcher(base, Policy(attempts=9, deadline=900, jitter=0.0))
            for _ in range(3):
                assert fetcher.may_retry("papers.example")
                fetcher._remember("papers.example", True)
            assert not fetcher.may_retry("papers.example")
            for _ in range(40):
                fetcher._remember("papers.example", False)
            return fetcher.may_retry("papers.example"), fetcher.may_retry("other.example")

    assert asyncio.run(main()) == (True, True)


@pytest.mark.parametrize(
    "target",
    [
        "http://papers.example/x",
        "https://evil.example/x",
        "https://127.0.0.1/x",
        "//evil.example/",
        "https://papers.example:444/",
        "file:///etc/passwd",
        "https://a@papers.example/",
    ],
)
def test_a_redirect_elsewhere_is_refused(target):
    found, asked = _get(_reply(302, b"", Location=target), _reply())
    assert isinstance(found, Refused) and len(asked) == 1


def test_a_redirect_within_the_source_is_followed_and_loops_end():
    found, asked = _get(_reply(301, b"", Location="https://other.example/new"), _reply())
    assert found.url == "https://other.example/new" and "host: other.example" in asked[1].lower()
    found, asked = _get(_reply(301, b"", Location="/again"))
    assert isinstance(found, Refused) and "redirects" in str(found) and len(asked) == 6


def test_a_name_that_resolves_into_the_own_network_is_refused():
    async def main(addresses):
        async def resolve(host):
            return addresses

        await Fetcher(Store(), resolve=resolve, paces={}).get(URL, SOURCE)

    for addresses in (["127.0.0.1"], ["8.8.8.8", "169.254.169.254"], ["::ffff:10.0.0.1"], []):
        with pytest.raises(Refused):
            asyncio.run(main(addresses))


def test_gzip_is_unpacked_and_counted():
    body = b"x" * 100_000
    assert _get(_reply(200, gzip.compress(body), Content_Encoding="gzip"))[0].body == body
    assert isinstance(_get(_reply(200, gzip.compress(body), Content_Encoding="gzip"), max_bytes=99_999)[0], TooLarge)
    assert _get(_reply(200, gzip.compress(body), Content_Encoding="gzip"), max_bytes=100_000)[0].body == body
    assert isinstance(_get(_reply(200, b"y" * 11), max_bytes=10)[0], TooLarge)


def test_a_bomb_ends_at_its_limit_in_little_memory():
    import tracemalloc

    bomb = gzip.compress(b"\0" * 200_000_000)
    tracemalloc.start()
    found, _ = _get(_reply(200, bomb, Content_Encoding="gzip"), max_bytes=2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(found, TooLarge) and peak < 20_000_000


@pytest.mark.parametrize("encoding", ["gzip, gzip", "br", "deflate", "gzip,identity", "zstd"])
def test_other_encodings_are_refused(encoding):
    found, asked = _get(_reply(200, zlib.compress(b"x"), Content_Encoding=encoding))
    assert isinstance(found, BadContent) and len(asked) == 1


def test_a_body_without_a_length_is_counted_too():
    endless = b"HTTP/1.1 200 X\r\nConnection: close\r\n\r\n" + b"z" * 5000
    assert isinstance(_get(endless, max_bytes=1000)[0], TooLarge)


def test_a_page_where_a_document_was_asked_is_an_error():
    found, asked = _get(_reply(200, b"<html>", Content_Type="text/html"), accept=("application/pdf",))
    assert isinstance(found, BadContent) and "text/html" in str(found) and "accept: application/pdf" in asked[0].lower()


def test_cancelling_during_a_wait_ends_at_once():
    async def main():
        async with _served(_reply(503)) as (base, _):
            task = asyncio.create_task(_fetcher(base, Policy(wait_initial=10.0, jitter=0.0)).get(URL, SOURCE))
            await asyncio.sleep(0.4)
            begin = time.perf_counter()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return time.perf_counter() - begin

    assert asyncio.run(main()) < 0.3


def test_jitter_spreads_clients_that_fail_together():
    import random

    def peak(policy):
        numbers = random.Random(0)
        starts = sorted(policy.wait(1, numbers.random) for _ in range(200))
        return max(sum(start <= other < start + 0.05 for other in starts) for start in starts)

    assert peak(Policy(jitter=0.0)) == 200 and peak(Policy(jitter=1.0)) <= 25
