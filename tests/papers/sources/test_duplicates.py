from __future__ import annotations

import itertools
from dataclasses import replace

import sqlalchemy as sa
from tests.papers.contents import contents

from danlu.papers import schema
from danlu.papers.ids import parse_id
from danlu.papers.lists import find
from danlu.papers.records import PaperRecord
from danlu.papers.sources.duplicates import Link, link, links
from danlu.papers.store import Store
from danlu.papers.works import fingerprint

TITLE = "Attention is about everything you need"
ARXIV = PaperRecord(parse_id("2401.00001"), "api", title=TITLE, authors=("Ann Núñez", "Bo Chen"))
VENUE = PaperRecord(parse_id("x1@OpenReview"), "venue", title=TITLE.upper() + "!", authors=("A. Nunez",))
BY_DOI = PaperRecord(parse_id("2024.acl-long.1@ACL"), "venue", title="Another title altogether", doi="10.1/x")
OTHER = PaperRecord(parse_id("2401.00002"), "api", title=TITLE, authors=("Ann Núñez",), doi="10.1/x")
STRANGER = PaperRecord(parse_id("x2@OpenReview"), "venue", title=TITLE, authors=("Carl Dee",))


def keys(store, *records):
    return [find(store, [record.paper])[record.paper] for record in records]


def test_records_of_other_sources_are_linked_by_doi_or_title_and_first_author_and_stay_apart(store):
    store.upsert([ARXIV, VENUE, BY_DOI, OTHER, STRANGER])
    assert link(store) == 3
    arxiv, venue, by_doi, other, stranger = keys(store, ARXIV, VENUE, BY_DOI, OTHER, STRANGER)
    assert links(store, [arxiv, venue, by_doi, other, stranger]) == {
        arxiv: [Link(venue, "title")],
        venue: [Link(arxiv, "title"), Link(other, "title")],
        by_doi: [Link(other, "doi")],
        other: [Link(venue, "title"), Link(by_doi, "doi")],
    }
    with store.reading() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(schema.paper)) == 5


def test_only_what_has_changed_is_looked_at_and_nothing_is_linked_twice(store):
    store.upsert([ARXIV, VENUE])
    assert (link(store), link(store)) == (1, 0)
    store.upsert([BY_DOI])
    store.upsert([OTHER])
    assert link(store) == 2
    store.upsert([replace(OTHER, comment="new")])
    before = contents(store)["duplicate"]
    assert link(store) == 2 and contents(store)["duplicate"] == before and len(before) == 3


def test_a_link_ends_with_its_reason(store):
    store.upsert([ARXIV, VENUE])
    link(store)
    store.upsert([replace(ARXIV, version=2, title="A new title for the second version")])
    assert link(store) == 0 and contents(store)["duplicate"] == []


def test_the_order_of_sources_does_not_matter():
    found = set()
    records = [ARXIV, VENUE, BY_DOI, OTHER]
    for order in itertools.permutations(records):
        store = Store()
        for record in order:
            store.upsert([record])
            link(store)
        found.add(repr(contents(store)))
        store.close()
    assert len(found) == 1


def test_a_fingerprint_needs_a_title_and_an_author():
    assert fingerprint(TITLE, ["Ann Lee, Jr."]) == fingerprint("attention  IS about-everything you need.", ["A. Lee"])
    assert fingerprint(TITLE, ["Ann Lee"]) != fingerprint(TITLE, ["Ann Chen"])
    assert fingerprint("Preface", ["Ann Lee"]) is None and fingerprint(TITLE, []) is None
    assert 0 <= fingerprint(TITLE, [" , "]) < 2**63
