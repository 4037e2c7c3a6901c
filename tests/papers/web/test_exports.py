"""Exports that reference managers read, whatever the papers say."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.papers.web.scene import record

from danlu.papers import ids, lists, schema
from danlu.papers.ids import parse_id
from danlu.papers.records import VenuePlace
from danlu.papers.rows import Paper
from danlu.papers.sources.bibtex import Entry, names, parse_bibtex
from danlu.papers.web.exports import Found, bibtex, ris, tex

LINE = re.compile(r"[A-Z][A-Z0-9]  - .*\Z")


def paper(identifier="2405.00001", **values):
    given = {
        "pk": 1, "paper": parse_id(identifier), "title": "A title", "abstract": "Words.", "authors": ("Ada Lovelace",),
        "authors_provisional": False, "categories": ("cs.AI",), "version": 2, "comment": "", "doi": "",
        "journal_ref": "", "license": "", "submitted_at": datetime(2024, 5, 15, tzinfo=UTC), "updated_at": None,
        "announced_on": None, "withdrawn": False, "changed": 1, **values,
    }  # fmt: skip
    return Paper(**given)


def parsed(*papers):
    entries = list(parse_bibtex(bibtex(Found([(each, None) for each in papers], []))))
    assert all(isinstance(entry, Entry) for entry in entries), entries
    return entries


def test_a_preprint_has_its_identifier_and_where_it_is():
    (entry,) = parsed(paper(title="Attention: A Survey", doi="10.1000/x_1", journal_ref="J. 1 (2024)"))
    assert (entry.kind, entry.key) == ("misc", "lovelace2024attention")
    assert entry.text("title") == "Attention: A Survey" and entry.fields["title"].startswith("{")
    assert entry.fields["eprint"] == "2405.00001" and entry.fields["archiveprefix"] == "arXiv"
    assert entry.fields["primaryclass"] == "cs.AI" and entry.fields["year"] == "2024"
    assert entry.fields["url"] == "https://arxiv.org/abs/2405.00001"
    assert entry.fields["doi"] == r"10.1000/x\_1" and entry.text("note") == "J. 1 (2024)"


def test_a_paper_of_a_venue_is_in_its_proceedings():
    (entry,) = parsed(paper("aB_c@OpenReview", venues=(VenuePlace("ICLR", 2023, "Oral", 0),)))
    assert entry.kind == "inproceedings" and entry.fields["booktitle"] == "ICLR 2023"
    assert entry.fields["year"] == "2023" and "eprint" not in entry.fields
    assert entry.fields["url"] == "https://openreview.net/forum?id=aB_c"


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("100% of R&D #1", r"100\% of R\&D \#1"),
        ("a_b^c~d", r"a\_b\textasciicircum{}c\textasciitilde{}d"),
        (r"\input{/etc/passwd}", r"\textbackslash{}input\textbraceleft{}/etc/passwd\textbraceright{}"),
        ("costs $5 or $6", r"costs \$5 or \$6"),
        ("set $\\{x_1\\} \\in a^{2}$ of", "set $\\lbrace x_1\\rbrace  \\in a^{2}$ of"),
        (r"$\\{x}$", r"$\\{x}$"),
        ("$50%$", r"$50\%$"),
        ("$a}b{$", r"\$a\textbraceright{}b\textbraceleft{}\$"),
        ("$a{b$", r"\$a\textbraceleft{}b\$"),
        ("a\r\nb\tc\x00d", "a b cd"),
        ("Gödel 论文", "Gödel 论文"),
    ],
)
def test_characters_with_a_meaning_in_tex_lose_it_outside_formulas(text, written):
    assert tex(text) == written


HOSTILE = st.text(alphabet=st.sampled_from('ab ${}\\%&#_^~"@,()[]=\n\r\x00é论\u2028\ud800'), max_size=40)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.lists(st.tuples(HOSTILE, HOSTILE), min_size=1, max_size=4))
def test_no_title_or_name_ends_its_field_early(texts):
    papers = [
        paper(
            f"2405.0000{place}", title=title, abstract=name, authors=(name, "Kurt Gödel"), doi=title, journal_ref=name
        )
        for place, (title, name) in enumerate(texts, 1)
    ]
    entries = parsed(*papers)
    assert [entry.fields["eprint"] for entry in entries] == [str(each.paper) for each in papers]
    assert len({entry.key for entry in entries}) == len(papers)
    assert all(re.fullmatch("[a-z0-9-]+", entry.key) for entry in entries)
    for entry in entries:
        for value in entry.fields.values():
            depth = 0
            for character in value:
                # As BibTeX counts: a backslash before a brace changes nothing.
                depth += (character == "{") - (character == "}")
                assert depth >= 0
            assert depth == 0


@settings(max_examples=200, derandomize=True, deadline=None)
@given(HOSTILE)
def test_outside_formulas_nothing_is_left_that_tex_obeys(text):
    bare = re.sub(r"\$(?:[^$\\]|\\.)*\$", "", re.sub(r"\\\$", "", tex(text)))
    assert set(re.findall(r"\\([a-z]+|.)", bare)) <= {
        "textbackslash", "textbraceleft", "textbraceright", "textasciitilde", "textasciicircum", "%", "&", "#", "_",
        "(", "[", ")", "]",
    }  # fmt: skip
    assert not re.search(r"(?<!\\)[%&#~]", bare)


def test_authors_stay_as_many_as_they_are():
    people = ("Jan van Gogh", "Sherlock and Watson", "King, Jr, Martin", "The ATLAS Collaboration", "Plato", "O & P")
    (entry,) = parsed(paper(authors=people))
    assert entry.fields["author"].count(" and ") == len(people)  # one of them stands in braces
    assert "{Sherlock and Watson}" in entry.fields["author"] and "{King, Jr, Martin}" in entry.fields["author"]
    assert "{The ATLAS Collaboration}" in entry.fields["author"] and r"O \& P" in entry.fields["author"]
    (entry,) = parsed(paper(authors=("Ada Lovelace", "Kurt Gödel")))
    assert names(entry.fields["author"]) == ("Ada Lovelace", "Kurt Gödel")


def test_papers_with_the_same_author_year_and_word_have_different_keys():
    entries = parsed(paper("2405.00001"), paper("2405.00002"), paper("2405.00003", authors=(), title=""))
    assert [entry.key for entry in entries] == ["lovelace2024title", "lovelace2024title-240500002", "2024"]


def test_ris_has_one_record_a_paper_and_one_tag_a_line():
    people = ("Ada Lovelace", "Jan van Gogh", "Plato", "The ATLAS Collaboration")
    text = ris(Found([(paper(title="T\nER  - \nTY  - JOUR", authors=people, doi="10.1/x"), None), (paper(), None)], []))
    lines = text.split("\r\n")
    assert lines.pop() == "" and all(LINE.match(line) for line in lines)
    assert [line for line in lines if line[:2] in ("TY", "ER")] == ["TY  - UNPB", "ER  - "] * 2
    assert [line[6:] for line in lines if line[:2] == "AU"][:4] == [
        "Lovelace, Ada", "van Gogh, Jan", "Plato", "The ATLAS Collaboration",
    ]  # fmt: skip
    assert "DA  - 2024/05/15" in lines and "PY  - 2024" in lines and "DO  - 10.1/x" in lines
    assert "UR  - https://arxiv.org/abs/2405.00001" in lines and "L1  - https://arxiv.org/pdf/2405.00001" in lines


@settings(max_examples=200, derandomize=True, deadline=None)
@given(HOSTILE, st.text(max_size=20))
def test_no_text_begins_a_line_of_its_own_in_ris(first, second):
    text = ris(Found([(paper(title=first, abstract=second, authors=(first, second), doi=second), None)], []))
    assert "\n" not in text.replace("\r\n", "") and text.encode("utf-8")
    assert all(LINE.match(line) for line in text.split("\r\n")[:-1])


def test_a_paper_of_a_venue_is_a_conference_paper_in_ris():
    text = ris(Found([(paper(venues=(VenuePlace("ICLR", 2023, "", 0),)), None)], []))
    assert text.startswith("TY  - CPAPER\r\n") and "T2  - ICLR 2023\r\n" in text and "PY  - 2023\r\n" in text


def test_no_address_of_data_becomes_a_script_or_leaves_its_field():
    bad = paper(extra={"abs_url": "javascript:alert(1)", "pdf_url": "data:text/html,x"})
    assert "javascript" not in bibtex(Found([(bad, None)], [])) and "data:" not in ris(Found([(bad, None)], []))
    (entry,) = parsed(paper(extra={"abs_url": "https://example.org/a}b{c%20d#e\\f g"}))
    assert entry.fields["url"] == r"https://example.org/a\%7Db\%7Bc\%20d\#e\%5Cf\%20g"


def test_the_papers_come_in_the_order_asked_for_in_every_format(client):
    wanted = ["2405.00003", "hep-th/9901001", "2405.00001", "note0@OpenReview"]
    joined = ",".join(wanted)
    urls = [entry.fields["url"] for entry in parse_bibtex(client.get(f"/export?ids={joined}").text)]
    assert urls == [ids.abs_url(parse_id(each)) for each in wanted]
    tags = client.get(f"/export?ids={joined}&format=ris").text.split("\r\n")
    assert [line[6:] for line in tags if line.startswith("AN")] == wanted
    as_json = client.get(f"/export?ids={joined}&format=json").json()
    assert [each["id"] for each in as_json["papers"]] == wanted and as_json["missing"] == []
    assert as_json == client.get(f"/api/v1/papers?ids={joined}").json()


def test_a_version_that_was_asked_for_is_the_one_that_is_cited(client):
    (entry,) = parse_bibtex(client.get("/export?ids=2405.00004v3").text)
    assert entry.fields["eprint"] == "2405.00004v3" and entry.fields["url"].endswith("/2405.00004v3")
    text = client.get("/export?ids=2405.00004v3,2405.00004v9&format=json")
    assert json.loads(text.text)["missing"] == ["2405.00004v9"] and text.headers["X-Missing"] == "2405.00004v9"
    two = list(parse_bibtex(client.get("/export?ids=2405.00004v3,2405.00004").text))
    assert [entry.fields["eprint"] for entry in two] == ["2405.00004v3", "2405.00004"] and two[0].key != two[1].key


@pytest.mark.parametrize(
    ("wanted", "format", "name", "media"),
    [
        ("2405.00001", "bibtex", "2405.00001.bib", "application/x-bibtex"),
        ("hep-th/9901001", "ris", "hep-th-9901001.ris", "application/x-research-info-systems"),
        ("note0@OpenReview", "json", "note0-OpenReview.json", "application/json"),
        ("2405.00001,2405.00002", "bibtex", "papers.bib", "application/x-bibtex"),
    ],
)
def test_a_file_has_a_plain_name_and_the_type_of_its_format(client, wanted, format, name, media):
    headers = client.get(f"/export?ids={wanted}&format={format}").headers
    assert headers["Content-Disposition"] == f'attachment; filename="{name}"'
    assert headers["Content-Type"] == f"{media}; charset=utf-8"


def test_two_hundred_papers_are_exported_and_not_one_more(client, site):
    many = [f"2406.{n:05}" for n in range(1, 202)]
    site.store.upsert(record(each, "Many") for each in many)
    text = client.get(f"/export?ids={','.join(many[:200])}").text
    assert len({entry.key for entry in parse_bibtex(text)}) == 200
    answer = client.get(f"/export?ids={','.join(many)}")
    assert answer.status_code == 400 and "200" in answer.text
    assert client.get(f"/export?ids={'x' * 8193}").status_code == 400
    long = ",".join(f"{'a' * 150}{n}@OpenReview" for n in range(60))
    assert len(long) > 8192
    answer = client.get(f"/export?ids={long}")
    assert answer.status_code == 400 and "8192" in answer.text


@pytest.mark.parametrize(
    ("path", "status", "names"),
    [
        ("/export?ids=2405.00001&format=word", 400, "word"),
        ("/export?ids=2405.00001,nonsense", 400, "nonsense"),
        ("/export?ids=", 400, "identifier"),
        ("/export", 400, "identifier"),
        ("/export?ids=2401.00009", 404, "2401.00009"),
        ("/export?ids=2405.00001%0d%0aX-Bad:1", 400, "X-Bad"),
    ],
)
def test_what_cannot_be_exported_is_named(client, path, status, names):
    answer = client.get(path)
    assert answer.status_code == status and names in answer.text and "X-Bad" not in answer.headers


def test_halves_of_characters_in_the_database_do_not_break_an_export(client, site):
    with site.store.writing() as connection:
        connection.execute(schema.paper.update().values(authors=["\ud800 Half", "A\x00B"]))
    key = lists.find(site.store, [parse_id("2405.00001")])
    assert "\ud800" in lists.papers(site.store, list(key.values()))[0].authors[0]
    for format in ("bibtex", "ris", "json"):
        answer = client.get(f"/export?ids=2405.00001&format={format}")
        assert answer.status_code == 200 and "Half" in answer.text and "AB" in answer.text
