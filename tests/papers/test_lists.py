from __future__ import annotations

from datetime import date, timedelta

import pytest

from danlu.papers.categories import parse_expression
from danlu.papers.counters import count, counts, reader_digest, stars
from danlu.papers.ids import parse_id
from danlu.papers.lists import day_list, days, find, latest_day, papers, venue_list, venues, versions
from danlu.papers.records import Listing, PaperRecord
from danlu.papers.sample import load_sample, sample_records
from danlu.papers.synthetic import generate

DAY = date(2024, 1, 15)


def _record(number, *listings, categories=None):
    categories = categories or tuple(dict.fromkeys(place.category for place in listings))
    return PaperRecord(
        parse_id(f"2401.{number:05d}"),
        "rss",
        title=f"Paper {number}",
        categories=categories,
        version=1,
        listings=listings,
    )


@pytest.fixture
def filled(store):
    store.upsert(
        [
            _record(5, Listing(DAY, "cs.AI", "new", 0)),
            _record(3, Listing(DAY, "cs.AI", "new", 1), Listing(DAY, "cs.CL", "cross", 9)),
            _record(9, Listing(DAY, "cs.CL", "new", 0)),
            _record(1, Listing(DAY, "cs.AI", "replace", 2)),
            _record(2, Listing(DAY, "cs.AI", "new", None, late=True)),
            _record(7, Listing(DAY, "cs.AI", "cross", 2), categories=("math.NA", "cs.AI")),
            _record(4, Listing(DAY - timedelta(days=3), "cs.AI", "new", 0)),
        ]
    )
    return store


def _names(store, found):
    return [paper.paper.identifier[-1] for paper in papers(store, [entry.pk for entry in found.entries])]


def test_a_list_has_the_order_of_its_source_and_late_papers_at_its_end(filled):
    found = day_list(filled, parse_expression("cs.AI"), DAY)
    assert _names(filled, found) == ["5", "3", "7", "2"]
    assert [entry.kind for entry in found.entries] == ["new", "new", "cross", "new"]
    assert [entry.late for entry in found.entries] == [False, False, False, True]


def test_unions_and_differences_are_those_of_sets(filled):
    def of(text):
        return set(_names(filled, day_list(filled, parse_expression(text), DAY)))

    assert of("cs.AI+cs.CL") == of("cs.CL,cs.AI") == of("cs.AI") | of("cs.CL") == of("cs")
    assert of("cs.AI+cs.CL-cs.AI") == of("cs.CL") - of("cs.AI") == {"9"}
    assert of("cs.AI-math") == of("cs.AI") - {"7"} == of("cs.AI-cs.NA")
    assert of("cs.AI-cs.AI") == set()


def test_a_paper_of_two_lists_stands_once_and_is_new_if_it_is_new_in_one(filled):
    found = day_list(filled, parse_expression("cs"), DAY)
    kinds = dict(zip(_names(filled, found), (entry.kind for entry in found.entries), strict=True))
    assert kinds["3"] == "new" and len(kinds) == len(found.entries) == 5


def test_days_count_what_was_announced(filled):
    assert days(filled, parse_expression("cs.AI")) == [(DAY, 4), (DAY - timedelta(days=3), 1)]
    assert days(filled, parse_expression("cs.AI"), before=DAY) == [(DAY - timedelta(days=3), 1)]
    assert latest_day(filled, parse_expression("cs.AI")) == DAY
    assert latest_day(filled, parse_expression("cs.AI"), not_after=DAY - timedelta(days=1)) == DAY - timedelta(days=3)
    assert latest_day(filled, parse_expression("econ")) is None


def test_a_snapshot_gives_the_same_list_although_more_has_come(filled):
    before = day_list(filled, parse_expression("cs.AI"), DAY)
    filled.upsert([_record(8, Listing(DAY, "cs.AI", "new", 0))])
    assert day_list(filled, parse_expression("cs.AI"), DAY, before.snapshot).entries == before.entries
    assert len(day_list(filled, parse_expression("cs.AI"), DAY).entries) == len(before.entries) + 1


def test_papers_come_in_the_order_asked_and_missing_ones_are_left_out(filled):
    wanted = [parse_id(f"2401.{n:05d}") for n in (9, 5, 99)]
    found = find(filled, wanted)
    assert list(found) == wanted[:2]
    keys = [found[wanted[1]], 10**6, found[wanted[0]]]
    assert [paper.title for paper in papers(filled, keys)] == ["Paper 5", "Paper 9"]
    assert versions(filled, found[wanted[0]]) == [1] and papers(filled, []) == []


def test_the_sample_fills_lists_and_venues_and_says_what_it_is(store):
    today = date(2024, 3, 3)  # a Sunday
    assert load_sample(store, today).added == len(sample_records(today)) > 40
    assert load_sample(store, today).unchanged == len(sample_records(today))
    everything = parse_expression("cs+stat+math")
    assert [day for day, _ in days(store, everything)] == [date(2024, 3, 1), date(2024, 2, 29), date(2024, 2, 28)]
    iclr = next(venue for venue in venues(store) if venue.slug == "ICLR.2021")
    assert iclr.groups == {"Oral": 2, "Poster": 1}
    oral = venue_list(store, "ICLR", 2021, "Oral")
    assert oral is not None and len(oral.entries) == 2 and venue_list(store, "ICLR", 1999) is None
    first = papers(store, [oral.entries[0].pk])[0]
    assert (
        "our own words" in first.comment
        and first.venues[0].group == "Oral"
        and first.pdf_url.startswith("https://arxiv.org/pdf/")
    )


def test_made_up_papers_are_the_same_for_the_same_seed(store):
    first, again, other = list(generate(300)), list(generate(300)), list(generate(300, seed=1))
    assert first == again != other
    assert len({record.paper for record in first}) == 300
    assert store.upsert(first).added == 300
    with pytest.raises(ValueError, match="count must be in"):
        next(generate(0))


def test_a_reader_counts_once_a_day(filled):
    key = next(iter(find(filled, [parse_id("2401.00005")]).values()))
    ann, bo = reader_digest(filled, "ann", DAY), reader_digest(filled, "bo", DAY)
    assert [count(filled, key, "pdf", DAY, who) for who in (ann, ann, bo)] == [1, 1, 2]
    assert count(filled, key, "ask", DAY, ann) == 1 and count(filled, key, "rel", DAY, ann) == 1
    tomorrow = DAY + timedelta(days=1)
    assert reader_digest(filled, "ann", tomorrow) != ann
    assert count(filled, key, "pdf", tomorrow, reader_digest(filled, "ann", tomorrow)) == 3
    assert counts(filled, [key]) == {key: {"pdf": 3, "ask": 1, "rel": 1}} and stars(filled, [key, 10**6]) == {key: 4}
    with pytest.raises(ValueError, match="kind must be one of"):
        count(filled, key, "like", DAY, ann)
