"""Keeping a site complete: the feed first, the interface after it, again and again until they agree.

Whatever a source leaves out is never taken for a deletion, and an empty answer never empties a list.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

from danlu.papers.categories import members, parse_expression, vocabulary
from danlu.papers.net.fetch import Fetcher
from danlu.papers.records import PaperRecord
from danlu.papers.sources import arxiv_api, arxiv_feed
from danlu.papers.sources.arxiv_api import ARXIV_SOURCE
from danlu.papers.sources.completeness import count_day, gaps, listed_days, mark_late, place
from danlu.papers.sources.duplicates import link
from danlu.papers.sources.harvesting import harvest
from danlu.papers.sources.mailing import latest_mailing, mailing_day, next_refresh
from danlu.papers.sources.polls import SOURCE_ERRORS, PollReport, note_failure, note_poll, poll_row, state_of
from danlu.papers.sources.xml import BadDocument
from danlu.papers.store import Store

__all__ = ["PollReport", "fetch_papers", "harvest", "names_of", "poll"]

#: Between two polls that do not agree, and after they do.
AGAIN, LATER = timedelta(minutes=30), (timedelta(hours=12), timedelta(hours=36))
#: An empty page in the middle of a result is asked for again this often.
EMPTY_TRIES = 3


def names_of(expression: str) -> list[str]:
    """Archives and categories to poll for a subject expression; what it leaves out is filtered when it is read."""
    found: list[str] = []
    for name in parse_expression(expression).include:
        found += [name] if name in vocabulary() else sorted({vocabulary()[code].archive for code in members(name)})
    return list(dict.fromkeys(found))


async def poll(
    store: Store,
    fetcher: Fetcher,
    expression: str,
    now: datetime | None = None,
    feed: bool = True,
    interface: bool = True,
) -> PollReport:
    """Bring the lists of a subject up to date.

    Args:
        store: to write to.
        fetcher: that asks.
        expression: of subjects, such as ``cs.AI+cs.LG``.
        now: the time, with zone.
        feed: whether to read the daily feed.
        interface: whether to ask the query interface.

    Returns:
        What was brought; a source that fails is noted, and the others go on.
    """
    moment = now or datetime.now(UTC)
    report, agreed = PollReport(), True
    names = names_of(expression)
    for name in names:
        for source, read in (("rss", _poll_feed if feed else None), ("api", _poll_interface if interface else None)):
            try:
                agreed = (read is None or await read(store, fetcher, name, moment, report)) and agreed
            except SOURCE_ERRORS as error:
                agreed = False
                note_failure(store, source, name, moment, error, report)
    link(store)
    report.again_at = _next(store, names, agreed, moment)
    return report


async def fetch_papers(store: Store, fetcher: Fetcher, identifiers: Sequence[str]) -> list[str]:
    """Bring single papers that are not stored.

    Args:
        store: to write to.
        fetcher: that asks.
        identifiers: canonical ones of arXiv, at most 2000.

    Returns:
        Those that the source does not have either.

    Raises:
        FetchError: the source cannot be asked.
        ValueError: its answer cannot be read.
    """
    fetched = await fetcher.get(arxiv_api.ids_url(identifiers), ARXIV_SOURCE, prio=0)
    page = arxiv_api.parse_page(fetched.body)
    store.upsert(page.records)
    link(store)
    found = {record.paper.identifier for record in page.records}
    return [identifier for identifier in identifiers if identifier not in found]


async def _poll_feed(store: Store, fetcher: Fetcher, name: str, now: datetime, report: PollReport) -> bool:
    """Read a feed; whether it says what it said at the last poll."""
    row = poll_row(store, "rss", name)
    state = state_of(row)
    fetched = await fetcher.get(arxiv_feed.feed_url([name]), ARXIV_SOURCE, row["etag"], row["last_modified"])
    if fetched.not_modified:
        note_poll(store, "rss", name, now, cursor=_agreeing(state, now))
        report.day = _later(report.day, state.get("day"))
        return True
    feed = arxiv_feed.parse_feed(fetched.body, [name])
    digest = _digest(feed.records)
    same = digest == row["body_sha"]
    marks: dict[str, Any] = {"etag": fetched.etag, "last_modified": fetched.last_modified, "body_sha": digest}
    if feed.day is not None:
        shown = state.get("day")
        known = shown is not None and feed.day.isoformat() <= shown
        records = mark_late(store, feed.records, feed.day, members(name)) if known else list(feed.records)
        # Before writing: what was late already is counted once.
        report.late += 0 if same else _count_late(store, records)
        report.written += store.upsert(records)
        if not known:
            state = {"day": feed.day.isoformat(), "before": shown}
        listed = [record.paper.identifier for record in records if any(p.kind == "new" for p in record.listings)]
        warnings = gaps(listed) + ([f"{feed.skipped} entries could not be read"] if feed.skipped else [])
        report.warnings += warnings
        got = sum(any(p.kind != "replace" for p in record.listings) for record in records)
        marks |= {"got_n": got, "expected_n": count_day(store, feed.day, members(name)), "warning": "; ".join(warnings)}
    state = _agreeing(state, now) if same else {**state, "agreed": None, "asked": 0}
    note_poll(store, "rss", name, now, cursor=state, **marks)
    report.day = _later(report.day, state.get("day"))
    return same


async def _poll_interface(store: Store, fetcher: Fetcher, name: str, now: datetime, report: PollReport) -> bool:
    """Details from the interface, and papers of the last two lists that the feed has not; whether there are none."""
    state = state_of(poll_row(store, "rss", name))
    first = state.get("before") or state.get("day")
    since = date.fromisoformat(first) if first else latest_mailing(now)
    found: list[PaperRecord] = []
    for code in _asked(name):
        found += await _recent(fetcher, code, since)
    placed = place(store, found, members(name))
    report.late += placed.late
    report.written += store.upsert(placed.records)
    day = date.fromisoformat(state["day"]) if state.get("day") else max(placed.days, default=None)
    report.day = report.day or day
    if day is not None:
        counts = {"got_n": placed.days[day], "expected_n": count_day(store, day, members(name))}
        note_poll(store, "api", name, now, **counts)
    else:
        note_poll(store, "api", name, now)
    return not placed.late


def _asked(name: str) -> list[str]:
    """Categories to ask the interface for: it knows an archive that has categories only by them."""
    parents = {category.archive for category in vocabulary().values() if category.code != category.archive}
    return sorted(
        code for code in members(name) if code not in parents and (code == name or code.startswith(f"{name}."))
    )


async def _recent(fetcher: Fetcher, code: str, since: date) -> list[PaperRecord]:
    """The papers of a category that were submitted for a mailing or later, newest first."""
    found: list[PaperRecord] = []
    start = 0
    while start < arxiv_api.DEPTH:
        page = await _page(fetcher, code, start)
        found += page.records
        oldest = min((record.submitted_at for record in page.records if record.submitted_at), default=None)
        start += len(page.records) + page.skipped
        if (oldest is not None and mailing_day(oldest) < since) or start >= page.total:
            break
    return [record for record in found if record.submitted_at and mailing_day(record.submitted_at) >= since]


async def _page(fetcher: Fetcher, code: str, start: int) -> arxiv_api.Page:
    """One page; asked for again where it is empty although there should be more."""
    total = 0
    for _ in range(EMPTY_TRIES):
        fetched = await fetcher.get(arxiv_api.category_url(code, start), ARXIV_SOURCE)
        page = arxiv_api.parse_page(fetched.body)
        if page.records or page.skipped or start >= page.total:
            return page
        total = page.total
    raise BadDocument(f"the interface gave {EMPTY_TRIES} empty pages for {code} at {start} of {total}")


def _count_late(store: Store, records: Iterable[PaperRecord]) -> int:
    """How many records are late and stand in no list yet."""
    late = {record.paper.identifier for record in records if any(each.late for each in record.listings)}
    return len(late - listed_days(store, sorted(late)).keys())


def _digest(records: Iterable[PaperRecord]) -> str:
    """A hash of what a feed lists: its own date of generation changes at every request."""
    lines = (
        f"{record.paper} {record.version} {[(p.category, p.kind) for p in record.listings]} {record.title}"
        for record in records
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _agreeing(state: dict[str, Any], now: datetime) -> dict[str, Any]:
    """The state of a feed that said the same again: since when it does, and how often it was asked since."""
    return {**state, "agreed": state.get("agreed") or now.isoformat(), "asked": state.get("asked", 0) + 1}


def _next(store: Store, names: Sequence[str], agreed: bool, now: datetime) -> datetime:
    """When to poll again: soon while the feed still changes, else twice more in the day, and for each new day."""
    when = now + AGAIN
    if agreed:
        states = [state_of(poll_row(store, "rss", name)) for name in names]
        asked = min((state.get("asked", 0) for state in states), default=0)
        when = now + LATER[min(max(asked - 1, 0), len(LATER) - 1)]
    return min(when, next_refresh(now)).astimezone(UTC).replace(tzinfo=None)


def _later(first: date | None, text: str | None) -> date | None:
    second = date.fromisoformat(text) if text else None
    return max((day for day in (first, second) if day is not None), default=None)
