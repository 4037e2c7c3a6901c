from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from datetime import UTC, date, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.papers.sources.snapshots import ENTRY, line

from danlu.papers.ids import parse_id
from danlu.papers.records import Listing, PaperRecord
from danlu.papers.sources import arxiv_snapshot
from danlu.papers.sources.arxiv_snapshot import open_lines, parse_line, read_snapshot
from danlu.papers.sources.xml import BadDocument

FIRST, SECOND = datetime(2007, 4, 2, 19, 18, 42, tzinfo=UTC), datetime(2007, 7, 24, 20, 10, 27, tzinfo=UTC)
RECORD = PaperRecord(
    parse_id("0704.0001"),
    "kaggle",
    title="Calculation of prompt diphoton production cross sections at LHC energies",
    abstract="A fully differential calculation in $q_T$.",
    authors=("C. Balázs", "E. L. Berger Jr.", "P. M. Nadolsky"),
    categories=("hep-ph", "cs.LG"),
    codes=("68T07",),
    comment="37 pages, 15 figures",
    doi="10.1103/physrevd.76.013009",
    journal_ref="Phys.Rev.D76:013009,2007",
    license="http://arxiv.org/licenses/nonexclusive-distrib/1.0/",
    version=2,
    versions=((1, FIRST), (2, SECOND)),
    submitted_at=FIRST,
    updated_at=SECOND,
    listings=(
        Listing(date(2007, 4, 4), "hep-ph", "new", None, approximate=True),
        Listing(date(2007, 4, 4), "cs.LG", "cross", None, approximate=True),
    ),
)


def test_a_line_is_read():
    assert parse_line(line()) == RECORD


def test_authors_without_parts_are_split_and_say_so():
    found = parse_line(line(authors_parsed=None))
    assert found.authors_provisional and found.authors == ("C. Balázs", "E. L. Berger", "P. M. Nadolsky")


@pytest.mark.parametrize(
    "identifier",
    [704.0001, 704.1, "704.0001", "704.1", "1501.1", "1501.0001", 1501.1, "1413.0001", "2401.06769v1", None, "", [],
     "math.CA/0611800x", "２401.00001", "2401.00001\n"],
)  # fmt: skip
def test_numbers_that_went_through_a_float_and_other_forms_are_refused(identifier):
    assert parse_line(line(id=identifier)) is None


@pytest.mark.parametrize("identifier", ["0704.0001", "1501.00001", "math/0611800", "hep-th/9901001"])
def test_canonical_identifiers_are_read(identifier):
    assert parse_line(line(id=identifier)).paper.identifier == identifier


def test_the_mailing_is_that_which_the_first_version_was_in_time_for():
    def day(created):
        return parse_line(line(versions=[{"version": "v1", "created": created}])).listings[0].announced_on

    assert day("Fri, 12 Jan 2024 18:59:59 GMT") == date(2024, 1, 15)
    assert day("Fri, 12 Jan 2024 19:00:00 GMT") == date(2024, 1, 16)
    assert day("Wed, 17 Jan 2024 03:00:00 GMT") == date(2024, 1, 18)


def test_without_versions_nothing_is_guessed():
    found = parse_line(line(versions=[]))
    assert found.listings == () and found.submitted_at is None and found.version is None


@pytest.mark.parametrize(
    "broken",
    [
        b"", b"{", b"[]", b"null", b"1", b'"x"', b"[" * 100_000, line(versions=[{"version": "v1"}]), line(versions=7),
        line(versions=[{"version": "vx", "created": "Mon, 2 Apr 2007 19:18:42 GMT"}]),
        line(versions=[{"version": "v1", "created": "yesterday"}]),
        line(versions=[{"version": "v1", "created": "Mon, 2 Foo 2007 19:18:42 GMT"}]),
        line(versions=[{"version": "v1", "created": "Mon, 2 Apr 9999 19:18:42 GMT"}]),
        line(authors_parsed=3), line(authors_parsed=[3]), b"\xff\xfe",
    ],
)  # fmt: skip
def test_a_broken_line_is_none(broken):
    assert parse_line(broken) is None


def test_characters_that_databases_refuse_are_gone():
    found = parse_line(line(title="a\ud800b\x00c", license="\ud800", comments="\x00"))
    assert found.title == "abc" and found.license == "" and found.comment == ""


def test_places_lead_on_from_every_line(tmp_path):
    lines = [line(id=f"0704.{i:04d}") for i in range(1, 5)]
    lines[2] = b"broken\n"
    path = tmp_path / "x.json"
    path.write_bytes(b"".join(lines) + b"\n" + line(id="0704.0009")[:-1])
    with open_lines(path) as (opened, size):
        found = list(read_snapshot(opened))
    assert [r and r.paper.identifier for _, r in found] == ["0704.0001", "0704.0002", None, "0704.0004", "0704.0009"]
    assert found[-1][0] == size == path.stat().st_size
    for i, (place, _) in enumerate(found):
        with open_lines(path) as (opened, _):
            assert list(read_snapshot(opened, place)) == found[i + 1 :]


def test_a_line_beyond_the_limit_is_passed_over_whole(monkeypatch):
    monkeypatch.setattr(arxiv_snapshot, "LINE_BYTES", 2000)
    lines = line(id="0704.0001") + line(abstract="x" * 7000) + line(id="0704.0003")
    found = [record and record.paper.identifier for _, record in read_snapshot(io.BytesIO(lines))]
    assert found == ["0704.0001", None, "0704.0003"]


def test_a_zip_is_read_inside(tmp_path):
    path = tmp_path / "archive.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arxiv-metadata-oai-snapshot.json", line() + line(id="0704.0002"))
        archive.writestr("README.txt", "x")
    with open_lines(path) as (opened, size):
        found = list(read_snapshot(opened))
    assert [record.paper.identifier for _, record in found] == ["0704.0001", "0704.0002"] and size == found[-1][0]
    with open_lines(path) as (opened, _):
        assert list(read_snapshot(opened, found[0][0])) == found[1:]


def test_a_zip_that_is_broken_or_holds_several_files_is_refused(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.json", line() * 50)
    body = bytearray(path.read_bytes())
    body[60:90] = bytes(30)
    path.write_bytes(bytes(body))
    with pytest.raises(BadDocument, match="broken"), open_lines(path) as (opened, _):
        list(read_snapshot(opened))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.json", line())
        archive.writestr("b.json", line())
    with pytest.raises(BadDocument, match="one JSON file, got 2"), open_lines(path):
        pass


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300, derandomize=True)
@given(st.dictionaries(st.sampled_from(sorted(ENTRY)), JSON, max_size=6))
def test_any_values_give_a_record_or_none(changes):
    found = parse_line(line(**changes))
    assert found is None or replace(found).paper.identifier
    if found is not None:
        json.dumps([found.title, found.extra, found.authors]).encode()


@settings(max_examples=100, derandomize=True)
@given(st.binary(max_size=300))
def test_any_bytes_are_lines_that_end(body):
    assert all(record is None for _, record in read_snapshot(io.BytesIO(body)))
