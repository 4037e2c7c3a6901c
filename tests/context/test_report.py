"""The report: what it says, how it is written down, and a page that needs nothing from elsewhere."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest

from danlu.context.page import render, write_report
from danlu.context.report import LengthReport, Measurement, NeedleScore

LOSSES = {
    ("plain", 32): (2.0, 2.2, 2.4),
    ("plain", 64): (3.0, 3.2, 3.7),
    ("rerope", 32): (2.1, 2.3, 2.5),
    ("rerope", 64): (1.9, 2.15, 2.3),
    ("broken", 32): (2.0, 2.0, 2.0),
    ("broken", 64): (math.nan, 2.0, 2.0),
}


def make_report(**changes):
    needles = [
        NeedleScore(stack, length, depth, 2, float(stack == "rerope") * depth, 0.5, -1.5)
        for stack in ("plain", "rerope", "broken")
        for length in (32, 64)
        for depth in (0.5, 1.0)
    ]
    rows = [
        Measurement(stack, length, "" if stack == "plain" else "ReRoPE(window=8)", losses, 0.4, 1000.0, 50.0, 2**21)
        for (stack, length), losses in LOSSES.items()
    ]
    settings = {
        "model": "tiny <model> & co",
        "trained_length": 32,
        "lengths": (32, 64),
        "stacks": ("plain", "rerope", "broken"),
        "targets": 16,
        "windows": 3,
        "device": "cpu",
        "dtype": "float32",
        "measurements": tuple(rows),
        "needles": tuple(needles),
        "bytes_per_token": 2.0,
        "notes": ("a <b>note</b>",),
    }
    return LengthReport(**{**settings, **changes})


def test_loss_and_standard_error():
    row = make_report().at("plain", 64)
    assert row.loss == pytest.approx(3.3)
    assert row.standard_error == pytest.approx(math.sqrt((0.09 + 0.01 + 0.16) / 2 / 3))
    assert math.isnan(Measurement("plain", 8, "", (1.0,), 0, 1).standard_error)
    assert make_report().bits_per_byte(math.log(4)) == pytest.approx(1)


def test_best_and_paired_change():
    report = make_report()
    assert report.best() == "rerope" and report.best(32) == "broken"
    change, error = report.change("rerope")
    differences = [-0.2, -0.15, -0.2]
    assert change == pytest.approx(sum(differences) / 3)
    assert error == pytest.approx(math.sqrt(sum((d - change) ** 2 for d in differences) / 2 / 3))
    assert report.change("rerope", "plain")[0] == pytest.approx((6.35 - 9.9) / 3)
    assert report.needle_accuracy("rerope", 64) == (pytest.approx(0.75), 0.5)
    with pytest.raises(ValueError, match="no measurement of stack 'yarn'"):
        report.at("yarn", 64)


def test_verdict():
    lines = make_report().verdict()
    assert lines[0].startswith("Best at 64 tokens: rerope, loss 2.117")
    assert lines[1].startswith("Longer context lowers its loss: -0.183")
    assert lines[2] == "Needles at 64 tokens: 50% of tokens, 75% whole, with rerope."
    one = make_report(stacks=("plain",), needles=())
    assert one.verdict()[1].startswith("Longer context raises its loss")
    assert len(make_report(lengths=(64,), needles=()).verdict()) == 1


@pytest.mark.parametrize(("winner", "said"), [("window", "Best that sees the whole text: rerope, "), ("rerope", "")])
def test_verdict_compares_with_the_window(winner, said):
    losses = {"window": (2.0, 2.1), "rerope": (2.25, 2.55)}
    if winner == "rerope":
        losses = {"window": (2.25, 2.55), "rerope": (2.0, 2.1)}
    spellings = {"window": "Window(window=8, sinks=0)", "rerope": "ReRoPE(window=8)"}
    rows = tuple(Measurement(s, 64, spellings[s], x, 0, 1) for s, x in losses.items())
    report = make_report(lengths=(64,), stacks=("window", "rerope"), measurements=rows, needles=())
    sign = "+" if winner == "window" else "-"
    assert report.verdict()[1] == f"{said}{sign}0.350 ± 0.100 against window at 64 tokens."


def test_verdict_names_the_finder_beside_the_best():
    needles = tuple(NeedleScore(s, 64, 0.5, 4, a / 2, a, -1.0) for s, a in (("plain", 0.5), ("rerope", 0.25)))
    assert make_report(needles=needles).verdict()[-1] == (
        "Needles at 64 tokens: 50% of tokens, 25% whole, with plain; 25% of tokens, 12% whole, with rerope."
    )


def test_json_round_trip(tmp_path):
    report = make_report(stacks=("plain", "rerope"))
    clean = make_report(measurements=tuple(row for row in report.measurements if row.stack != "broken"))
    path = clean.save(tmp_path / "new" / "report.json")
    assert LengthReport.load(path) == clean
    broken = LengthReport.from_json(make_report().to_json())
    assert math.isnan(broken.at("broken", 64).losses[0]) and broken.at("broken", 64).losses[1] == 2
    assert "NaN" not in make_report().to_json()
    with pytest.raises(ValueError, match="format 1"):
        LengthReport.from_json(json.dumps({"format": 99}))


def test_table_holds_every_stack_and_number():
    from rich.console import Console

    console = Console(width=160, record=True, file=open("/dev/null", "w"))
    console.print(make_report().table())
    text = console.export_text()
    for word in ("plain", "rerope", "broken", "3.300", "2.117", "nan", "50% (75%)", "1,000", "2.0 MiB"):
        assert word in text


class References(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.outside = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "srcset", "action") and not (value or "").startswith(
                ("#", "data:image/")
            ):
                self.outside.append((tag, name, value))


def test_page_stands_alone_and_escapes():
    page = render(make_report(), usage=["danlu.extend(model, x < 3)"])
    parser = References()
    parser.feed(page)
    assert parser.outside == []
    assert not {"script", "link", "img", "iframe", "object"} & set(parser.tags)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert parser.tags.count("svg") == 5
    assert "tiny &lt;model&gt; &amp; co" in page and "a &lt;b&gt;note&lt;/b&gt;" in page and "x &lt; 3" in page


def test_page_without_needles_or_memory():
    rows = tuple(Measurement("plain", n, "", (2.0,), 0.1, 10.0) for n in (32, 64))
    page = render(make_report(measurements=rows, stacks=("plain",), needles=(), windows=1))
    assert page.count("<svg") == 2 and "Needle" not in page


def test_write_report(tmp_path):
    report = make_report()
    paths = write_report(report, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.json", "report.png"]
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    assert LengthReport.load(paths["json"]).stacks == report.stacks
    first = paths["html"].read_bytes()
    write_report(report, tmp_path / "out")
    assert paths["html"].read_bytes() == first, "the same report must give the same page"


def test_figure_has_the_numbers():
    axes = make_report().figure().axes
    assert [ax.get_title() for ax in axes] == ["Loss of the same tokens", "Needle tokens right", "Prefill speed"]
    line = next(line for line in axes[0].lines if line.get_label() == "rerope")
    assert list(line.get_xdata()) == [32, 64] and list(line.get_ydata()) == pytest.approx([2.3, 6.35 / 3])
