from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.papers.sources.documents import ACL, CSV, JSONL, PMLR, V1, V2, dump, note

from danlu.lab.papers_arxiv import PAGE
from danlu.papers.records import PaperRecord, VenuePlace
from danlu.papers.sources.venues import Bad, read_acl, read_bibtex, read_csv, read_jsonl, read_openreview
from danlu.papers.sources.xml import BadDocument


def names(found):
    return [str(each.paper) if isinstance(each, PaperRecord) else each.place for each in found]


def test_a_collection_of_the_anthology_is_read():
    first, second, third = read_acl(ACL)
    assert str(first.paper) == "2024.acl-long.1@ACL" and str(second.paper) == "2024.acl-long.2@ACL"
    assert first.title == "BERT is not about $n^2$: $O(n)$ it is" and first.abstract == "We show $x$ & more."
    assert first.authors == ("Ann López", "Mononym") and first.doi == "10.18653/v1/2024.acl-long.1"
    assert first.venues == (VenuePlace("ACL", 2024, "Long", 0),) and first.license == "CC BY 4.0"
    assert first.extra["bibkey"] == "lopez-2024-bert"
    assert isinstance(third, Bad) and third.place == "2024.acl/long/3"


@pytest.mark.parametrize(
    ("collection", "volume", "paper", "name"),
    [
        (b"P19", b"1", b"12", "P19-1012@ACL"),
        (b"W19", b"3", b"5", "W19-0305@ACL"),
        (b"W19", b"12", b"5", "W19-1205@ACL"),
    ],
)
def test_old_collections_name_their_papers_in_their_own_way(collection, volume, paper, name):
    body = b'<collection id="%s"><volume id="%s"><meta><year>2019</year><venue>acl</venue></meta><paper id="%s">' % (
        collection, volume, paper
    ) + b"<title>T</title></paper></volume></collection>"  # fmt: skip
    assert names(read_acl(body)) == [name]


def test_notes_of_both_versions_of_openreview_are_read():
    new, old = read_openreview(dump(V2, V1))
    assert str(new.paper) == "_rnJxelIZ-@OpenReview" and new.authors == ("Ann Lee", "Bo Chen")
    assert new.venues == (VenuePlace("ICLR", 2024, "Oral", 0),) and new.license == "CC BY 4.0"
    assert (new.title, new.abstract, new.extra["keywords"]) == ("Deep things", "We go deep.", "depth, things")
    assert old.venues == (VenuePlace("NeurIPS", 2021, "Poster", 1),) and old.abstract == ""
    assert names(read_openreview(json.dumps([V2]).encode())) == ["_rnJxelIZ-@OpenReview"]


@pytest.mark.parametrize(
    "venueid",
    ["ICLR.cc/2024/Conference/Rejected_Submission", "ICLR.cc/2024/Conference/Rejected",
     "ICLR.cc/2024/Conference/Submission", "",
     "ICLR.cc/2024/Conference/Withdrawn_Submission", "ICLR.cc/2024/Conference/Desk_Rejected_Submission", "TMLR"],
)  # fmt: skip
def test_only_accepted_papers_are_taken(venueid):
    assert list(read_openreview(dump(note(venueid={"value": venueid})))) == []
    assert names(read_openreview(dump(V2, V1), "NeurIPS.cc/2021/Conference")) == ["B1xsqj09Fm@OpenReview"]


def test_broken_notes_are_told_and_the_others_stay():
    found = list(read_openreview(dump({}, 3, {**V2, "id": "a b"}, note(title={"value": ""}), V2)))
    assert [type(each) for each in found] == [Bad] * 4 + [PaperRecord]


def test_names_that_are_too_long_for_the_tables_are_cut():
    found = next(iter(read_openreview(dump(note(venue={"value": "x" * 200})))))
    assert len(found.venues[0].group) == 80
    row = b"id,title,year,venue,group\na,T,2024," + b"v" * 200 + b"," + b"g" * 200
    found = next(iter(read_csv(row)))
    assert len(found.venues[0].name) == len(found.venues[0].group) == 80


def test_a_volume_of_pmlr_is_read():
    first, second = read_bibtex(PMLR, "PMLR", "ICML")
    assert str(first.paper) == "v202-aamand23a@PMLR" and str(second.paper) == "v202-van-den-berg23a@PMLR"
    assert first.title == r"Data Structures for Hilbert's $\ell_{2}$ Distance" and first.abstract == "Let é be."
    assert first.authors == ("Anders Aamand", "Alexandr Andoni", "The Team, Inc.", "Paul Erdős Jr.")
    assert first.venues == (VenuePlace("ICML", 2023, "", 0),) and second.title == "Second paper"
    assert next(iter(read_bibtex(PMLR, "PMLR"))).venues[0].name.startswith("Proceedings of the 40th")


def test_an_entry_of_arxiv_is_that_paper_and_odd_keys_stay_apart():
    body = b"""@misc{x, title={T}, eprint={2401.6769v2}, archivePrefix={arXiv}, year=2024}
    @article{DBLP:conf/x/A, title={A}} @article{DBLP-conf-x-A, title={B}} @article{, title={C}} @article{d, year=2}"""
    found = list(read_bibtex(body, "Local"))
    assert str(found[0].paper) == "2401.06769"
    assert found[0].venues == ()
    keys = [str(each.paper) for each in found[1:3]]
    assert keys[0].startswith("DBLP-conf-x-A-") and keys[1] == "DBLP-conf-x-A@Local"
    assert [type(each) for each in found[3:]] == [Bad, Bad] and "no title" in found[4].reason


def test_a_table_is_read_with_commas_or_tabs():
    found = list(read_csv(CSV))
    first = found[0]
    assert str(first.paper) == "a1@Local" and first.authors == ("Ann Lee", "Bo Chen") and first.doi == "10.1/x"
    assert first.abstract == "Long, text over lines" and first.venues == (VenuePlace("Small Conf", 2024, "Oral", 0),)
    assert str(found[1].paper) == "2401.00001" and found[1].venues == ()
    assert [type(each) for each in found[2:]] == [Bad] * 4
    tabs = list(read_csv(b"id\ttitle\nb1\tOne, two\n", venue="X", year=2020))
    assert tabs[0].title == "One, two" and tabs[0].venues == (VenuePlace("X", 2020, "", 0),)


@pytest.mark.parametrize("body", [b"", b"id\n1\n", b"a,b\n", b"\x00", b'"'])
def test_a_table_without_its_columns_is_refused(body):
    with pytest.raises(BadDocument, match="columns|commas"):
        list(read_csv(body))


def test_json_lines_are_read_and_bad_ones_told():
    found = list(read_jsonl(JSONL))
    assert [type(each) for each in found] == [PaperRecord, Bad, Bad, Bad, PaperRecord]
    assert found[0].venues == (VenuePlace("Small Conf", 2024, "", 0),) and found[0].authors == ("Ann Lee", "Bo Chen")
    assert found[-1].title == "Third" and found[-1].authors == ("Ann Lee", "Bo Chen")
    assert [each.place for each in found[1:4]] == ["line 2", "line 3", "line 4"]


@pytest.mark.parametrize("read", [read_acl, read_openreview])
@pytest.mark.parametrize("body", [b"", PAGE, b"<x/>", b"{}", b"[", b"null", b'{"notes": 3}', b"[" * 100_000])
def test_other_documents_are_refused(read, body):
    with pytest.raises(BadDocument):
        list(read(body))


READERS = [(read_acl, ACL), (read_openreview, dump(V2, V1)), (read_bibtex, PMLR), (read_csv, CSV), (read_jsonl, JSONL)]


@settings(max_examples=400, derandomize=True, deadline=None)
@given(st.sampled_from(READERS), st.integers(0, 1500), st.integers(0, 40), st.binary(max_size=8))
def test_a_damaged_document_gives_records_what_is_bad_or_its_error(reader, at, length, new):
    read, body = reader
    try:
        found = list(read(body[:at] + new + body[at + length :]))
    except BadDocument:
        return
    for each in found:
        assert isinstance(each, Bad) or (each.paper.identifier and all(len(p.name) <= 80 for p in each.venues))


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.sampled_from([read for read, _ in READERS]), st.binary(max_size=200))
def test_any_bytes_give_no_other_error(read, body):
    try:
        list(read(body))
    except BadDocument:
        pass
