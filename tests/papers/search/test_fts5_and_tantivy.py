"""What both engines must do alike."""

from __future__ import annotations

import random
from datetime import date

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.papers.search.conftest import LIBRARY, make

from danlu.papers.search import fts5, open_index, parse_query
from danlu.papers.store import Store
from danlu.papers.tokens import words


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("rotary", {1}),
        ("Rectified", {2, 3}),
        ('"rectified flow"', {2}),
        ("rectified flow", {2, 3, 6}),
        ("+rectified +flow", {2, 3}),
        ("+flow rotary", {2, 3, 6}),
        ("+flow -rectified", {6}),
        ("-flow", set()),
        ('flow -"rectified flow"', {3, 6}),
        ("position", {1, 4}),
        ("ti:position", {1}),
        ("-ti:position position", {4}),
        ("au:su", {1}),
        ("ti:su", set()),
        ("schrodinger", {1}),
        ("SCHRÖDINGER", {1}),
        ("naive", {6}),
        ("state-of-the-art", {4, 5, 6}),  # "of" is a word of a query
        ('"state of the art"', {4}),
        ("采样", {5}),
        ("扩散模型", {5}),
        ("模型扩散", set()),
        ("快", set()),
        ("cat:cs.LG", {1, 2, 5}),
        ("cat:cs.NA", {5}),
        ("cat:cs", {1, 2, 3, 4, 5}),
        ("cat:cs.LG-cs.CV", {1, 5}),
        ("cat:cs.LG -cat:cs.CV", {1, 5}),
        ("cat:cs.CL cat:cs.CV", {2, 3, 4}),
        ("flow -cat:cs.LG", {3, 6}),
        ("cat:cs.CV -rectified", set()),
        ("cat:cs.LG -rectified", {1, 5}),
        ("venue:acl", {4}),
        ("venue:ICLR.2024", {6}),
        ("venue:iclr.2023", set()),
        ("venue:icl", set()),
        ("venue:symp", set()),
        ('venue:"aaai  symp.2024"', {6}),
        ("parsing -venue:acl", {6}),
        ("parsing -venue:iclr.2024", {4}),
        ("date:2024", {1, 2, 5, 6}),
        ("date:2024-01-15", {1, 6}),
        ("date:..2023-05-01", {3, 4}),
        ("date:2024-02..", {5}),
        ("flow date:2023", {3}),
        ("flow -date:2023", {2, 6}),
        ("flow -date:2024-01-16..", {3, 6}),
        ("date:2022-12-31 -date:2022", set()),
        ("nowhere", set()),
        ("NEAR(rotary rectified)", {1, 2, 3}),
        ("rot*", set()),
        ("rotary AND nowhere", {1, 2}),
    ],
)
def test_what_a_query_finds(index, text, found):
    hits = index.search(text)
    assert set(hits.keys) == found and hits.total == len(hits.scores) == len(found)
    by_date = index.search(text, sort="date")
    assert set(by_date.keys) == found
    days = {key: (LIBRARY[key - 1].submitted_at, key) for key in found}
    assert list(by_date.keys) == sorted(found, key=days.__getitem__, reverse=True)


def test_a_branch_holds_its_own_papers(index):
    assert set(index.search("parsing", branch="venue").keys) == {4, 6}
    assert set(index.search("parsing", branch="arxiv").keys) == {4}


def test_scores_fall_and_more_words_are_better(index):
    hits = index.search("rectified flow straight")
    assert hits.keys[0] == 2 and list(hits.scores) == sorted(hits.scores, reverse=True)
    assert hits.scores[0] > hits.scores[-1]


def test_a_limit_cuts_the_end(index):
    whole, cut = index.search("flow rectified"), index.search("flow rectified", limit=2)
    assert cut.keys == whole.keys[:2] and cut.scores == whole.scores[:2]


def test_within_looks_at_a_list_alone(index):
    assert set(index.search("flow", within=[3, 1, 99]).keys) == {3}
    assert index.search("flow", within=[]).keys == ()


def test_equal_papers_stand_newest_first(engine, tmp_path):
    store = Store()
    twins = [make(n, "twin", "same words", date(2024, 1, 1 + day)) for n, day in enumerate([3, 1, 2, 3, 1], start=1)]
    for twin in twins:
        store.upsert([twin])
    opened = open_index(tmp_path, engine)
    opened.update(store)
    expected = (4, 1, 3, 5, 2)
    assert opened.search("twin").keys == opened.search("twin", sort="date").keys == expected
    assert opened.search("cat:cs.LG").keys == expected
    opened.close()


def test_related_papers_share_keywords_without_the_paper_itself(index, library):
    from danlu.papers.lists import papers

    second = papers(library, [2])[0]
    related = index.related(second)
    assert related.keys[0] == 3 and 2 not in related.keys
    # The paper of a venue alone is in another branch.
    assert 6 not in related.keys
    assert index.related(second, limit=1).keys == related.keys[:1]


def test_rank_moves_matches_ahead_and_keeps_the_order_of_the_rest(index):
    ranked = index.rank(["rectified", "straight", "nowhere"], [6, 5, 3, 1, 2, 4])
    assert set(ranked[:2]) == {2, 3} and ranked[2:] == [6, 5, 1, 4]
    assert index.rank([], [3, 1]) == [3, 1] and index.rank(["flow"], []) == [] and index.rank(["!"], [2, 1]) == [2, 1]


def test_rank_reaches_beyond_a_thousand_papers_and_counts_common_words(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(fts5, "COMMON_FLOOR", 10)
    store = Store()
    store.upsert(make(n, "common" if n % 2 else "rest", "rare" if n == 7 else "") for n in range(1, 2401))
    opened = open_index(tmp_path, engine)
    opened.update(store)
    keys = list(range(1, 2401))
    random.Random(0).shuffle(keys)
    ranked = opened.rank(["common", "rare"], keys)
    assert ranked[0] == 7 and all(key % 2 for key in ranked[:1200])
    assert ranked[1200:] == [key for key in keys if key % 2 == 0]
    opened.close()


@pytest.fixture(scope="module", params=["fts5", "tantivy"])
def strange(request, tmp_path_factory):
    """An index of papers of strange words, and the words."""
    alphabet = [chr(c) for c in [*range(0x80, 0x3000, 7), *range(0x3000, 0xD7FF, 97), *range(0xE000, 0x32000, 131)]]
    texts = ["".join(alphabet[i : i + 40]) for i in range(0, len(alphabet), 40)]
    store = Store()
    store.upsert([make(n, "strange", text) for n, text in enumerate(texts, start=1)])
    opened = open_index(tmp_path_factory.mktemp("strange"), request.param)
    opened.update(store)
    yield opened, texts
    opened.close()


def test_every_word_of_every_script_is_found_again(strange):
    opened, texts = strange
    for key, text in enumerate(texts, start=1):
        for word in dict.fromkeys(words(text)):
            assert key in opened.search(f'"{word}"', within=[key]).keys, (word, text)


# fmt: off
PIECES = ["NEAR(", '"', "*", "-", "+", "OR", "AND NOT", "ti:", "cat:cs", "-cat:cs.LG", "\ud800", "venue:\ud800",
          "venue:'", "date:9999-12", "date:..0001", "\x00", "flow", "{title}", "^a", "a:b", "C++"]
# fmt: on


@settings(max_examples=80, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(max_size=60)
    | st.from_regex(r'([+\-]?(ti:|au:|cat:|date:|venue:)?["*()^:.%_0-9a-zé中\\]{0,8} ?){0,6}', fullmatch=True)
    | st.lists(st.sampled_from(PIECES)).map(" ".join)
)
def test_no_text_is_an_error(strange, text):
    opened, texts = strange
    for sort in ("relevance", "date"):
        hits = opened.search(text, sort=sort, branch="arxiv")
        assert len(set(hits.keys)) == hits.total <= len(texts)
        assert set(hits.keys) <= set(range(1, len(texts) + 1))
    assert sorted(opened.rank([text], [3, 1, 2])) == [1, 2, 3]


def test_a_query_full_of_subjects_is_no_error(index):
    assert set(index.search("cat:cs-cs.CV -cat:math-math.NA " * 60).keys) == {1, 4, 5}


def test_both_engines_find_the_same_papers(library, tmp_path):
    first, second = (open_index(tmp_path / name, name) for name in ("fts5", "tantivy"))
    first.update(library)
    second.update(library)
    draw = random.Random(1)
    parts = ["flow", "+flow", "-rectified", '"rectified flow"', "ti:position", "cat:cs.LG", "-cat:cs.CV", "date:2024",
             "-date:2023", "venue:acl", "-venue:iclr", "straight", "采样", "+parsing"]  # fmt: skip
    for _ in range(150):
        text = " ".join(draw.sample(parts, draw.randint(1, 4)))
        assert set(first.search(text).keys) == set(second.search(text).keys), text
    first.close()
    second.close()


def test_very_common_words_alone_look_at_the_newest_of_the_days_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(fts5, "COMMON_FLOOR", 3)
    monkeypatch.setattr(fts5, "NEWEST", 5)
    store = Store()
    store.upsert(make(n, "common", "rare" if n == 2 else "", date(2024, 1, n)) for n in range(1, 21))
    opened = open_index(tmp_path)
    opened.update(store)
    hits = opened.search("common")
    assert hits.keys == (20, 19, 18, 17, 16) and hits.partial
    assert opened.search("+common").partial
    hits = opened.search("common date:..2024-01-08")
    assert hits.keys == (8, 7, 6, 5, 4) and hits.partial
    hits = opened.search("common date:..2024-01-03")
    assert set(hits.keys) == {1, 2, 3} and not hits.partial
    # A rare word decides, and the common one beside it is not looked for.
    assert opened.search("common rare").keys == (2,) and not opened.search("common rare").partial
    assert set(opened.search("+common +rare").keys) == {2}
    # All of a list is looked at.
    assert set(opened.search("common", within=[1, 2, 20]).keys) == {1, 2, 20}
    opened.close()


def test_a_query_may_be_given_read(index):
    assert index.search(parse_query("rotary")) == index.search("rotary")


def test_an_unknown_engine_is_refused(tmp_path):
    with pytest.raises(ValueError, match="engine must be fts5 or tantivy, got 'lucene'"):
        open_index(tmp_path, "lucene")
