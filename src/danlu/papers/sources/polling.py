"""Keeping a site complete: the feed first, the interface and the archive after it, again and again until they agree.

Whatever a source leaves out is never taken for a deletion, and an empty answer never empties a list.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy import select

from danlu.papers import schema
from danlu.papers.categories import members, parse_expression, vocabulary
from danlu.papers.ids import ARXIV, SOURCES, PaperId
from danlu.papers.net.errors import FetchError
from danlu.papers.net.fetch import Fetcher
from danlu.papers.records import Listing, PaperRecord
from danlu.papers.sources import arxiv_api, arxiv_feed, arxiv_oai
from danlu.papers.sources.arxiv_api import ApiError
from danlu.papers.sources.arxiv_oai import HarvestError
from danlu.papers.sources.mailing import mailing_day, next_refresh
from danlu.papers.sources.xml import BadDocument
from danlu.papers.store import Store, Written

logger = logging.getLogger("danlu.papers.polling")

ARXIV_SOURCE = replace(SOURCES[ARXIV], hosts=("arxiv.org", "export.arxiv.org", "rss.arxiv.org", "oaipmh.arxiv.org"))
#: Between two polls that do not agree; after they do; and the identifiers of a day that may be missing in a row.
AGAIN, LATER, GAP = timedelta(minutes=30), (timedelta(hours=12), timedelta(hours=36)), 50
#: An empty page in the middle of a result is asked for again this often.
EMPTY_TRIES = 3
_ERRORS = (FetchError, BadDocument, ApiError, HarvestError)


@dataclass
class PollReport:
    """What a poll brought.

    Args:
        day: of the list, None where none was mailed.
        written: what changed in the store.
        late: papers that the list had missed before.
        warnings: what the operator should know.
        again_at: when to poll next, in UTC without zone.
        errors: of sources that gave nothing, by name.
    """

    day: date | None = None
    written: Written = field(default_factory=Written)
    late: int = 0
    warnings: list[str] = field(default_factory=list)
    again_at: datetime | None = None
    errors: dict[str, str] = field(default_factory=dict)


def names_of(expression: str) -> list[str]:
    """Archives and categories to poll for a subject expression; what it leaves out is filtered when it is read."""
    found: list[str] = []
    for name in parse_expression(expression).include:
        found += [name] if name in vocabulary() else sorted({vocabulary()[code].archive for code in members(name)})
    return list(dict.fromkeys(found))


async def poll(store: Store, fetcher: Fetcher, expression: str, now: datetime | None = None) -> PollReport:
    """Bring the lists of a subject up to date.

    Args:
        store: to write to.
        fetcher: that asks.
        expression: of subjects, such as ``cs.AI+cs.LG``.
        now: the time, with zone.

    Returns:
        What was brought; a source that fails is noted, and the others go on.
    """
    moment = now or datetime.now(UTC)
    report, agreed = PollReport(), True
    for name in names_of(expression):
        try:
            agreed = await _poll_feed(store, fetcher, name, moment, report) and agreed
        except _ERRORS as error:
            agreed = False
            _note_failure(store, "rss", name, moment, error, report)
            continue
        try:
            await _poll_interface(store, fetcher, name, moment, report)
        except _ERRORS as error:
            _note_failure(store, "api", name, moment, error, report)
    report.again_at = _next(store, names_of(expression), agreed, moment)
    return report


async def _poll_feed(store: Store, fetcher: Fetcher, name: str, now: datetime, report: PollReport) -> bool:
    """Read a feed; whether it says what it said at the last poll."""
    row = poll_row(store, "rss", name)
    fetched = await fetcher.get(arxiv_feed.feed_url([name]), ARXIV_SOURCE, row["etag"], row["last_modified"])
    state = json.loads(row["cursor"] or "{}")
    if fetched.not_modified:
        note_poll(store, "rss", name, now, cursor=_agreeing(state, now))
        report.day = _later(report.day, state.get("day"))
        return True
    feed = arxiv_feed.parse_feed(fetched.body, [name])
    digest = _digest(feed.records)
    same = digest == row["body_sha"]
    if feed.day is not None:
        known = state.get("day") == feed.day.isoformat()
        records = _mark_late(store, feed.records, feed.day, members(name)) if known and not same else list(feed.records)
        report.late += sum(any(place.late for place in record.listings) for record in records)
        report.written += store.upsert(records)
        report.warnings += gaps(record.paper.identifier for record in records if _is_new(record))
        if not known:
            state = {"day": feed.day.isoformat()}
    state = _agreeing(json.dumps(state), now) if same else {**state, "agreed": None, "asked": 0}
    marks = {
        "etag": fetched.etag,
        "last_modified": fetched.last_modified,
        "body_sha": digest,
        "got_n": len(feed.records),
    }
    expected = (
        max(row["expected_n"] or 0, len(feed.records))
        if state.get("day") == (feed.day and feed.day.isoformat())
        else len(feed.records)
    )
    warning = f"{feed.skipped} entries could not be read" if feed.skipped else ""
    note_poll(store, "rss", name, now, cursor=state, expected_n=expected, warning=warning, **marks)
    report.day = _later(report.day, state.get("day"))
    return same


async def _poll_interface(store: Store, fetcher: Fetcher, name: str, now: datetime, report: PollReport) -> None:
    """Details from the interface, and papers of the day that the feed has not."""
    day = json.loads(poll_row(store, "rss", name)["cursor"] or "{}").get("day")
    if day is None:
        return
    today = date.fromisoformat(day)
    found: list[PaperRecord] = []
    for code in sorted(each for each in members(name) if each == name or each.startswith(f"{name}.")):
        if code in {category.archive for category in vocabulary().values() if category.code != category.archive}:
            continue
        found += await _recent(fetcher, code, today)
    records = _complete(store, found, today, members(name))
    report.late += sum(any(place.late for place in record.listings) for record in records)
    report.written += store.upsert(records)
    note_poll(store, "api", name, now, got_n=len(records))


async def _recent(fetcher: Fetcher, code: str, day: date) -> list[PaperRecord]:
    """The papers of a category that were submitted for a mailing or later, newest first."""
    found: list[PaperRecord] = []
    start = 0
    while start < arxiv_api.DEPTH:
        page = await _page(fetcher, code, start)
        found += page.records
        oldest = min((record.submitted_at for record in page.records if record.submitted_at), default=None)
        start += len(page.records) + page.skipped
        if oldest is None or mailing_day(oldest) < day or start >= page.total:
            break
    return [record for record in found if record.submitted_at and mailing_day(record.submitted_at) >= day]


async def _page(fetcher: Fetcher, code: str, start: int) -> arxiv_api.Page:
    """One page; asked for again where it is empty although there should be more."""
    for _ in range(EMPTY_TRIES):
        fetched = await fetcher.get(arxiv_api.category_url(code, start), ARXIV_SOURCE)
        page = arxiv_api.parse_page(fetched.body)
        if page.records or page.skipped or start >= page.total:
            return page
    raise BadDocument(f"the interface gave {EMPTY_TRIES} empty pages for {code} at {start} of {page.total}")


async def harvest(store: Store, fetcher: Fetcher, archive: str = "", now: datetime | None = None) -> PollReport:
    """Take every change since the last harvest from arXiv's OAI-PMH interface; broken off, it goes on where it was.

    Args:
        store: to write to.
        fetcher: that asks.
        archive: a set of the interface such as ``cs``; all unless given.
        now: the time, with zone.
    """
    moment = now or datetime.now(UTC)
    report = PollReport()
    row = poll_row(store, "oai", archive)
    state = json.loads(row["cursor"] or "{}")
    count = 0
    try:
        while True:
            since = date.fromisoformat(state["since"]) if state.get("since") else None
            url = arxiv_oai.list_url(token=state.get("token", ""), since=since, archive=archive)
            try:
                page = arxiv_oai.parse_harvest((await fetcher.get(url, ARXIV_SOURCE)).body)
            except HarvestError as error:
                if error.code != "badResumptionToken" or not state.get("token"):
                    raise
                state = {**state, "token": "", "since": state.get("stamp") or state.get("since")}
                continue
            report.written += store.upsert(page.records)
            count += len(page.records)
            stamp = page.datestamp.isoformat() if page.datestamp else state.get("stamp")
            state = {
                "since": state.get("since"),
                "begun": state.get("begun") or page.responded_on.isoformat(),
                "token": page.token,
                "stamp": stamp,
            }
            if not page.token:
                state = {"since": state["begun"]}
            note_poll(store, "oai", archive, moment, cursor=state, got_n=count)
            if not page.token:
                return report
    except _ERRORS as error:
        _note_failure(store, "oai", archive, moment, error, report)
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
    found = {record.paper.identifier for record in page.records}
    return [identifier for identifier in identifiers if identifier not in found]


def gaps(identifiers: Iterable[str]) -> list[str]:
    """Warnings about runs of identifiers that are missing from a day's list."""
    numbers: dict[str, list[int]] = {}
    for identifier in identifiers:
        month, dot, number = identifier.partition(".")
        if dot:
            numbers.setdefault(month, []).append(int(number))
    found = []
    for month, listed in numbers.items():
        listed.sort()
        for before, after in zip(listed, listed[1:], strict=False):
            if after - before > GAP:
                found.append(f"{after - before - 1} identifiers in a row are missing after {month}.{before}")
    return found


def poll_row(store: Store, source: str, key: str) -> dict[str, Any]:
    """What is known of a source's last poll."""
    table = schema.poll
    with store.reading() as connection:
        row = connection.execute(select(table).where(table.c.source == source, table.c.key == key)).mappings().first()
    if row is not None:
        return dict(row)
    return {
        **{column.name: None for column in table.columns},
        "etag": "",
        "last_modified": "",
        "body_sha": "",
        "cursor": "",
    }


def note_poll(store: Store, source: str, key: str, now: datetime, **values: Any) -> None:
    """Note that a source was read."""
    moment = now.astimezone(UTC).replace(tzinfo=None, microsecond=0)
    if isinstance(values.get("cursor"), dict):
        values["cursor"] = json.dumps(values["cursor"])
    _write(store, source, key, {"last_ok": moment, "last_try": moment, "error": "", **values})


def _note_failure(store: Store, source: str, key: str, now: datetime, error: Exception, report: PollReport) -> None:
    logger.warning("poll of %s %s failed: %s", source, key, error)
    report.errors[f"{source} {key}".strip()] = str(error)
    moment = now.astimezone(UTC).replace(tzinfo=None, microsecond=0)
    _write(store, source, key, {"last_try": moment, "error": f"{type(error).__name__}: {error}"[:1000]})


def _write(store: Store, source: str, key: str, values: dict[str, Any]) -> None:
    table = schema.poll
    here = (table.c.source == source, table.c.key == key)
    with store.writing() as connection:
        if connection.execute(table.update().where(*here).values(values)).rowcount == 0:
            connection.execute(table.insert().values(source=source, key=key, **values))


def _agreeing(state: Any, now: datetime) -> dict[str, Any]:
    """The state of a feed that said the same again: since when it does, and how often it was asked since."""
    known = json.loads(state) if isinstance(state, str) else dict(state)
    return {**known, "agreed": known.get("agreed") or now.isoformat(), "asked": known.get("asked", 0) + 1}


def _next(store: Store, names: Sequence[str], agreed: bool, now: datetime) -> datetime:
    """When to poll again: soon while the feed still changes, else twice more in the day, and for each new day."""
    when = now + AGAIN
    if agreed:
        states = [json.loads(poll_row(store, "rss", name)["cursor"] or "{}") for name in names]
        asked = min((state.get("asked", 0) for state in states), default=0)
        when = now + LATER[min(max(asked - 1, 0), len(LATER) - 1)]
    return min(when, next_refresh(now)).astimezone(UTC).replace(tzinfo=None)


def _mark_late(store: Store, records: Iterable[PaperRecord], day: date, codes: Iterable[str]) -> list[PaperRecord]:
    """Records of a list that was shown before: those that it did not have are late."""
    table = schema.listing
    query = (
        select(schema.paper.c.ext_id)
        .join(table, table.c.pk == schema.paper.c.pk)
        .where(table.c.announced_on == day, table.c.cat.in_(sorted(codes)), schema.paper.c.source == ARXIV)
    )
    with store.reading() as connection:
        known = set(connection.scalars(query))
    return [
        record
        if record.paper.identifier in known
        else replace(record, listings=tuple(replace(place, late=True) for place in record.listings))
        for record in records
    ]


def _complete(store: Store, found: Iterable[PaperRecord], day: date, codes: frozenset[str]) -> list[PaperRecord]:
    """Details of papers, with a place in the day's list for those that belong there and stand in no list at all."""
    unique: dict[PaperId, PaperRecord] = {record.paper: record for record in found}
    listed = _listed(store, [paper.identifier for paper in unique])
    records = []
    for paper, record in unique.items():
        if paper.identifier not in listed and record.submitted_at and mailing_day(record.submitted_at) == day:
            places = [code for code in record.categories if code in codes]
            listings = tuple(
                Listing(
                    day, code, "new" if code == record.categories[0] else "cross", None, late=True, approximate=True
                )
                for code in places
            )
            record = replace(record, listings=listings)
        records.append(record)
    return records


def _listed(store: Store, identifiers: list[str]) -> set[str]:
    table = schema.listing
    found: set[str] = set()
    with store.reading() as connection:
        for first in range(0, len(identifiers), 1000):
            part = identifiers[first : first + 1000]
            query = (
                select(schema.paper.c.ext_id)
                .join(table, table.c.pk == schema.paper.c.pk)
                .where(schema.paper.c.source == ARXIV, schema.paper.c.ext_id.in_(part), sa.not_(table.c.approximate))
            )
            found |= set(connection.scalars(query))
    return found


def _is_new(record: PaperRecord) -> bool:
    return any(place.kind == "new" for place in record.listings)


def _digest(records: Iterable[PaperRecord]) -> str:
    """A hash of what a feed lists: its own date of generation changes at every request."""
    lines = (
        f"{record.paper} {record.version} {[(p.category, p.kind) for p in record.listings]} {record.title}"
        for record in records
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _later(first: date | None, text: str | None) -> date | None:
    second = date.fromisoformat(text) if text else None
    return max((day for day in (first, second) if day is not None), default=None)
