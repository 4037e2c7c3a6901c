from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.papers.sources.bibtex import BadEntry, Entry, names, parse_bibtex


def test_values_may_be_braced_quoted_bare_and_joined():
    found = list(
        parse_bibtex(
            '@string{me = "Ann"} @article(k, a = {x {y} z}, b = "q {"} r", c = 12, d = me # " L" # {.}, m = jan)'
        )
    )
    assert found == [Entry("article", "k", {"a": "x {y} z", "b": 'q {"} r', "c": "12", "d": "Ann L.", "m": "jan"})]


def test_text_between_entries_comments_and_preambles_are_passed_over():
    found = list(parse_bibtex('hello @comment{x} @preamble{"y"} me@x.org @misc{a, t={1}} bye @misc{b, t={2}}'))
    assert [entry.key for entry in found] == ["a", "b"]


def test_the_first_of_equal_fields_counts():
    assert list(parse_bibtex("@misc{a, T={1}, t={2}}"))[0].fields == {"t": "1"}


def test_fields_as_text_have_letters_and_no_braces():
    entry = next(iter(parse_bibtex(r"@misc{a, title={{B}ERT  and {\'E}l{\`e}ves \& $x_{i}$}}")))
    assert entry.text("title") == "BERT and Élèves & $x_{i}$" and entry.text("none") == ""


@pytest.mark.parametrize(
    ("field", "found"),
    [
        ("Lee, Ann and Bo Chen", ("Ann Lee", "Bo Chen")),
        ("de la Cruz, Jr., Ana", ("Ana de la Cruz Jr.",)),
        ("{Barnes and Noble, Inc.} and X Y", ("Barnes and Noble, Inc.", "X Y")),
        ("Ann\n  and   Bo and others", ("Ann", "Bo")),
        (r"Erd{\H o}s, Paul", ("Paul Erdős",)),
        ("", ()),
    ],
)
def test_names_are_put_in_order(field, found):
    assert names(field) == found


def test_what_cannot_be_read_is_told_and_the_next_entry_is_found():
    text = "@misc{a, t={open\n@misc{b, t={1}}\n@misc{c, t}\n@misc{d\n@misc{e, t={2}}\n@misc{f, t={3"
    found = list(parse_bibtex(text))
    assert [each.key for each in found if isinstance(each, Entry)] == ["b", "e"]
    assert sum(isinstance(each, BadEntry) for each in found) == 4


def test_hostile_files_end_soon():
    begin = time.process_time()
    list(parse_bibtex("@a{b,c={" * 100_000))
    list(parse_bibtex('@a{b,c="' * 100_000))
    list(parse_bibtex("@a{b,c={\n" * 50_000))
    list(parse_bibtex("@a" * 200_000))
    doubled = '@string{a = "xxxxxxxxxx"}' + "@string{a = a # a}" * 60 + "@misc{k, t = a # a}"
    doubled += "".join(f"@string{{a{i + 1} = a{i} # a{i}}}" for i in range(60)).replace("a0", "a")
    found = list(parse_bibtex(doubled))
    assert any(isinstance(each, BadEntry) and "more than" in str(each) for each in found)
    assert time.process_time() - begin < 5


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.text(st.sampled_from(list('@{}()",=#\\ \nab1%')), max_size=80))
def test_any_text_gives_entries_and_bad_entries(text):
    for each in parse_bibtex("@misc{k," + text):
        assert isinstance(each, Entry | BadEntry)
    names(text)
