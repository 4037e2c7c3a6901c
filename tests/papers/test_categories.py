from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.papers.categories import (
    ALIASES,
    InvalidExpression,
    belongs,
    members,
    parse_expression,
    shown,
    split_codes,
    vocabulary,
)

NAMES = sorted(vocabulary())


def test_the_vocabulary_is_complete():
    active = [code for code, category in vocabulary().items() if category.active]
    assert len(active) == len(set(active)) and {
        "cs.LG",
        "math-ph",
        "physics.ao-ph",
        "cond-mat.mes-hall",
        "q-bio.NC",
    } <= set(active)
    assert sum(code.startswith("cs.") for code in active) == 40
    assert sum(code.startswith("math.") for code in active) == 32


@pytest.mark.parametrize("text", ["cs.AI,cs.CL", "cs.CL,cs.AI", "cs.AI+cs.CL", "cs.AI+cs.AI,cs.CL+cs.CL"])
def test_unions_have_one_canonical_form(text):
    assert str(parse_expression(text)) == "cs.AI+cs.CL"


def test_names_with_hyphens_are_read_whole():
    assert str(parse_expression("physics.ao-ph-hep-ph")) == "physics.ao-ph-hep-ph"
    parsed = parse_expression("cond-mat.mes-hall+math-ph-q-bio")
    assert parsed.include == ("cond-mat.mes-hall", "math-ph") and parsed.exclude == ("q-bio",)


def test_differences_do_not_depend_on_order():
    first, second = parse_expression("cs.AI-cs.CY+cs.LG"), parse_expression("cs.LG+cs.AI-cs.CY")
    assert first == second and str(first) == "cs.AI+cs.LG-cs.CY"


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("", ""),
        ("cs.AI++cs.CL", "+cs.CL"),
        ("cs.AI-", ""),
        ("foo", "foo"),
        ("cs.AI,foo+x", "foo+x"),
        ("-cs.AI", "-cs.AI"),
        ("cs.AIcs.CL", "cs.AIcs.CL"),
        ("cs.AI cs.CL", "cs.AI cs.CL"),
    ],
)
def test_what_cannot_be_read_is_named_from_there(text, rest):
    with pytest.raises(InvalidExpression) as caught:
        parse_expression(text)
    assert caught.value.rest == rest


def test_membership_is_closed_under_second_names():
    assert belongs(["stat.TH"], "math.ST") and belongs(["math.ST"], "stat.TH") and belongs(["stat.TH"], "math")
    assert belongs(["math.MP"], "math-ph") and belongs(["math-ph"], "math.MP")
    assert belongs(["math-ph"], "math") and not belongs(["math-ph"], "math.PR")
    assert not belongs(["hep-ph"], "physics") and belongs(["hep-ph"], "physics-group")
    assert shown(["cs.NA", "math.NA", "cs.LG"]) == ("math.NA", "cs.LG")
    assert all(second in vocabulary() or name in vocabulary() for second, name in ALIASES.items())


def test_groups_hold_what_is_under_them():
    assert "cs.LG" in members("cs") and "cs" in members("cs") and "cond-mat" not in members("physics")


@given(
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=4),
    st.lists(st.sampled_from(NAMES), max_size=3),
    st.lists(st.sampled_from(NAMES), max_size=3),
)
def test_expressions_are_sets(include, exclude, own):
    text = "+".join(include) + "".join("-" + name for name in exclude)
    parsed = parse_expression(text)
    assert parse_expression(str(parsed)) == parsed
    inside = any(belongs(own, name) for name in include) and not any(belongs(own, name) for name in exclude)
    assert parsed.matches(own) == inside
    for order in itertools.islice(itertools.permutations(include), 6):
        assert parse_expression(",".join(order) + "".join("-" + name for name in exclude)) == parsed


@given(st.text(max_size=30))
def test_any_text_is_an_expression_or_refused(text):
    try:
        parse_expression(text)
    except InvalidExpression as error:
        assert text.endswith(error.rest)


def test_codes_of_other_schemes_are_kept_apart():
    assert split_codes(["cs.LG", "I.2.6", "68T07", "stat.ML"]) == (("cs.LG", "stat.ML"), ("I.2.6", "68T07"))
