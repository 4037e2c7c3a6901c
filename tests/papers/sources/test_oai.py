from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.lab.papers_arxiv import PAGE, fixture_day, oai, oai_error
from danlu.papers.ids import parse_id
from danlu.papers.records import PaperRecord
from danlu.papers.sources.arxiv_oai import HarvestError, list_url, parse_harvest
from danlu.papers.sources.xml import BadDocument

TODAY, STAMP = date(2024, 1, 18), date(2024, 1, 17)
FIRST, SECOND = datetime(2024, 1, 12, tzinfo=UTC), datetime(2024, 2, 1, tzinfo=UTC)
RECORDS = [
    replace(
        record, origin="oai", listings=(), doi="10.1/x", comment="9 pages", journal_ref="J. 1", codes=("68T07",),
        license="http://creativecommons.org/licenses/by/4.0/", authors=("Ann van der Lee", "Bo Chen"), version=None,
        versions=(), submitted_at=FIRST, updated_at=SECOND,
    )
    for record in fixture_day()[:3]
]  # fmt: skip


def test_what_was_written_is_read():
    page = parse_harvest(oai(RECORDS, TODAY, STAMP, "123|456"))
    assert list(page.records) == RECORDS and page.token == "123|456" and page.skipped == 0
    assert (page.responded_on, page.datestamp, page.earliest) == (TODAY, STAMP, STAMP)


def test_the_raw_form_has_the_history_of_versions():
    moments = (datetime(2024, 1, 12, 18, 1, 2, tzinfo=UTC), datetime(2024, 2, 1, 9, tzinfo=UTC))
    record = replace(
        RECORDS[0], version=2, versions=((1, moments[0]), (2, moments[1])), submitted_at=moments[0],
        updated_at=moments[1], authors_provisional=True,
    )  # fmt: skip
    assert parse_harvest(oai([record], TODAY, STAMP, raw=True)).records == (record,)
    body = oai([record], TODAY, STAMP, raw=True).replace(b"Lee, Bo Chen", b"Lee and Bo Chen")
    assert parse_harvest(body).records == (record,)


def test_suffixes_belong_to_names():
    body = oai(RECORDS[:1], TODAY, STAMP).replace(b"</forenames>", b"</forenames><suffix>Jr.</suffix>", 1)
    assert parse_harvest(body).records[0].authors[0] == "Ann van der Lee Jr."


@pytest.mark.parametrize("token", ["", None])
def test_a_harvest_ends_with_an_empty_or_missing_token(token):
    assert parse_harvest(oai(RECORDS, TODAY, STAMP, token)).token == ""


def test_a_deleted_record_is_withdrawn_and_says_no_more():
    gone = PaperRecord(parse_id("2401.07000"), "oai", withdrawn=True)
    assert parse_harvest(oai([gone], TODAY, STAMP)).records == (gone,)


def test_no_records_is_an_empty_page_and_other_codes_are_errors():
    page = parse_harvest(oai_error("noRecordsMatch", TODAY))
    assert page.records == () and page.token == "" and page.responded_on == TODAY
    with pytest.raises(HarvestError) as caught:
        parse_harvest(oai_error("badResumptionToken", TODAY, "expired"))
    assert caught.value.code == "badResumptionToken" and "expired" in str(caught.value)


def test_records_that_cannot_be_read_are_counted():
    body = oai(RECORDS, TODAY, STAMP).replace(b"oai:arXiv.org:2401.07000", b"oai:arXiv.org:704.1")
    page = parse_harvest(body.replace(b"<created>2024-01-12</created>", b"<created>soon</created>", 1))
    assert page.skipped == 1 and len(page.records) == 2
    body = oai([replace(RECORDS[0], version=1, versions=((1, FIRST),))], TODAY, STAMP, raw=True)
    for version in (b"v0", b"1.5", "v１".encode(), b"v99999", b""):
        assert parse_harvest(body.replace(b'version="v1"', b'version="' + version + b'"')).skipped == 1


@pytest.mark.parametrize(
    "body",
    [
        b"", PAGE, b"<OAI-PMH/>", oai(RECORDS, TODAY, STAMP)[:-30],
        oai(RECORDS, TODAY, STAMP).replace(b"2024-01-18T02:00:00Z", b"today"),
        oai(RECORDS, TODAY, STAMP).replace(b"ListRecords>", b"Identify>"),
    ],
)  # fmt: skip
def test_anything_else_is_an_error(body):
    with pytest.raises(BadDocument):
        parse_harvest(body)


def test_a_token_goes_alone():
    url = list_url(token="a b|c", since=TODAY, archive="cs")
    assert url.endswith("?verb=ListRecords&resumptionToken=a+b%7Cc")
    url = list_url(since=TODAY, archive="physics:hep-th", raw=True)
    assert "from=2024-01-18" in url and "set=physics%3Ahep-th" in url and "metadataPrefix=arXivRaw" in url
    assert "until" not in url


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.booleans(), st.integers(0, 4000), st.integers(0, 40), st.binary(max_size=8))
def test_a_damaged_page_gives_records_or_a_typed_error(raw, at, length, new):
    body = oai([replace(r, versions=((1, FIRST),)) for r in RECORDS], TODAY, STAMP, "t", raw)
    try:
        parse_harvest(body[:at] + new + body[at + length :])
    except (BadDocument, HarvestError):
        pass
