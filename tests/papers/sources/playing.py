"""The fixture day, played by a server, and what a store lists of it."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime

from tests.papers.arxiv_server import served

from danlu.lab.papers_arxiv import Arxiv, fixture_day
from danlu.papers.categories import parse_expression
from danlu.papers.lists import day_list, papers

DAY = date(2024, 1, 16)
NOW = datetime(2024, 1, 16, 12, tzinfo=UTC)
SUBJECT = parse_expression("cs.LG")
RECORDS = fixture_day()
LATE = str(RECORDS[50].paper)
LAGGING = {str(record.paper) for record in RECORDS[100:110]}


def arxiv(**changes):
    """The fixture day: of 133 papers the feed has 132, the interface 122 of them and the one that the feed lacks."""
    return Arxiv(**{"day": DAY, "records": RECORDS, "feed_lacks": {LATE}, "interface_lacks": LAGGING, **changes})


def playing(known, act):
    """Run ``act(server)`` beside a server."""

    async def main():
        async with served(known) as server:
            return await act(server)

    return asyncio.run(asyncio.wait_for(main(), 120))


def listed(store, day=DAY):
    """Identifiers of a day's list in order, and those that are marked as late."""
    entries = day_list(store, SUBJECT, day).entries
    found = papers(store, [entry.pk for entry in entries])
    names = [paper.paper.identifier for paper in found]
    return names, {name for name, entry in zip(names, entries, strict=True) if entry.late}
