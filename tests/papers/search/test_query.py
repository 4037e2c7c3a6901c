from __future__ import annotations

from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.papers.search.query import Query, Term, parse_query


def _one(*words, field="any"):
    return Term(words, field)


def test_words_are_optional_and_signs_and_quotes_are_not():
    assert parse_query('deep +flow -noise "rectified flow" -"straight path" +"a b"') == Query(
        should=(_one("deep"),),
        must=(_one("flow"), _one("rectified", "flow"), _one("a", "b")),
        must_not=(_one("noise"), _one("straight", "path")),
    )


def test_fields_of_text_take_words_phrases_and_signs():
    query = parse_query('ti:Flow AU:su -ti:"rectified flow" +au:Schrödinger')
    assert query.should == (_one("flow", field="title"), _one("su", field="authors"))
    assert query.must == (_one("schrodinger", field="authors"),)
    assert query.must_not == (_one("rectified", "flow", field="title"),)


def test_restrictions_exclude_with_a_minus():
    query = parse_query("x cat:cs.LG,cs.AI -cat:cs.CV venue:ICLR.2024 -venue:NeurIPS -date:2020")
    assert query.categories == ("cs.AI+cs.LG",) and query.not_categories == ("cs.CV",)
    assert query.venues == ("iclr.2024",) and query.not_venues == ("neurips",)
    assert query.not_days == ((date(2020, 1, 1), date(2020, 12, 31)),)
    assert (query.first_day, query.last_day, query.should) == (None, None, (_one("x"),))


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("date:2024", date(2024, 1, 1), date(2024, 12, 31)),
        ("date:2024-02", date(2024, 2, 1), date(2024, 2, 29)),
        ("date:2024-2-9", date(2024, 2, 9), date(2024, 2, 9)),
        ("date:2023-05..2024-01-15", date(2023, 5, 1), date(2024, 1, 15)),
        ("date:2023..", date(2023, 1, 1), None),
        ("date:..2023-06", None, date(2023, 6, 30)),
        ("date:2020.. date:..2022", date(2020, 1, 1), date(2022, 12, 31)),
        ("date:9999-12", date(9999, 12, 1), date(9999, 12, 31)),
    ],
)
def test_dates_are_days_months_years_and_stretches(text, first, last):
    query = parse_query(text)
    assert (query.first_day, query.last_day, query.should) == (first, last, ())


@pytest.mark.parametrize(
    "text",
    ["date:2024-13", "date:0000", "date:2023-02-30", "date:soon", "date:..", "venue:%", "venue:_", "cat:cs.XX", "cat:"],
)
def test_what_cannot_be_understood_is_read_as_words(text):
    query = parse_query(text)
    assert (query.first_day, query.last_day, query.categories, query.venues) == (None, None, (), ())
    assert query.should[0] == _one(text.partition(":")[0])


@pytest.mark.parametrize("text", ["", " ", '"', "*", ":", "+", "-", '""', "-flow", "-cat:cs.CV", "!?"])
def test_nothing_wanted_is_an_empty_query(text):
    assert parse_query(text).empty


def test_a_typed_word_falls_apart_and_a_run_of_chinese_stands():
    assert parse_query("state-of-the-art").should == tuple(map(_one, ("state", "of", "the", "art")))
    assert parse_query("扩散模型").should == (_one("扩散", "散模", "模型"),)
    assert parse_query("C++").should == (_one("c"),)


def test_a_query_has_at_most_32_words_and_restrictions():
    query = parse_query(" ".join(f"w{i}" for i in range(50)))
    assert query.should == tuple(_one(f"w{i}") for i in range(32))
    query = parse_query("cat:cs-cs.AI " * 30 + " ".join(f"w{i}" for i in range(50)))
    assert len(query.categories) == 30 and len(query.should) == 2
    assert len(parse_query("cat:cs " * 200).categories) == 32


def test_marked_words_are_those_that_were_wanted():
    assert parse_query('a +b -c "b d" cat:cs').highlighted() == ("a", "b", "d")


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    st.text(max_size=60)
    | st.from_regex(r'([+\-]?(ti|au|cat|date|venue):?["*()^:.%_0-9a-zé中]{0,8} ?){0,6}', fullmatch=True)
)
def test_any_text_is_a_query(text):
    query = parse_query(text)
    terms = (*query.should, *query.must, *query.must_not)
    assert all(word.isalnum() for term in terms for word in term.words)
    assert sum(len(term.words) for term in terms) <= 32
