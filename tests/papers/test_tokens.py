from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from danlu.papers.tokens import QUERY_WORDS, fold, query_words, stop_words, words


def test_words_are_folded_and_hyphens_part_them():
    assert words("Schrödinger’s state-of-the-art ﬁne GPT-4 Straße") == [
        "schrodinger",
        "s",
        "state",
        "of",
        "the",
        "art",
        "fine",
        "gpt",
        "4",
        "strasse",
    ]


def test_scripts_without_spaces_become_pairs():
    assert words("中文分词 abc文本x 字") == ["中文", "文分", "分词", "abc", "文本", "x", "字"]
    assert words("ディープ") == words("ディープ") != []


def test_syntax_of_search_engines_leaves_no_trace():
    assert words('NEAR( C++ -x a:b " * ^ {}') == ["near", "c", "x", "a", "b"]


@given(st.text(max_size=80))
def test_folding_again_changes_nothing(text):
    assert fold(fold(text)) == fold(text)
    assert all(word == fold(word) for word in words(text))


def test_queries_are_bounded_and_hold_each_word_once():
    assert query_words("a b a " + " ".join(map(str, range(100))))[:3] == ["a", "b", "0"]
    assert len(query_words(" ".join(map(str, range(100))))) == QUERY_WORDS


def test_stop_words_are_folded():
    assert "the" in stop_words() and "learning" not in stop_words() and all(word == fold(word) for word in stop_words())


@given(st.text(st.characters(max_codepoint=127), max_size=60))
def test_plain_text_takes_a_shorter_way_to_the_same_words(text):
    # A character that folds to nothing sends the same text the long way.
    assert words(text) == words(text + " \u0301") and fold(text) + " " == fold(text + " \u0301")
