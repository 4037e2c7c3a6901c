"""Answering a paper of 15 pages by quotes: reading its PDF, finding sections, six answers; and what baselines take.

python benchmarks/papers_answer.py [--repeats 15]
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from danlu.papers.answer.extractive import bm25, select
from danlu.papers.answer.pdf import Limits, extract
from danlu.papers.answer.questions import questions
from danlu.papers.answer.sections import from_text
from danlu.papers.answer.sentences import sentences
from danlu.papers.answer.types import PaperText
from danlu.papers.answering import answer_paper
from danlu.papers.tokens import words

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
PAGES, LINES = 15, 52
TITLES = {0: "Abstract", 1: "1 Introduction", 3: "2 Related Work", 4: "3 Method", 8: "4 Experiments",
          12: "5 Discussion", 13: "6 Conclusion", 14: "References"}  # fmt: skip


def pages() -> list[list[str]]:
    """Pages of prose from 3,000 made-up words: about 650 words each, as papers have."""
    dice = random.Random(0)
    vocabulary = ["".join(dice.choices("abdegiklmnoprstu", k=dice.randint(2, 10))) for _ in range(3000)]
    made = []
    for number in range(PAGES):
        text = ""
        while len(text) < LINES * 92:
            sentence = " ".join(dice.choices(vocabulary, k=dice.randint(10, 30)))
            text += sentence.capitalize() + ". "
        lines = [text[start : start + 92] for start in range(0, LINES * 92, 92)]
        made.append([TITLES[number], *lines] if number in TITLES else lines)
    return made


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def in_process(data: bytes) -> str:
    """What pypdf alone takes, without a process of its own."""
    import io

    from pypdf import PdfReader

    return "".join(page.extract_text() for page in PdfReader(io.BytesIO(data)).pages)


def first_three(paper: PaperText) -> None:
    for _ in questions():
        [each for each in sentences(paper) if each.section.role == "abstract"][:3]


def searched(paper: PaperText) -> None:
    for question in questions():
        pool = sentences(paper)
        scores = bm25([each.words for each in pool], words(question.text))
        sorted(range(len(pool)), key=lambda index: -scores[index])[:6]


def main() -> None:
    from reference.pdf import flate_bomb, text_pdf

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    data = text_pdf(pages())
    paper = extract(data, "A Paper", reader="pypdf")
    work: dict[str, Callable[[], object]] = {
        "text by pypdf, in a process with limits": lambda: extract(data, reader="pypdf"),
        "text by PDFium, in a process with limits": lambda: extract(data, reader="pdfium"),
        "text by pypdf in this process (peer)": lambda: in_process(data),
        "sections of the text": lambda: from_text(paper.text),
        "six answers by quotes": lambda: answer_paper(paper),
        "six times the abstract's first three sentences (baseline)": lambda: first_three(paper),
        "six times BM25 of the question (baseline)": lambda: searched(paper),
        "one answer of the six": lambda: select(paper, questions()[3]),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for name in work:
        seconds(work[name])
    for _ in range(options.repeats):
        for name, each in work.items():
            times[name].append(seconds(each))
    bomb = flate_bomb()
    ends = {reader: _ended(bomb, reader) for reader in ("pypdf", "pdfium")}
    lines = [
        "# Answers by quotes: a paper of 15 pages",
        "",
        f"{PAGES} pages, {len(words(paper.text)):,} words, {len(sentences(paper))} sentences, "
        f"{len(data):,} bytes packed; {options.repeats} interleaved runs, one core.",
        "",
        "| work | ms (median) | ms (worst) |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {1e3 * statistics.median(own):.0f} | {1e3 * max(own):.0f} |" for name, own in times.items()),
        "",
        f"A page that unpacks to 2 GiB ({len(bomb):,} bytes) is refused after {ends['pypdf']:.1f} s by pypdf and "
        f"{ends['pdfium']:.1f} s by PDFium, in at most {Limits().memory / 2**30:.1f} GiB of address space.",
    ]
    table = "\n".join(lines) + "\n"
    print(table)
    if options.repeats == parser.get_default("repeats"):
        Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


def _ended(bomb: bytes, reader: str) -> float:
    from danlu.papers.answer.types import NoText

    begin = time.perf_counter()
    try:
        extract(bomb, reader=reader)  # type: ignore[arg-type]
    except NoText:
        return time.perf_counter() - begin
    raise RuntimeError("the bomb gave text")


if __name__ == "__main__":
    main()
