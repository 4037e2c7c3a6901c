from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from functools import partial

import pytest
import sqlalchemy as sa
from tests.papers.arxiv_server import QUIRKS
from tests.papers.contents import contents
from tests.papers.sources.playing import DAY, LAGGING, LATE, NOW, RECORDS, SUBJECT, arxiv, listed, playing
from tests.papers.sources.snapshots import line

from danlu.lab.papers_arxiv import Arxiv, atom, fixture_day
from danlu.papers import schema
from danlu.papers.ids import parse_id
from danlu.papers.lists import day_list, days, find, papers
from danlu.papers.records import Listing
from danlu.papers.sources import arxiv_api
from danlu.papers.sources.arxiv_snapshot import parse_line
from danlu.papers.sources.completeness import gaps
from danlu.papers.sources.polling import fetch_papers, harvest, names_of, poll
from danlu.papers.sources.polls import poll_row
from danlu.papers.store import Store


def test_the_fixture_day_is_complete_and_says_what_was_added_later(store):
    async def act(server):
        return await poll(store, server.fetcher(store), "cs.LG", NOW)

    report = playing(arxiv(), act)
    names, late = listed(store)
    assert report.day == DAY and report.errors == {} and report.late == 1 and report.warnings == []
    assert len(names) == 133 == len(set(names)) and late == {LATE} and names[-1] == LATE
    assert names[:132] == [str(r.paper) for r in RECORDS if str(r.paper) != LATE]
    found = {
        paper.paper.identifier: paper for paper in papers(store, [e.pk for e in day_list(store, SUBJECT, DAY).entries])
    }
    # Details come from the interface where it has them, else from the feed.
    with store.reading() as connection:
        rows = connection.execute(sa.select(schema.paper.c.ext_id, schema.paper.c.origins))
        origins = {row.ext_id: row.origins for row in rows}
    assert {name for name in names if origins[name]["title"] == [1.0, 1]} == LAGGING
    assert all(found[name].authors_provisional == (name in LAGGING) for name in names)
    assert poll_row(store, "rss", "cs.LG")["got_n"] == 132 and poll_row(store, "api", "cs.LG")["got_n"] == 123
    assert poll_row(store, "api", "cs.LG")["expected_n"] == 133


def test_polling_again_changes_nothing_and_then_waits_longer(store):
    async def act(server):
        fetcher = server.fetcher(store)
        reports = [await poll(store, fetcher, "cs.LG", NOW + timedelta(minutes=30 * i)) for i in range(4)]
        return reports

    first, second, third, fourth = playing(arxiv(), act)
    assert (second.written.added, second.written.changed, second.late) == (0, 0, 0)
    waits = [
        report.again_at - (NOW + timedelta(minutes=30 * i)).replace(tzinfo=None)
        for i, report in enumerate((first, second, third, fourth))
    ]
    assert waits[:2] == [timedelta(minutes=30), timedelta(hours=12)]
    # The next list comes before the third look at this one.
    assert third.again_at == fourth.again_at == datetime(2024, 1, 17, 5, 5)


def test_what_the_feed_brings_later_is_marked_and_stays_marked():
    store = Store()

    async def act(server):
        fetcher = server.fetcher(store)
        await poll(store, fetcher, "cs.LG", NOW, interface=False)
        before = listed(store)
        server.arxiv = arxiv(feed_lacks=())
        reports = [await poll(store, fetcher, "cs.LG", NOW + timedelta(hours=i), interface=False) for i in (1, 2, 3)]
        return before, [report.late for report in reports]

    (names, late), counts = playing(arxiv(), act)
    assert len(names) == 132 and not late and counts == [1, 0, 0]
    assert len(listed(store)[0]) == 133 and listed(store)[1] == {LATE}


def test_what_the_interface_found_first_stays_marked_when_the_feed_has_it():
    store = Store()

    async def act(server):
        fetcher = server.fetcher(store)
        await poll(store, fetcher, "cs.LG", NOW)
        server.arxiv = arxiv(feed_lacks=(), interface_lacks=())
        return [await poll(store, fetcher, "cs.LG", NOW + timedelta(hours=i)) for i in (1, 2)]

    reports = playing(arxiv(), act)
    names, late = listed(store)
    assert len(names) == 133 and late == {LATE} and [report.late for report in reports] == [0, 0]
    with store.reading() as connection:
        guessed = sa.select(sa.func.count()).select_from(schema.listing).where(schema.listing.c.approximate)
        assert connection.scalar(guessed) == 0


def test_a_feed_that_shrinks_or_is_empty_takes_nothing_away(store):
    async def act(server):
        fetcher = server.fetcher(store)
        await poll(store, fetcher, "cs.LG", NOW)
        before = contents(store)
        for known in (
            arxiv(mailing=False),
            arxiv(feed_lacks={str(r.paper) for r in RECORDS[9:]}),
            arxiv(mailing=False),
        ):
            server.arxiv = known
            report = await poll(store, fetcher, "cs.LG", NOW + timedelta(days=1))
            assert contents(store) == before and report.day == DAY and report.late == 0 and report.errors == {}
        server.arxiv = arxiv()
        await poll(store, fetcher, "cs.LG", NOW + timedelta(days=2))
        return before

    before = playing(arxiv(), act)
    assert contents(store) == before
    assert poll_row(store, "rss", "cs.LG")["expected_n"] == 133


def test_a_list_of_an_earlier_day_does_not_take_the_place_of_the_later():
    store = Store()

    async def act(server):
        fetcher = server.fetcher(store)
        await poll(store, fetcher, "cs.LG", NOW, interface=False)
        server.arxiv = arxiv(day=date(2024, 1, 12))
        return await poll(store, fetcher, "cs.LG", NOW, interface=False)

    assert playing(arxiv(), act).day == DAY


@pytest.mark.parametrize("quirk", sorted(QUIRKS))
def test_no_fault_of_the_feed_or_the_interface_loses_or_doubles_a_paper(quirk):
    async def act(server, host):
        store = Store()
        server.play(host, [quirk] * 2)
        fetcher = server.fetcher(store)
        reports = [await poll(store, fetcher, "cs.LG", NOW + timedelta(minutes=30 * i)) for i in range(4)]
        names, _ = listed(store)
        assert len(names) == len(set(names)) == 133, (host, quirk)
        assert reports[-1].errors == {} and all(report.again_at is not None for report in reports)
        return reports[0]

    for host in ("rss.arxiv.org", "export.arxiv.org"):
        first = playing(arxiv(), lambda server, host=host: act(server, host))
        retried = quirk in ("429", "503", "reset", "truncated")
        taken = host == "rss.arxiv.org" and quirk == "empty feed"
        empty = host == "export.arxiv.org" and quirk in ("empty page", "empty feed")
        if host == "rss.arxiv.org" and quirk == "empty page":
            taken = True  # It is a well-formed feed without entries.
        assert bool(first.errors) == (not retried and not taken and not empty), (host, quirk, first.errors)


def test_an_empty_page_again_and_again_is_an_error_and_no_end():
    store = Store()

    async def act(server):
        server.play("export.arxiv.org", ["empty page"] * 3)
        return await poll(store, server.fetcher(store), "cs.LG", NOW)

    report = playing(arxiv(), act)
    assert "3 empty pages" in report.errors["api cs.LG"] and len(listed(store)[0]) == 132
    assert "3 empty pages" in poll_row(store, "api", "cs.LG")["error"]
    assert report.again_at == datetime(2024, 1, 16, 12, 30)


def test_when_the_feed_fails_the_interface_alone_fills_the_day():
    store = Store()

    async def act(server):
        server.play("rss.arxiv.org", ["page"])
        fetcher = server.fetcher(store)
        first = await poll(store, fetcher, "cs.LG", NOW)
        names, late = listed(store)
        await poll(store, fetcher, "cs.LG", NOW + timedelta(minutes=30))
        return first, names, late

    first, names, late = playing(arxiv(), act)
    assert "a web page" in first.errors["rss cs.LG"] and first.day == DAY
    assert len(names) == 123 and late == set()
    assert len(listed(store)[0]) == 133


def test_results_of_several_pages_are_read_to_the_first_paper_of_the_list(monkeypatch):
    monkeypatch.setattr(arxiv_api, "category_url", partial(arxiv_api.category_url, count=20))
    store = Store()
    old = fixture_day(date(2023, 12, 13), 60)
    known = arxiv(records=[*RECORDS, *old])

    async def act(server):
        server.play("export.arxiv.org", ["empty page"])
        return await poll(store, server.fetcher(store), "cs.LG", NOW, feed=False)

    assert playing(known, act).errors == {} and len(listed(store)[0]) == 123
    # Seven pages have papers of the list and one is asked for twice; the last of them ends it.
    assert len(known.asked) == 8 and days(store, SUBJECT) == [(DAY, 123)]


def test_nothing_changed_is_understood():
    store = Store()

    async def act(server):
        server.marked = True
        fetcher = server.fetcher(store)
        reports = [await poll(store, fetcher, "cs.LG", NOW) for _ in range(2)]
        return reports

    reports = playing(arxiv(), act)
    assert reports[1].day == DAY and reports[1].again_at == datetime(2024, 1, 17, 0, 0)


def test_packed_answers_are_read():
    store = Store()

    async def act(server):
        server.packed = True
        return await poll(store, server.fetcher(store), "cs.LG", NOW)

    assert playing(arxiv(), act).errors == {} and len(listed(store)[0]) == 133


def test_the_order_of_sources_does_not_change_the_rows():
    """Feed, interface, archive and snapshot in every order; which came later is told by the order alone."""
    known = arxiv(records=RECORDS[:60], interface_lacks={str(record.paper) for record in RECORDS[20:25]})
    found = []
    snapshot = [
        parse_line(line(
            id=str(record.paper), title=record.title, abstract=record.abstract, categories=" ".join(record.categories),
            versions=[{"version": "v1", "created": f"{record.submitted_at:%a, %d %b %Y %H:%M:%S} GMT"}],
        ))
        for record in RECORDS[:20]
    ]  # fmt: skip

    async def act(server, order):
        store = Store()
        fetcher = server.fetcher(store)
        for step in order:
            if step == "feed":
                await poll(store, fetcher, "cs.LG", NOW, interface=False)
            elif step == "interface":
                await poll(store, fetcher, "cs.LG", NOW, feed=False)
            elif step == "archive":
                await harvest(store, fetcher, "cs", NOW)
            else:
                store.upsert(snapshot)
        rows = contents(store)
        rows["listing"] = [row.replace('"late": true', '"late": false') for row in rows["listing"]]
        found.append(rows)

    for order in itertools.permutations(("feed", "interface", "archive", "snapshot")):
        playing(known, lambda server, order=order: act(server, order))
    for rows in found[1:]:
        for name, expected in found[0].items():
            assert sorted(rows[name]) == sorted(expected)


def test_a_mailing_that_was_put_off_takes_the_papers_of_both_days():
    """A holiday that nobody knows of: the day's list has what was in time for the day before."""
    store = Store()
    wednesday = date(2024, 1, 17)
    both = [
        *RECORDS,
        *(
            replace(r, listings=(Listing(wednesday, "cs.LG", "new", 200 + i),))
            for i, r in enumerate(fixture_day(wednesday, 20))
        ),
    ]
    both = [replace(r, paper=parse_id(f"2401.{7000 + 7 * i:05d}")) for i, r in enumerate(both)]

    async def act(server):
        await poll(store, server.fetcher(store), "cs.LG", datetime(2024, 1, 17, 12, tzinfo=UTC))
        fetcher = server.fetcher(store)
        await poll(store, fetcher, "cs.LG", datetime(2024, 1, 17, 13, tzinfo=UTC))

    def known(day, records):
        return Arxiv(day, records, feed_lacks={LATE})

    async def two_days(server):
        await poll(store, server.fetcher(store), "cs.LG", datetime(2024, 1, 12, 12, tzinfo=UTC))
        server.arxiv = known(wednesday, both)
        await act(server)

    friday = [
        replace(r, paper=parse_id(f"2401.{3000 + i:05d}")) for i, r in enumerate(fixture_day(date(2024, 1, 12), 30))
    ]
    playing(Arxiv(date(2024, 1, 12), friday), two_days)
    names, late = listed(store, wednesday)
    assert len(names) == 153 and late == {LATE}
    assert [day for day, _ in days(store, SUBJECT)] == [wednesday, date(2024, 1, 12)]


def test_days_that_nobody_polled_are_filled_by_the_interface():
    store = Store()
    thursday = date(2024, 1, 18)
    first = fixture_day(date(2024, 1, 12), 10)
    missed = [
        replace(r, paper=parse_id(f"2401.{8000 + i:05d}")) for i, r in enumerate(fixture_day(date(2024, 1, 17), 10))
    ]
    last = [replace(r, paper=parse_id(f"2401.{9000 + i:05d}")) for i, r in enumerate(fixture_day(thursday, 10))]

    async def act(server):
        await poll(store, server.fetcher(store), "cs.LG", datetime(2024, 1, 12, 12, tzinfo=UTC))
        server.arxiv = Arxiv(thursday, [*first, *missed, *last], feed_lacks={str(r.paper) for r in (*first, *missed)})
        await poll(store, server.fetcher(store), "cs.LG", datetime(2024, 1, 18, 12, tzinfo=UTC))

    playing(Arxiv(date(2024, 1, 12), first), act)
    assert dict(days(store, SUBJECT)) == {thursday: 10, date(2024, 1, 17): 10, date(2024, 1, 12): 10}
    assert listed(store, date(2024, 1, 17))[1] == set()


def test_single_papers_are_fetched_and_unknown_ones_named(store):
    async def act(server):
        return await fetch_papers(store, server.fetcher(store), [str(RECORDS[0].paper), "2401.99999"])

    assert playing(arxiv(), act) == ["2401.99999"]
    assert list(find(store, [RECORDS[0].paper])) == [RECORDS[0].paper] and days(store, SUBJECT) == []


def test_gaps_are_told_where_chance_does_not_make_them():
    dense = [f"2401.{i:05d}" for i in range(6000, 7000, 7)]
    assert gaps(dense) == []
    hole = [each for each in dense if not "2401.06400" < each < "2401.06600"]
    assert gaps(hole) == ["202 identifiers in a row are missing after 2401.06399"]
    sparse = [f"2401.{i:05d}" for i in range(1000, 9000, 150)]
    assert gaps(sparse) == [] and gaps(["2401.00001", *dense]) == [] and gaps([]) == [] and gaps(["math/0611800"]) == []
    assert "after 1401.0" in gaps([f"1401.{i:04d}" for i in [*range(100, 200), *range(600, 700)]])[0]


def test_names_are_what_the_feed_knows():
    assert names_of("cs.AI+cs.LG-cs.CY") == ["cs.AI", "cs.LG"] and names_of("math") == ["math"]
    assert "hep-th" in names_of("physics-group") and "physics" in names_of("physics-group")


def test_a_day_written_out_twice_is_one_day():
    """Entries that a feed repeats stand in its list once."""
    store = Store()

    class Twice(Arxiv):
        def answer(self, url):
            return 200, atom([*RECORDS[:5], *RECORDS[:5]], DAY)

    playing(Twice(DAY, ()), lambda server: poll(store, server.fetcher(store), "cs.LG", NOW, interface=False))
    assert len(listed(store)[0]) == 5
