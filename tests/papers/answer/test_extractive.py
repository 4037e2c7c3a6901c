from __future__ import annotations

import asyncio
import html
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.papers.answer import extractive
from danlu.papers.answer.extractive import SENTENCES, WORDS, ExtractiveEngine, relevance, select, spoken
from danlu.papers.answer.questions import languages, questions
from danlu.papers.answer.sections import from_abstract, from_text
from danlu.papers.answer.types import NoText
from danlu.papers.answering import answer_paper, read_paper
from danlu.papers.tokens import words
from danlu.papers.web.markdown import to_html

ONE, TWO, THREE, FOUR, FIVE, SIX = questions("en")
PAPER = """A Title of Boats

Abstract
Sorting boats by colour remains a difficult problem because the light of rivers changes all the time. In this paper we
propose a sorter of boats that learns colours from their wakes. It needs no light at all, and it works at night.
1 Introduction
However, all sorters of boats fail in the dark, and this limits the traffic on rivers very much. Rivers are long.
2 Related Work
Smith et al. [3] sort boats by length with a rope of fixed size. Earlier methods by Jones [4] look at sails alone.
3 Method
We propose to listen to the wake of each boat with two microphones. The model consists of three layers of filters.
4 Experiments
On the dataset of harbours our sorter reaches an accuracy of 91 %, and it outperforms the baseline by nine points.
Table 2 shows results on further rivers and the baselines that we compare with in all of them.
5 Conclusion
A limitation of our sorter is that it cannot hear boats that stand still. We leave sorting of ships to future work.
References
[1] A. Author. However, we propose a problem of results and outperform them all. Journal of References, 2001.
"""


def _quotes(paper, question):
    return [spoken(paper.text[s.start : s.end]) for s in select(paper, question)]


@pytest.mark.parametrize(
    ("question", "telling"),
    [
        (ONE, "remains a difficult problem"),
        (TWO, "Smith et al"),
        (THREE, "two microphones"),
        (FOUR, "accuracy of 91"),
        (FIVE, "cannot hear boats"),
        (SIX, "propose a sorter of boats"),
    ],
)
def test_each_question_is_answered_from_the_part_that_answers_it(question, telling):
    found = _quotes(from_text(PAPER, "A Title of Boats"), question)
    assert any(telling in quote for quote in found) and len(found) >= 2
    assert not any("Journal" in quote for quote in found)


def test_every_quote_is_exact_and_tells_its_place():
    paper = from_text(PAPER, page_starts=(0, PAPER.index("3 Method")))
    answers, notes = answer_paper(paper)
    assert [answer.question.number for answer in answers] == [1, 2, 3, 4, 5, 6] and notes == ()
    for answer in answers:
        assert answer.quotes
        lines = [line[2:] for line in answer.text.splitlines() if line.startswith("> ")]
        assert len(lines) == 2 * len(answer.quotes)
        for quote, said, place in zip(answer.quotes, lines[::2], lines[1::2], strict=True):
            assert said == spoken(paper.text[quote.start : quote.end])
            page = 1 if quote.start < PAPER.index("3 Method") else 2
            assert quote.page == page and place == f"— *{quote.section}, p. {page}*"
        assert [quote.start for quote in answer.quotes] == sorted(quote.start for quote in answer.quotes)


def test_the_summary_does_not_repeat_what_was_quoted_for_the_problem():
    paper = from_text(PAPER)
    first, last = _quotes(paper, ONE), _quotes(paper, SIX)
    assert set(first) & set(last), "the paper must make it tempting"
    answers, _ = answer_paper(paper)
    spans = [{(q.start, q.end) for q in answer.quotes} for answer in answers]
    assert spans[0] and spans[5] and not spans[0] & spans[5]


def test_answers_are_the_same_every_time_and_short():
    paper = from_text(PAPER * 30)
    assert answer_paper(paper) == answer_paper(paper)
    for question in questions():
        chosen = select(paper, question)
        assert len(chosen) <= SENTENCES and sum(len(s.words) for s in chosen) <= WORDS


def test_the_words_of_an_answer_have_a_limit():
    long = (
        "We propose the method number {} that " + "solves one of the problems of boats and rivers and " * 4 + "ends. "
    )
    chosen = select(
        from_text("Abstract\n" + "".join(long.format(n) for n in range(9)) + "\n1 Introduction\nx\n"), THREE
    )
    assert len(chosen) == 2 and sum(len(sentence.words) for sentence in chosen) <= WORDS


def test_what_has_been_said_is_not_said_again_in_other_words():
    twins = [f"We propose a {word} method to sort the boats of rivers by wakes." for word in ("new", "fast", "good")]
    other = "Filters are trained on the sounds that many microphones record at night in an approach of theirs."
    paper = from_text("Abstract\nShort.\n1 Introduction\nx\n2 Method\n" + " ".join([*twins, other]) + "\n")
    pool = extractive._quotable(paper)
    spread = [paper.text[s.start : s.end] for s in extractive._spread(pool, [1.0, 0.95, 0.9, 0.8])]
    assert spread[1] == other


def test_a_paper_of_one_sentence_and_one_of_none():
    answers, _ = answer_paper(from_abstract("T", "We propose a method that solves the problem of boats.", "note"))
    assert "solves the problem" in answers[0].text and "No sentence" in answers[5].text and answers[5].quotes == ()
    with pytest.raises(NoText):
        answer_paper("1 2 3")
    with pytest.raises(NoText):
        answer_paper("Abstract\n" + "word " * 200 + "end.\n1 Introduction\nx\n")


def test_a_chinese_paper_is_answered_in_chinese():
    text = (
        "摘要\n然而，现有的排序方法在黑暗中会失效，这是一个很大的问题。我们提出一种通过声音区分船只的新方法。\n1 引言\n"
        "河流上的船只很多，但是光线总在变化，这是一个挑战。\n2 相关工作\n已有的研究通过长度来区分船只。\n"
        "3 实验\n实验结果表明，我们的方法在数据集上更好。\n4 结论\n未来我们会研究静止的船只，这是本文的局限。\n"
    )
    answers, _ = answer_paper(text, lang="zh")
    assert all("> " in answer.text for answer in answers[:5])
    assert "问题" in answers[0].text and "数据集" in answers[3].text and "局限" in answers[4].text


def test_an_answer_in_a_language_without_questions_is_refused():
    assert languages() == ("en", "zh")
    with pytest.raises(ValueError, match="lang must be one of en, zh"):
        answer_paper(PAPER, lang="xx")


HOSTILE = (
    "We propose <script>alert(1)</script> a method [click](https://evil.example/x) for *all* `it` and _rivers_ ~here~.",
    "# We propose a method that is a heading for all the boats.",
    "[1]: https://evil.example/problem is a problem of definition",
    "1) We propose $O(n*m_1)$ and $a_i$ as the cost of p* and q*.",
    "- We propose a list | of | tables \\alpha and a\\_b &amp; \\(x\\) for boats.",
    "+ We propose a list of a__b and __bold__ words for all boats.",
)


@pytest.mark.parametrize("sentence", HOSTILE)
def test_quotes_are_shown_as_they_stand(sentence):
    paper = from_text(f"Abstract\n{sentence}\n\n1 Introduction\nNothing.\n")
    piece = asyncio.run(_first(paper))
    shown = to_html(piece)
    text = "".join(part.partition(">")[2] for part in f">{shown}".split("<"))
    text = html.unescape(text)
    assert " ".join(text.split()).startswith(sentence)
    assert "<a" not in shown and "<script" not in shown and "<h" not in shown and "<li" not in shown


async def _first(paper):
    return "".join([piece.text async for piece in ExtractiveEngine().answer(paper, THREE, [])])


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=400))
def test_any_text_is_quoted_on_one_line(text):
    line = spoken(text)
    assert "\n" not in line and len(line) >= len(" ".join(text.split()))


def test_a_very_long_paper_takes_time_in_proportion():
    sentence = "We propose the method number {} that solves the problem of boats on many rivers and seas of the world. "
    times = []
    for count in (2_000, 8_000):
        paper = from_text("Abstract\n" + "".join(sentence.format(n) for n in range(count)) + "\n1 Introduction\nx\n")
        begin = time.process_time()
        select(paper, THREE)
        times.append(time.process_time() - begin)
    assert times[1] < 10 * times[0] and times[1] < 10


def test_relevance_prefers_the_part_that_has_the_words():
    found = relevance(["boats swim", "the method and the algorithm that we propose", ""], THREE)
    assert found[1] == 1.0 and found[0] == found[2] == 0.0


def test_a_paper_is_read_from_text_and_from_files(tmp_path):
    (tmp_path / "a.txt").write_text(PAPER)
    assert read_paper(tmp_path / "a.txt").text == read_paper(PAPER).text and read_paper(tmp_path / "a.txt").title == "a"
    (tmp_path / "b.pdf").write_text(PAPER)
    with pytest.raises(NoText):
        read_paper(tmp_path / "b.pdf")
    with pytest.raises(FileNotFoundError):
        read_paper(tmp_path / "none.pdf")


def test_the_key_is_stable_and_the_words_of_quotes_are_those_of_the_paper():
    assert ExtractiveEngine().key() == ExtractiveEngine().key() and len(ExtractiveEngine().key()) == 64
    paper = from_text(PAPER)
    for question in questions():
        for sentence in select(paper, question):
            assert tuple(words(paper.text[sentence.start : sentence.end])) == sentence.words
