from __future__ import annotations

import os
import time
from dataclasses import replace
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.lab.papers_arxiv import PAGE, atom, fixture_day, rss
from danlu.papers.ids import parse_id
from danlu.papers.records import Listing
from danlu.papers.sources.arxiv_feed import feed_url, parse_feed, split_names
from danlu.papers.sources.xml import BadDocument

DAY = date(2024, 1, 16)
RECORDS = [
    replace(
        fixture_day()[0], title="On $a < b$ & more", doi="10.1/x", journal_ref="J. 1", license="http://cc/by/4.0/",
        version=3, authors=("José Núñez", "Bo Chen"), abstract="First & <second>.",
    ),
    *fixture_day()[1:4],
]  # fmt: skip


def seen(record):
    """What a feed can say of a record."""
    return replace(
        record, origin="rss", authors_provisional=True, versions=(), submitted_at=None, updated_at=None, comment=""
    )


@pytest.mark.parametrize("write", [rss, atom])
def test_what_was_written_is_read(write):
    feed = parse_feed(write(RECORDS, DAY), ["cs.LG"])
    assert feed.day == DAY and feed.skipped == 0
    assert list(feed.records) == [seen(record) for record in RECORDS]
    assert [record.listings[0].kind for record in feed.records] == ["new", "new", "cross", "new"]


@pytest.mark.parametrize("write", [rss, atom])
def test_the_day_is_that_of_the_feed_whatever_zone_this_machine_is_in(write):
    before = os.environ.get("TZ")
    try:
        for zone in ("America/Los_Angeles", "Asia/Shanghai", "UTC"):
            os.environ["TZ"] = zone
            time.tzset()
            assert parse_feed(write(RECORDS, DAY), ["cs.LG"]).day == DAY
    finally:
        os.environ.pop("TZ")
        os.environ.update({"TZ": before} if before else {})
        time.tzset()
    body = write(RECORDS, DAY).replace(b"-0500", b"+0800").replace(b"00:00-05:00", b"00:00+08:00")
    assert parse_feed(body, ["cs.LG"]).day == DAY


@pytest.mark.parametrize("write", [rss, atom])
def test_an_empty_feed_is_a_day_without_mailing(write):
    feed = parse_feed(write([], DAY), ["cs.LG"])
    assert feed.day is None and feed.records == () and feed.skipped == 0


@pytest.mark.parametrize("write", [rss, atom])
def test_every_type_of_announcement_is_told_apart_also_by_the_text_alone(write):
    for kind, text in (("new", "new"), ("cross", "cross"), ("replace", "replace"), ("replace", "replace-cross")):
        record = replace(RECORDS[0], listings=(Listing(DAY, "cs.LG", kind, 0),))
        body = write([record], DAY).replace(f">{kind}<".encode(), f">{text}<".encode())
        assert parse_feed(body, ["cs.LG"]).records[0].listings[0].kind == kind
        body = body.replace(f"<arxiv:announce_type>{text}</arxiv:announce_type>".encode(), b"")
        body = body.replace(f"Type: {kind} ".encode(), f"Type: {text} ".encode())
        assert parse_feed(body, ["cs.LG"]).records[0].listings[0].kind == kind


def test_in_the_list_of_an_archive_a_paper_is_new_in_its_first_category_alone():
    paper = replace(RECORDS[0], categories=("cs.LG", "cs.AI", "stat.ML", "I.2.6"))
    found = parse_feed(rss([paper], DAY), ["cs"]).records[0]
    assert [(place.category, place.kind) for place in found.listings] == [("cs.LG", "new"), ("cs.AI", "cross")]
    assert found.categories == ("cs.LG", "cs.AI", "stat.ML") and found.codes == ("I.2.6",)
    # The second name of a category is the same category.
    paper = replace(RECORDS[0], categories=("math.NA", "cs.NA"))
    assert {each.kind for each in parse_feed(rss([paper], DAY), ["cs.NA"]).records[0].listings} == {"new"}


def test_what_stands_in_a_list_belongs_to_it_even_without_its_category():
    found = parse_feed(rss([replace(RECORDS[0], categories=("I.2.6",))], DAY), ["cs.LG"]).records[0]
    assert found.listings == (Listing(DAY, "cs.LG", "new", 0),)


def test_an_entry_that_cannot_be_read_is_counted_and_the_others_stay():
    body = rss(RECORDS, DAY).replace(b"oai:arXiv.org:2401.07000v3", b"oai:arXiv.org:2413.07000v3")
    feed = parse_feed(body, ["cs.LG"])
    assert feed.skipped == 1 and len(feed.records) == len(RECORDS) - 1
    with pytest.raises(BadDocument, match="none of the 4 entries"):
        parse_feed(rss(RECORDS, DAY).replace(b"org:2401", b"org:2413"), ["cs.LG"])


@pytest.mark.parametrize(
    "body",
    [
        b"", b"  \n", PAGE, b"<html><body>x</body></html>", b"{}", b"<rss", b"<rss></rss>", b"<feed></feed>",
        rss(RECORDS, DAY)[:-40], b'<!DOCTYPE rss [<!ENTITY a "b">]><rss><channel/></rss>',
        b"<!DOCTYPE rss><rss><channel/></rss>", b"\xff\xfe<", b'<?xml version="1.0" encoding="nonsense"?><rss/>',
    ],
)  # fmt: skip
def test_anything_else_is_an_error_and_never_an_empty_day(body):
    with pytest.raises(BadDocument):
        parse_feed(body, ["cs.LG"])


def test_a_page_is_called_a_page():
    with pytest.raises(BadDocument, match="a web page"):
        parse_feed(PAGE, ["cs.LG"])


def test_names_are_split_with_their_suffixes():
    assert split_names("Ann Lee, Jr., Bo Chen, Carl Dee, III") == ("Ann Lee, Jr.", "Bo Chen", "Carl Dee, III")
    assert split_names(r"Jos\'e N\'u\~nez") == ("José Núñez",) and split_names("") == ()


def test_the_address_joins_names_with_plus():
    assert feed_url(["cs.AI", "math"]) == "https://rss.arxiv.org/atom/cs.AI+math"


MUTATED = st.tuples(st.sampled_from([rss(RECORDS, DAY), atom(RECORDS, DAY)]), st.data())


@settings(max_examples=150, derandomize=True, deadline=None)
@given(MUTATED)
def test_a_damaged_feed_gives_records_or_its_error(drawn):
    body, data = drawn
    at = data.draw(st.integers(0, len(body)))
    length = data.draw(st.integers(0, 30))
    new = data.draw(st.binary(max_size=8))
    try:
        feed = parse_feed(body[:at] + new + body[at + length :], ["cs.LG"])
    except BadDocument:
        return
    for record in feed.records:
        assert parse_id(str(record.paper)) == record.paper and record.listings


@settings(max_examples=100, derandomize=True)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_with_the_error_of_documents(body):
    with pytest.raises(BadDocument):
        parse_feed(body, ["cs.LG"])
