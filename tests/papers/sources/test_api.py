from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.lab.papers_arxiv import PAGE, api, api_error, fixture_day
from danlu.papers.sources.arxiv_api import ApiError, category_url, ids_url, parse_page
from danlu.papers.sources.xml import BadDocument

FIRST = datetime(2024, 1, 12, 18, tzinfo=UTC)
RECORDS = [
    replace(
        record, listings=(), doi="10.1/x", comment="9 pages", journal_ref="J. 1", codes=("68T07",),
        authors=("Ann Lee, Jr.", "Bo Chen"),
    )
    for record in fixture_day()[:3]
]  # fmt: skip


def test_what_was_written_is_read():
    page = parse_page(api(RECORDS, 17, 4))
    assert list(page.records) == RECORDS and (page.total, page.start, page.skipped) == (17, 4, 0)


def test_times_are_in_utc_and_name_the_versions():
    later = datetime(2024, 2, 1, 9, tzinfo=UTC)
    record = replace(RECORDS[0], version=2, submitted_at=FIRST, updated_at=later, versions=((1, FIRST), (2, later)))
    assert parse_page(api([record])).records[0] == record
    body = api([record]).replace(b"2024-01-12T18:00:00Z", b"2024-01-12T18:00:00")
    assert parse_page(body).records[0].submitted_at == FIRST
    body = api([record]).replace(b"2024-01-12T18:00:00Z", b"2024-01-12T13:00:00-05:00")
    assert parse_page(body).records[0].submitted_at == FIRST


def test_the_error_that_looks_like_a_paper_is_none():
    with pytest.raises(ApiError, match="incorrect id format"):
        parse_page(api_error("incorrect id format for x"))


def test_unknown_papers_are_absent_and_an_empty_page_is_empty():
    page = parse_page(api([], 700, 500))
    assert page.records == () and page.total == 700 and page.start == 500


def test_entries_that_cannot_be_read_are_counted():
    body = api(RECORDS).replace(b"abs/2401.07000v1", b"abs/2413.07000v1").replace(b"2024-01-14T19:10", b"then")
    page = parse_page(body)
    assert page.skipped == 2 and [r.paper.identifier for r in page.records] == ["2401.07014"]


@pytest.mark.parametrize("version", [b"v0", b"v01", b"v99999", b"v" + b"9" * 30, "v２".encode()])
def test_a_version_out_of_range_is_refused(version):
    assert parse_page(api(RECORDS[:1]).replace(b"abs/2401.07000v1", b"abs/2401.07000" + version)).skipped == 1


@pytest.mark.parametrize("total", [b"", b"-3", b"x", "١٧".encode(), b"9" * 5000])
def test_a_total_that_is_no_number_is_that_of_the_page(total):
    assert parse_page(api(RECORDS, 17).replace(b">17<", b">" + total + b"<")).total == 3


@pytest.mark.parametrize("body", [b"", PAGE, b"<feed/>", b"<x/>", api(RECORDS)[:-20], b"<!DOCTYPE a><a/>"])
def test_anything_else_is_an_error(body):
    with pytest.raises(BadDocument):
        parse_page(body)


def test_addresses_carry_what_is_asked():
    asked = parse_qs(urlsplit(ids_url(["2401.00001", "math/0611800"])).query)
    assert asked == {"id_list": ["2401.00001,math/0611800"], "max_results": ["2"]}
    asked = parse_qs(urlsplit(category_url("cs.LG", 40, 9999)).query)
    assert asked["search_query"] == ["cat:cs.LG"] and asked["start"] == ["40"] and asked["max_results"] == ["2000"]


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.integers(0, 4000), st.integers(0, 40), st.binary(max_size=8))
def test_a_damaged_page_gives_records_or_a_typed_error(at, length, new):
    body = api(RECORDS)
    try:
        page = parse_page(body[:at] + new + body[at + length :])
    except (BadDocument, ApiError):
        return
    assert all(record.submitted_at.year > 1900 for record in page.records)


def test_a_time_out_of_range_is_refused():
    for year in (b"0001-01-01T00:00:00+14:00", b"9999-12-31T23:59:59-14:00", b"1024-01-14T19:00:00Z"):
        assert parse_page(api(RECORDS[:1]).replace(b"2024-01-14T19:00:00Z", year)).skipped == 1
    assert date(2024, 1, 14) == parse_page(api(RECORDS[:1])).records[0].submitted_at.date()
