"""A site of papers under load: pages, search, cards and streams over many papers in SQLite, with writes beside.

Every request goes through the whole application in this process (routing, middleware, templates, compression), one at a
time, so that a time is what the server itself needs. Meanwhile a second process writes and indexes papers, as a poll
does. The peer is a page that walks the table of papers for each request, filters and sorts in memory, and then renders
the same template. The stream is followed over sockets, from a site that a process of its own serves. The database is
built once, under build/.

    python benchmarks/papers_load.py [--papers 100000] [--requests 250] [--readers 500]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from sqlalchemy import select

from danlu.papers import lists, schema, synthetic
from danlu.papers.cards import QUESTIONS
from danlu.papers.categories import parse_expression
from danlu.papers.rows import Entry, PaperList
from danlu.papers.search import fts5, open_index
from danlu.papers.settings import Settings, load_settings
from danlu.papers.store import Store
from danlu.papers.web import ordering
from danlu.papers.web.app import create_app
from danlu.papers.web.lists import list_values
from danlu.papers.web.state import Site, open_site

BUILD = Path(__file__).parents[1] / "build" / "papers_load"
SUBJECTS = ("cs.AI", "cs.CL+cs.LG", "cs", "math", "cs.AI+cs.CV-cs.RO", "astro-ph", "cs,math-stat", "q-bio")
EXPRESSIONS = [text.replace(",", "+") for text in SUBJECTS]
#: What must hold: milliseconds at the 95th percentile, the ratio to the peer, and bytes of the first cards.
LIST_MS, SEARCH_MS, CARD_MS, RATIO, BYTES = 30.0, 60.0, 20.0, 10.0, 60_000
CARDS, CHUNKS = 200, 200

WRITER = """
import sys, time
from datetime import date
from pathlib import Path
from danlu.papers.search import open_index
from danlu.papers.store import Store
from danlu.papers.synthetic import generate

store, index = Store(sys.argv[1]), open_index(Path(sys.argv[2]))
print("writing", flush=True)
for seed in range(1000, 9999):
    # A day of a feed, as fast as a source that takes one request in three seconds lets feeds be read.
    store.upsert(generate(1000, seed, date(2025, 1, 2)), batch=1000)
    index.update(store)
    time.sleep(3)
"""


def built(papers: int) -> Path:
    """The folder of a site with so many papers; it is built where what it is built from has changed."""
    sources = b"".join(Path(str(module.__file__)).read_bytes() for module in (schema, synthetic))
    folder = BUILD / f"{papers}-{hashlib.sha256(sources).hexdigest()[:12]}-fts5-{fts5.FORMAT}"
    if not folder.exists():
        for old in BUILD.glob(f"{papers}-*"):
            shutil.rmtree(old)
        fresh = folder.with_suffix(".new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        store = Store(f"sqlite:///{fresh / 'papers.db'}")
        store.upsert(synthetic.generate(papers))
        index = open_index(fresh / "search")
        index.update(store)
        index.close()
        with contextlib.closing(sqlite3.connect(fresh / "papers.db", isolation_level=None)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        store.close()
        fresh.rename(folder)
    return folder


async def call(app: FastAPI, path: str, query: str = "") -> tuple[int, bytes, float, float]:
    """One request: status, body as sent, seconds, and seconds of a processor."""
    sent: list[dict[str, Any]] = []
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
        "headers": [(b"host", b"localhost"), (b"accept-encoding", b"gzip"), (b"accept", b"text/html")],
        "client": ("127.0.0.1", 1), "server": ("localhost", 80), "state": {},
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    start, spent = time.perf_counter(), time.process_time()
    await app(scope, receive, send)
    seconds, spent = time.perf_counter() - start, time.process_time() - spent
    body = b"".join(message.get("body", b"") for message in sent if message["type"] == "http.response.body")
    return int(sent[0]["status"]), body, seconds, spent


def add_peer(app: FastAPI, site: Site) -> None:
    """The peer: each request reads every paper's small columns, filters, sorts, and renders the same page."""

    def page(request: Any, day: date, text: str) -> Any:
        expression = parse_expression(text)
        wanted, unwanted = expression.codes()
        table = schema.paper
        query = select(table.c.pk, table.c.codes, table.c.announced_on, table.c.submitted_at)
        with site.store.reading() as connection:
            rows = connection.execute(query).all()
        of_day = [row for row in rows if row.announced_on == day]
        chosen = [row for row in of_day if wanted & (codes := set(row.codes.split())) and not unwanted & codes]
        chosen.sort(key=lambda row: row.submitted_at)
        found = PaperList(tuple(Entry(row.pk, "new") for row in chosen), 0, day)
        values = list_values(request, found, ordering.read(request.query_params), f"/arxiv/{text}", date=day)
        return request.app.state.pages.render(
            request, "list.html", expression=expression, day=day, days=[], earlier=None, later=None,
            total=len(chosen), late=0, crosses=0, **values,
        )  # fmt: skip

    from starlette.requests import Request

    def peer(request: Request) -> Any:
        return page(
            request, date.fromisoformat(request.query_params["date"]), request.query_params["of"].replace(" ", "+")
        )

    app.router.add_route("/peer", peer)
    # Before the routes that take any path.
    app.router.routes.insert(0, app.router.routes.pop())


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A process that writes and indexes papers for as long as the block runs."""
    words = [sys.executable, "-c", WRITER, f"sqlite:///{folder / 'papers.db'}", str(folder / "search")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        yield
        assert process.poll() is None, "the writer has died"
    finally:
        process.kill()
        process.communicate()


async def measure(app: FastAPI, requests: list[tuple[str, str]]) -> list[tuple[float, float]]:
    """Milliseconds of each request, and of a processor."""
    times = []
    for path, query in requests:
        status, _, seconds, spent = await call(app, path, query)
        assert status == 200, f"{path}?{query} gave {status}"
        times.append((1e3 * seconds, 1e3 * spent))
    return times


def percentiles(times: list[tuple[float, float]]) -> tuple[float, float, float, float]:
    """Median, 95th percentile, greatest, and the 95th percentile of the processor's."""
    walls, spent = zip(*times, strict=True)
    return statistics.median(walls), _p95(walls), max(walls), _p95(spent)


def _p95(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=20)[18]


def list_requests(count: int, days: list[date], chance: random.Random) -> list[tuple[str, str]]:
    """Readers look at some subjects of the last days."""
    return [(f"/arxiv/{chance.choice(EXPRESSIONS)}", f"date={chance.choice(days)}") for _ in range(count)]


def search_requests(count: int, titles: list[str], chance: random.Random) -> list[tuple[str, str]]:
    """One to four words of one title; no two searches are the same but by chance."""
    found = []
    for _ in range(count):
        words = re.findall(r"[a-z]+", chance.choice(titles).lower())
        found.append(
            ("/arxiv/search", "query=" + "+".join(chance.sample(words, min(len(words), chance.randint(1, 4)))))
        )
    return found


def fill_cards(site: Site, keys: list[int]) -> list[str]:
    """Finished cards on these papers; their identifiers."""
    papers = lists.papers(site.store, keys)
    for paper in papers:
        text = " ".join(paper.abstract.split()[:150])
        for number in range(1, QUESTIONS + 1):
            quotes = [{"text": text[:80], "start": 0, "end": 80, "section": "Abstract", "page": 1}]
            site.cards.write(paper.pk, paper.version or 0, "en", number, f"- {text}\n- {text[:200]}", quotes)
    return [str(paper.paper) for paper in papers]


def pages(site: Site, folder: Path, count: int) -> dict[str, Any]:
    """Times of pages, quiet and beside a process that writes."""
    app = create_app(site)
    add_peer(app, site)
    chance = random.Random(0)
    days = [day for day, _ in lists.days(site.store, parse_expression("cs"), 5, date(2025, 1, 1))]
    with site.store.reading() as connection:
        sample = connection.execute(
            select(schema.paper.c.pk, schema.paper.c.title).where(schema.paper.c.pk % 50 == 0)
        ).all()
    titles, keys = [row.title for row in sample], [row.pk for row in sample]
    cards = fill_cards(site, keys[:CARDS])
    kinds: dict[str, Callable[[], list[tuple[str, str]]]] = {
        "list": lambda: list_requests(count, days, chance),
        "search": lambda: search_requests(count // 2, titles, chance),
        "card": lambda: [(f"/answers/{chance.choice(cards)}", "") for _ in range(count)],
    }
    found: dict[str, Any] = {}

    async def run() -> None:
        await measure(app, list_requests(40, days, chance) + search_requests(5, titles, chance))
        for name, make in kinds.items():
            found[f"{name}, quiet"] = percentiles(await measure(app, make()))
        sizes = []
        for path, query in {(f"/arxiv/{text}", f"date={days[0]}") for text in EXPRESSIONS}:
            _, body, _, _ = await call(app, path, query)
            sizes.append((gzip.decompress(body).count(b"<article"), len(body)))
        found["size"] = max(size for cards, size in sizes if cards == 25)
        ours: list[tuple[float, float]] = []
        theirs: list[tuple[float, float]] = []
        for path, query in list_requests(12, days, chance):
            text = path.removeprefix("/arxiv/").replace("+", "%2B")
            theirs += await measure(app, [("/peer", f"{query}&of={text}")])
            ours += await measure(app, [(path, query)] * 5)
        found["peer"] = statistics.median(wall for wall, _ in theirs)
        for name, times in (("rate", ours), ("peer rate", theirs)):
            found[name] = 1e3 / statistics.mean(wall for wall, _ in times)
        with writing(folder):
            for name, make in kinds.items():
                found[f"{name}, beside writes"] = percentiles(await measure(app, make()))

    asyncio.run(run())
    return found


async def reader(
    port: int, path: str, job: int, breaks: bool, started: asyncio.Semaphore
) -> tuple[list[tuple[int, str]], str]:
    """Follow a stream to its end; one that breaks loses the connection on the way and says what it has."""
    got: list[tuple[int, str]] = []
    while True:
        inward, outward = await asyncio.open_connection("127.0.0.1", port)
        last = f"Last-Event-ID: {got[-1][0]}\r\n" if got else ""
        outward.write(f"GET {path}?job={job} HTTP/1.1\r\nHost: localhost\r\n{last}\r\n".encode())
        event: dict[str, str] = {}
        started.release()
        async for raw in inward:
            line = raw.decode().rstrip("\r\n")
            name, colon, value = line.partition(": ")
            if colon and name in ("id", "event", "data"):
                event[name] = value
            elif not line and event:
                if event.get("event") == "text":
                    got.append((int(event["id"]), json.loads(event["data"])["text"]))
                elif event.get("event") in ("done", "failed"):
                    outward.close()
                    return got, event["event"]
                event = {}
                if breaks and len(got) == CHUNKS // 3:
                    breaks = False
                    break
        outward.close()


def streams(settings: Settings, readers: int) -> dict[str, Any]:
    """Readers of one answer that this process writes and another one serves."""
    site = open_site(settings)
    paper = lists.papers(site.store, [1])[0]
    job = site.queue.put("answer", "benchmark", {"pk": 1, "version": 1, "lang": "en"})
    held = site.queue.claim(["answer"], "benchmark")
    assert held is not None and held.id == job.id
    words = [sys.executable, "-m", "danlu", "papers", "serve", "--port", "0", "--workers", "0"]
    server = subprocess.Popen([*words, "--data", str(settings.data)], stderr=subprocess.PIPE, text=True)
    texts = [f"piece {number}: " + "text of an answer " * 3 for number in range(CHUNKS)]
    late: list[float] = []

    def write() -> None:
        for text in texts:
            site.cards.append(job.id, 1, text)
            time.sleep(0.03)
        site.queue.finish(held)

    async def run() -> list[tuple[list[tuple[int, str]], str]]:
        started = asyncio.Semaphore(0)
        path = f"/answers/{paper.paper}/stream"
        following = [
            asyncio.create_task(reader(port, path, job.id, number % 2 == 1, started)) for number in range(readers)
        ]
        for _ in range(readers):
            await started.acquire()
        await asyncio.to_thread(write)
        end = time.perf_counter()
        found = await asyncio.wait_for(asyncio.gather(*following), 120)
        late.append(time.perf_counter() - end)
        return found

    try:
        assert server.stderr is not None
        port = int(re.search(r":([0-9]+) ", server.stderr.readline())[1])  # type: ignore[index]
        # Whatever it says later must not fill the pipe.
        threading.Thread(target=server.stderr.read, daemon=True).start()
        found = asyncio.run(run())
    finally:
        server.terminate()
        server.wait(20)
        site.close()
    whole = sum([text for _, text in got] == texts and end == "done" for got, end in found)
    return {"readers": readers, "whole": whole, "late": late[0]}


def report(found: dict[str, Any], papers: int) -> tuple[str, bool]:
    """The table, and whether everything held."""
    rows, good = [], True

    def row(what: str, value: str, bound: str, held: bool) -> None:
        nonlocal good
        good = good and held
        rows.append(f"| {what} | {value} | {bound} | {'yes' if held else '**no**'} |")

    for name, bound in (("list", LIST_MS), ("search", SEARCH_MS), ("card", CARD_MS)):
        for how in ("quiet", "beside writes"):
            median, high, worst, spent = found[f"{name}, {how}"]
            value = f"{median:.1f} / {high:.1f} / {worst:.0f} ({spent:.1f})"
            row(f"{name} page, {how}: ms at p50 / p95 / worst (p95 of CPU)", value, f"p95 < {bound:.0f}", high < bound)
    ratio = found["rate"] / found["peer rate"]
    row(
        "list pages a second, beside the page that walks the table",
        f"{found['rate']:.0f} : {found['peer rate']:.1f} = {ratio:.0f}x",
        f">= {RATIO:.0f}x",
        ratio >= RATIO,
    )
    size = found["size"]
    row("first 25 cards, gzipped, the largest of the lists", f"{size:,} bytes", f"< {BYTES:,}", size < BYTES)
    row(
        f"readers of one stream that got all of {CHUNKS} chunks once and in order, half of them after a reconnection",
        f"{found['whole']} of {found['readers']}",
        "all",
        found["whole"] == found["readers"],
    )
    lines = [
        "# Papers: a site under load",
        "",
        f"{papers:,} made-up papers in SQLite {sqlite3.sqlite_version} and FTS5, Python {sys.version.split()[0]}; "
        "one request at a time through the whole application in one process. Beside writes: another process writes and "
        "indexes a thousand papers again and again, three seconds apart. Lists: "
        f"{len(EXPRESSIONS)} subjects, five days; searches: one to four words of a title, hardly ever the same.",
        "",
        "| what | measured | must be | holds |",
        "| --- | ---: | ---: | --- |",
        *rows,
        "",
        f"Load of the machine during the run: {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores; other work lengthens "
        f"every time but that of the CPU. The peer's page takes {found['peer']:.0f} ms. The last reader had the "
        f"end of the stream {found['late']:.1f} s after it was written.",
    ]
    return "\n".join(lines) + "\n", good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--papers", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=250)
    parser.add_argument("--readers", type=int, default=500)
    options = parser.parse_args()
    kept = built(options.papers)
    folder = kept.with_name("run")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(kept, folder)
    settings = load_settings(environment={}, data=folder, sample=False, limits__searches_per_minute=1_000_000)
    site = open_site(settings)
    try:
        found = pages(site, folder, options.requests)
    finally:
        site.close()
    found |= streams(settings, options.readers)
    shutil.rmtree(folder)
    table, good = report(found, options.papers)
    print(table)
    if options == parser.parse_args([]):
        Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")
    sys.exit(not good)


if __name__ == "__main__":
    main()
