from __future__ import annotations

from dataclasses import replace
from datetime import date

import pytest
from tests.papers.sources.playing import DAY, NOW, RECORDS, arxiv, listed, playing

from danlu.lab.papers_arxiv import Arxiv, oai, oai_error
from danlu.papers.lists import find, papers
from danlu.papers.sources import harvesting
from danlu.papers.sources.polling import harvest
from danlu.papers.sources.polls import poll_row
from danlu.papers.store import Store


def test_a_harvest_brings_every_record_and_the_next_starts_where_it_ended(store):
    async def act(server):
        fetcher = server.fetcher(store)
        first = await harvest(store, fetcher, "cs", NOW)
        asked = list(server.arxiv.asked)
        second = await harvest(store, fetcher, "cs", NOW)
        return first, second, asked, server.arxiv.asked[len(asked) :]

    first, second, asked, again = playing(arxiv(interface_lacks=()), act)
    assert first.written.added == 133 and (second.written.added, second.written.changed) == (0, 0)
    assert len(asked) == 3 and "from=" not in asked[0] and "resumptionToken=50" in asked[1] and "set" not in asked[1]
    assert "from=2024-01-16" in again[0]
    assert len(listed(store)[0]) + len(listed(store, date(2024, 1, 15))[0]) == 133


class Pages(Arxiv):
    """An archive that plays a script of pages."""

    def answer(self, url):
        self.asked.append(url)
        return 200, self.pages.pop(0)


def scripted(*pages):
    known = Pages(DAY, ())
    known.pages = list(pages)
    return known


def page(first, count, stamp, token):
    records = [replace(r, version=None, versions=()) for r in RECORDS[first : first + count]]
    return oai(records, DAY, stamp, token)


EARLY, MIDDLE = date(2024, 1, 10), date(2024, 1, 12)
EXPIRED = oai_error("badResumptionToken", DAY)


@pytest.mark.parametrize(
    ("stamps", "start"), [((EARLY, MIDDLE), "from=2024-01-12"), ((MIDDLE, EARLY), "metadataPrefix")]
)
def test_an_expired_token_starts_again_behind_what_is_complete(stamps, start):
    """Where pages do not come in the order of their dates, only the beginning is safe."""
    store = Store()
    pages = [
        page(0, 10, stamps[0], "a"),
        page(10, 10, stamps[1], "b"),
        EXPIRED,
        page(0, 20, MIDDLE, "c"),
        page(20, 5, DAY, ""),
    ]
    known = scripted(*pages)
    report = playing(known, lambda server: harvest(store, server.fetcher(store), "cs", NOW))
    assert report.errors == {} and report.written.added == 25
    assert start in known.asked[3] and ("from=" in known.asked[3]) == (start != "metadataPrefix")
    assert "since" in poll_row(store, "oai", "cs")["cursor"] and "token" not in poll_row(store, "oai", "cs")["cursor"]


def test_a_broken_harvest_goes_on_at_its_token():
    store = Store()
    known = scripted(page(0, 10, EARLY, "a"), b"<html>", page(10, 10, MIDDLE, ""))

    async def act(server):
        fetcher = server.fetcher(store)
        return await harvest(store, fetcher, "cs", NOW), await harvest(store, fetcher, "cs", NOW)

    first, second = playing(known, act)
    assert "web page" in first.errors["oai cs"] and first.written.added == 10
    assert second.written.added == 10 and "resumptionToken=a" in known.asked[2]


def test_an_archive_that_goes_in_circles_is_left():
    store = Store()
    known = scripted(*[page(0, 10, EARLY, "a"), EXPIRED] * 9)
    report = playing(known, lambda server: harvest(store, server.fetcher(store), "cs", NOW))
    assert "badResumptionToken" in report.errors["oai cs"] and len(known.asked) == 2 * (harvesting._RESTARTS + 1)
    known = scripted(*[page(0, 10, EARLY, "a")] * 20)
    report = playing(known, lambda server: harvest(Store(), server.fetcher(store), "cs", NOW))
    assert "again and again" in report.errors["oai cs"]


def test_what_was_withdrawn_is_marked_and_nothing_to_harvest_is_no_error(store):
    gone = replace(RECORDS[0], withdrawn=True)
    known = scripted(oai([gone], DAY, DAY, ""), oai_error("noRecordsMatch", DAY))
    playing(known, lambda server: harvest(store, server.fetcher(store), "cs", NOW))
    paper = papers(store, list(find(store, [gone.paper]).values()))[0]
    assert paper.withdrawn and paper.title == ""
    assert playing(known, lambda server: harvest(store, server.fetcher(store), "cs", NOW)).errors == {}
