"""Taking every change from arXiv's OAI-PMH interface, page by page; broken off, a harvest goes on where it was."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any

from danlu.papers.net.fetch import Fetcher
from danlu.papers.records import PaperRecord
from danlu.papers.sources import arxiv_oai
from danlu.papers.sources.arxiv_api import ARXIV_SOURCE
from danlu.papers.sources.arxiv_oai import HarvestError
from danlu.papers.sources.completeness import place
from danlu.papers.sources.duplicates import link
from danlu.papers.sources.polls import SOURCE_ERRORS, PollReport, note_failure, note_poll, poll_row, state_of
from danlu.papers.store import Store

#: A token that is refused makes a harvest start again from the last complete page, so often in one call.
_RESTARTS = 3
#: Papers submitted so long before the last harvest may still be missing in a day's list.
_RECENT = timedelta(days=7)


async def harvest(store: Store, fetcher: Fetcher, archive: str = "", now: datetime | None = None) -> PollReport:
    """Take every change since the last harvest.

    Args:
        store: to write to.
        fetcher: that asks.
        archive: a set of the interface such as ``cs`` or ``physics:hep-th``; all unless given.
        now: the time, with zone.

    Returns:
        What was brought; a failure is noted in it.
    """
    moment = now or datetime.now(UTC)
    report = PollReport()
    state = state_of(poll_row(store, "oai", archive))
    count = restarts = skipped = 0
    try:
        while True:
            token = state.get("token", "")
            since = date.fromisoformat(state["since"]) if state.get("since") else None
            try:
                url = arxiv_oai.list_url(token=token, since=_from(state, since), archive=archive)
                page = arxiv_oai.parse_harvest((await fetcher.get(url, ARXIV_SOURCE)).body)
                if page.token and page.token == token:
                    raise HarvestError("badResumptionToken", "the interface gives the same page again and again")
            except HarvestError as error:
                restarts += 1
                if error.code != "badResumptionToken" or not token or restarts > _RESTARTS:
                    raise
                state = {**state, "token": ""}
                continue
            recent = _recent(page.records, since)
            placed = place(store, recent)
            kept = {record.paper for record in recent}
            rest = (record for record in page.records if record.paper not in kept)
            report.written += store.upsert([*placed.records, *rest])
            report.late += placed.late
            count += len(page.records)
            skipped += page.skipped
            state = _after(state, page)
            warning = f"{skipped} records could not be read" if skipped else ""
            note_poll(store, "oai", archive, moment, cursor=state, got_n=count, warning=warning)
            if not page.token:
                report.warnings += [warning] if warning else []
                break
    except SOURCE_ERRORS as error:
        note_failure(store, "oai", archive, moment, error, report)
    link(store)
    return report


def _from(state: dict[str, Any], since: date | None) -> date | None:
    """Where to start without a token: behind the pages that are complete, if they come in the order of their dates."""
    stamp = state.get("stamp")
    return date.fromisoformat(stamp) if stamp and state.get("ordered", True) else since


def _after(state: dict[str, Any], page: arxiv_oai.Harvest) -> dict[str, Any]:
    begun = state.get("begun") or page.responded_on.isoformat()
    if not page.token:
        return {"since": begun}
    stamp, ordered = state.get("stamp"), state.get("ordered", True)
    if page.datestamp and page.earliest:
        ordered = ordered and (stamp is None or page.earliest.isoformat() >= stamp)
        stamp = max(stamp or "", page.datestamp.isoformat())
    return {"since": state.get("since"), "begun": begun, "token": page.token, "stamp": stamp, "ordered": ordered}


def _recent(records: tuple[PaperRecord, ...], since: date | None) -> list[PaperRecord]:
    """The papers of a page that may belong into lists: of the first harvest all, later those that are new."""
    return [
        record
        for record in records
        if record.submitted_at and (since is None or record.submitted_at.date() >= since - _RECENT)
    ]
