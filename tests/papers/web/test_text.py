"""Formulas, Markdown, and colours."""

from __future__ import annotations

import re

import pytest

from danlu.papers.web import assets, formulas, markdown


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a $x$ b", [("text", "a "), ("inline", "$x$"), ("text", " b")]),
        ("costs $5 and $10", [("text", "costs $5 and $10")]),
        ("costs $5-$10", [("text", "costs $5-$10")]),
        ("$$a\nb$$", [("display", "$$a\nb$$")]),
        (r"\(x\) \[y\]", [("inline", r"\(x\)"), ("text", " "), ("display", r"\[y\]")]),
        (r"\$5 $x$", [("text", r"\$5 "), ("inline", "$x$")]),
        (r"$\$5$", [("inline", r"$\$5$")]),
        ("$ x$", [("text", "$ x$")]),
        ("$x $", [("text", "$x $")]),
        ("$a$$b$", [("text", "$a"), ("text", "$$b$")]),
    ],
)
def test_formulas_are_told_from_money(text, found):
    got = list(formulas.pieces(text))
    assert "".join(part for _, part in got) == text
    if text != "$a$$b$":
        assert got == found


def test_marks_are_whole_words_and_pairs_of_characters_and_leave_formulas_alone():
    assert formulas.to_html("Schrödinger <x> $schrodinger$", {"schrodinger"}) == (
        '<mark>Schrödinger</mark> &lt;x&gt; <span class="tex notranslate" translate="no">$schrodinger$</span>'
    )
    assert formulas.to_html("旋转位置编码", {"位置"}) == "旋转<mark>位置</mark>编码"
    assert formulas.to_html("catalogue", {"cat"}) == "catalogue"


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "![x](https://evil.example/?data)",
        "[x](javascript:alert(1))",
        "[x](//evil.example)",
        "[x](/logout)",
        "[x](data:text/html,1)",
        '<a href="https://evil.example" onclick="x">y</a>',
        "$<script>$",
        "\ue0000\ue001",
        "[$x$](https://a.example/$y$)",
    ],
)
def test_markdown_of_nobody_is_safe(hostile):
    html = str(markdown.to_html(hostile))
    assert not re.search(r"<(script|img|iframe|style)|<[^>]*\son\w+=|href=\"(?!https?://)", html)
    assert "\ue000" not in html and "\ue001" not in html


def test_links_say_where_they_lead_and_take_nothing_along():
    html = markdown.to_html("[here](https://example.org/a)")
    assert 'rel="noopener noreferrer nofollow"' in html and "[example.org]" in html


def test_markdown_does_not_eat_formulas():
    html = markdown.to_html("*a* $x_1 * y_2$ **b** $\\\\ z_3$\n\n- $$\\sum_i a_i$$")
    assert "$x_1 * y_2$" in html and "$\\\\ z_3$" in html and "<em>a</em>" in html and "<li>" in html


def themes():
    """The colours of each theme in the style sheet."""
    text = (assets.FOLDER / "css" / "colours.css").read_text()
    blocks = re.findall(r"\{([^{}]*--ground[^{}]*)\}", text)
    return [dict(re.findall(r"--([a-z-]+):\s*(#[0-9a-f]{6})", block)) for block in blocks]


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_text_can_be_read_in_both_themes():
    assert len(themes()) == 3 and themes()[1] == themes()[2]
    for colours in themes():
        texts, grounds = "text soft faint link star danger plus".split(), "ground raised sunken note".split()
        pairs = [(text, ground) for text in texts for ground in grounds]
        for text, ground in [*pairs, ("on-accent", "accent"), ("mark-text", "mark"), ("ground", "text")]:
            high, low = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)
        for ground in ("ground", "raised"):
            high, low = sorted((luminance(colours["focus"]), luminance(colours[ground])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 3
