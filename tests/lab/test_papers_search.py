"""The parts of the claim on the site's search, at sizes that take no time."""

from __future__ import annotations

import pytest

from danlu.lab import papers_search
from danlu.lab.claim import Context

TEXTS = tuple(
    (topic, f"{topic} thing number {n}", f"This {topic} text speaks of {words} and of {n % 3}.")
    for topic, words in (("sea", "ships waves"), ("sky", "birds clouds"), ("wood", "trees moss"), ("town", "streets"))
    for n in range(8)
)


def test_the_area_is_the_share_of_pairs_in_order():
    assert papers_search.area_under([True, True, False, False]) == 1.0
    assert papers_search.area_under([False, False, True]) == 0.0
    assert papers_search.area_under([True, False, True, False]) == 0.75


def test_topics_that_share_words_are_found_and_chance_is_lower(tmp_path):
    index, read = papers_search.indexed(TEXTS, tmp_path)
    topics = [topic for topic, _, _ in TEXTS]
    assert [paper.title for paper in read] == [title for _, title, _ in TEXTS]

    def keywords(paper):
        return papers_search.any_of([keyword.term for keyword in index.keywords(paper)])

    assert papers_search.precision(index, read, topics, keywords) == 1.0
    # A query of nothing finds nothing, which is a miss.
    assert papers_search.precision(index, read, topics, lambda paper: papers_search.any_of([])) == 0.0
    shifted = topics[1:] + topics[:1]
    assert papers_search.precision(index, read, shifted, keywords) < 1.0
    index.close()


def test_a_reader_of_topics_gets_their_texts_first(tmp_path):
    index, read = papers_search.indexed(TEXTS, tmp_path)
    topics = [topic for topic, _, _ in TEXTS]
    areas, lifts = papers_search.preference(index, read, topics, 0, draws=4)
    assert min(areas) > 0.9 and len(areas) == len(lifts) == 4
    # Three of the four topics are wanted: 14 of 22 texts, all of them among the first 22.
    assert papers_search.preference(index, read, topics, 0, draws=4) == (areas, lifts)
    index.close()


def test_texts_of_the_standard_library_are_long_of_real_modules_and_each_once(monkeypatch):
    monkeypatch.setattr(
        papers_search.sys, "stdlib_module_names", frozenset({"json", "textwrap", "decimal", "_pydecimal"})
    )
    found = papers_search.standard_library.__wrapped__()
    topics = [topic for topic, _, _ in found]
    # The texts of _pydecimal are decimal's own.
    assert set(topics) <= {"json", "textwrap", "decimal"} and topics.count("decimal") > 50
    assert all(len(f"{first} {rest}") >= papers_search.LENGTH - 40 for _, first, rest in found)
    assert len({(first, rest) for _, first, rest in found}) == len(found)


@pytest.mark.parametrize("hopeless", [False, True])
def test_the_whole_claim_at_a_tiny_size(hopeless, tmp_path, monkeypatch):
    texts = TEXTS
    if hopeless:
        # Topics that no word tells apart.
        texts = tuple((topic, title.split()[-1] + " thing", "the same words") for topic, title, _ in TEXTS)
    monkeypatch.setattr(papers_search, "standard_library", lambda: texts)
    evidence = papers_search.papers_related.experiment(Context(seeds=(0,), cache=tmp_path))
    met = {check.description: check.met for check in evidence.checks}
    assert met["precision of ten keywords at least .60"] is not hopeless
    assert met["preference: mean area at least .75"] is not hopeless
