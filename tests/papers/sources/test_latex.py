from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.papers.sources.latex import doi, originals, plain, without_braces


@pytest.mark.parametrize(
    ("tex", "text"),
    [
        (r"Schr\"{o}dinger", "Schrödinger"),
        (r"Schr{\"o}dinger", "Schrödinger"),
        (r"Erd\H{o}s, Erd\H os", "Erdős, Erdős"),
        (r"{\'e}t{\'{e}}", "été"),
        (r"{caf\'{e}} noir", "{café} noir"),
        (r"{\'e clair}", "{é clair}"),
        (r"\v{C}ech and \c{c} and \k{a}", "Čech and ç and ą"),
        (r"\L{}ukasz {\L}uk \L ukasz", "Łukasz Łuk Łukasz"),
        (r"Stra{\ss}e \o{} \aa ngstrom", "Straße ø ångstrom"),
        (r"\'{\i}x \'\i{} na\"{\i}ve", "íx í{} naïve"),
        (r"\=a \u{g} \.z \r{u} \d{s} \b{d}", "ā ğ ż ů ṣ ḏ"),
        (r"\emph{very} \textbf{big} news", "very big news"),
        (r"R\&D at 5\% for \$3", "R&D at 5% for $3"),
        ("e\u0301", "é"),
    ],
)
def test_accents_become_composed_letters(tex, text):
    assert plain(tex) == text


@pytest.mark.parametrize(
    "formula", [r"$\o$", r"$\"{o}$", r"$$\v{c}~d$$", r"\(\'{e}\)", r"\[\aa\]", r"$a_{\rm{x}}$", r"$\bar{\alpha}$"]
)
def test_mathematics_is_left_alone(formula):
    assert plain(rf"\'e {formula} \o") == f"é {formula} ø"
    assert without_braces("{A} " + formula + " {B}") == f"A {formula} B"


@pytest.mark.parametrize(
    "text", [r"\cite{v}", r"\phi and \beta", r"\ulcorner", r"\cup", r"\hat x", r"\vec v", r"\oint"]
)
def test_other_commands_are_not_taken_for_accents(text):
    assert plain(text) == text


def test_a_tie_is_a_space_but_other_tildes_stay():
    assert plain("Fig.~3 of D.~Knuth") == "Fig. 3 of D. Knuth"
    assert plain("in ~10% of https://x.org/~ann") == "in ~10% of https://x.org/~ann"


def test_text_is_fit_for_every_database():
    assert plain("a\x00b\ud800c\u202ed\n\te  f") == "abcd e f"
    assert plain("\x01 x \x02") == "x"


def test_what_is_changed_can_be_kept():
    assert originals(title=r"Erd\H{o}s  numbers", comment="plain") == {"raw_title": r"Erd\H{o}s numbers"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("10.1103/PhysRevD.76.013009", "10.1103/physrevd.76.013009"),
        ("https://doi.org/10.1/X", "10.1/x"),
        ("doi:10.1/x 10.2/y", "10.1/x"),
        ("", ""),
        ("n/a", ""),
    ],
)
def test_a_doi_has_one_form(text, found):
    assert doi(text) == found


TEX = st.text(
    st.sampled_from(list("\\{}$\"'`^~=.uvHcdbrkijoLlsa é,\n[]()") + ["\u0301", "\x00", "\ud800"]), max_size=40
)


@settings(max_examples=300, derandomize=True)
@given(st.one_of(TEX, st.text(max_size=60)))
def test_any_text_comes_out_folded_composed_and_storable(text):
    found = plain(text)
    assert found == " ".join(found.split()) and "\x00" not in found
    assert unicodedata.is_normalized("NFC", found)
    found.encode("utf-8")
    without_braces(text), doi(text), originals(title=text)


@settings(max_examples=200, derandomize=True)
@given(st.text(st.characters(exclude_characters="\\~$"), max_size=60))
def test_text_without_tex_is_a_fixed_point(text):
    assert plain(plain(text)) == plain(text)
