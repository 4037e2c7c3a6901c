from __future__ import annotations

import math

import pytest

from danlu.papers.search.keywords import weigh


def _of(frequencies, total):
    return lambda words: ({word: frequencies[word] for word in words if word in frequencies}, total)


def test_weights_are_those_of_the_formula():
    found = weigh("Flow matching", "Matching of flow, a flow of noise.", _of({"flow": 3, "matching": 1, "noise": 7}, 7))
    # (3 tf_title + tf_abstract) (ln((1 + N) / (1 + df)) + 1)
    assert [(k.term, k.weight) for k in found] == [
        ("matching", pytest.approx(4 * (math.log(8 / 2) + 1))),
        ("flow", pytest.approx(5 * (math.log(8 / 4) + 1))),
        ("noise", pytest.approx(1.0)),
    ]
    assert found[0].weight == pytest.approx(9.545177444479563)


def test_equals_are_in_alphabetical_order():
    assert [k.term for k in weigh("zebra apple", "", _of({"zebra": 2, "apple": 2}, 9))] == ["apple", "zebra"]


def test_words_of_one_paper_go_only_where_enough_others_remain():
    title = "alpha beta gamma delta"
    frequencies = {"alpha": 1, "beta": 2, "gamma": 2, "delta": 2}
    assert [k.term for k in weigh(title, "", _of(frequencies, 9), 3)] == ["beta", "delta", "gamma"]
    assert [k.term for k in weigh(title, "", _of(frequencies, 9), 4)] == ["alpha", "beta", "delta", "gamma"]


def test_stop_words_numbers_and_single_letters_are_no_keywords():
    assert [k.term for k in weigh("The x of 2024 and transformers", "we a 7", _of({}, 0))] == ["transformers"]


@pytest.mark.parametrize(
    "text",
    [
        r"Cost $O(n^{2i}\theta)$ of sums",
        r"Cost $$\theta = 2i$$ of sums",
        r"Cost \(\theta_{2i}\) of sums",
        r"Cost \[\theta_{2i}\] of sums",
        r"Cost $\theta\$2i$ of sums",
        "Cost $\\theta\n2i$ of sums",
    ],
)
def test_formulas_are_no_keywords(text):
    assert [k.term for k in weigh(text, text, _of({}, 0))] == ["cost", "sums"]


def test_money_is_no_formula():
    assert {"million", "training"} <= {k.term for k in weigh("", "costs $5 million of training, not $10", _of({}, 0))}


def test_an_empty_paper_has_none():
    assert weigh("", "$x$", _of({}, 0)) == []
