from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.papers.answer import context
from danlu.papers.answer.questions import questions
from danlu.papers.answer.sections import from_abstract, from_text, heading, role_of, split
from danlu.papers.answer.sentences import sentences

BODY = "Some words that stand in this part of the paper and say what it says.\n"


@pytest.mark.parametrize(
    "line",
    [
        *("1 Introduction", "2. Related Work", "2.3. Training Objective", "IV. EXPERIMENTS", "A. Proof of the Lemma"),
        *("Abstract", "ABSTRACT", "References", "  Conclusion and Future Work  ", "1 I NTRODUCTION", "R ELATED WORK"),
        *("3 BERT", "10 Results and Discussion", "摘要", "3 实验结果", "5 方法"),
    ],
)
def test_titles_are_headings(line):
    assert heading(line) == line.strip()


@pytest.mark.parametrize(
    "line",
    [
        *(
            "2 GPUs were used",
            "2 GPUs",
            "3.2 seconds per step",
            "1 Introduction . . . . . . 3",
            "2 Method.....4",
            "2 Method .... iv",
        ),
        *("2 Related Work 17", "Table 1 Results", "1 Table of Values", "4 Models are trained on two machines", "3 M"),
        *("introduction", "results", "2 This is it.", "We propose a method", "", "1", "1 " + "Long " * 30),
        *("2024 International Conference", "0.5 0.3 0.2 0.9", "1 a lower case line"),
    ],
)
def test_other_lines_are_not(line):
    assert heading(line) is None


@pytest.mark.parametrize(
    ("title", "role"),
    [
        ("1 Introduction", "introduction"),
        ("2 R ELATED WORK", "related"),
        ("RESULTS AND DISCUSSION", "experiments"),
        ("4.1 Ablation Study", "experiments"),
        ("IV. THE PROPOSED MODEL", "method"),
        ("5 Conclusions and Future Work", "conclusion"),
        ("Limitations", "limitations"),
        ("Acknowledgments", "acknowledgements"),
        ("A. Appendix", "appendix"),
        ("参考文献", "references"),
        ("3 Whatever Else", "other"),
    ],
)
def test_roles_follow_from_titles(title, role):
    assert role_of(title) == role


def _text(*titles: str, lines: int = 6) -> str:
    return "".join(f"{title}\n" + BODY * lines for title in titles)


def _roles(text: str) -> list[tuple[str, str]]:
    return [(section.title, section.role) for section in split(text)]


def test_a_section_without_a_telling_title_between_introduction_and_experiments_is_what_the_paper_does():
    text = _text("Abstract", "1 Introduction", "2 Waves on Rivers", "2.1 Shallow Ones", "3 Experiments", "3.1 Boats",
                 "4 Outlook", "References", "A. Further Boats")  # fmt: skip
    assert _roles(text) == [
        ("Abstract", "abstract"),
        ("1 Introduction", "introduction"),
        ("2 Waves on Rivers", "method"),
        ("2.1 Shallow Ones", "method"),
        ("3 Experiments", "experiments"),
        ("3.1 Boats", "experiments"),
        ("4 Outlook", "conclusion"),
        ("References", "references"),
        ("A. Further Boats", "appendix"),
    ]


def test_subsections_with_letters_belong_to_sections_with_roman_numbers():
    text = _text(
        "I. INTRODUCTION", "III. METHOD", "A. Waves", "IV. EXPERIMENTS", "A. Boats", "B. Ships", "V. CONCLUSION"
    )
    assert [role for _, role in _roles(text)][3:6] == ["experiments"] * 3
    assert dict(_roles(text))["V. CONCLUSION"] == "conclusion" and _roles(text)[2] == ("A. Waves", "method")


def test_a_table_of_contents_does_not_make_the_paper_an_appendix():
    contents = "Introduction\nMethod\nExperiments\nReferences\n"
    assert ("1 Method", "method") in _roles(
        contents + _text("1 Introduction", "1 Method", "2 Experiments", "References")
    )


def test_an_abstract_may_run_into_its_title():
    paper = from_text(
        "A Title\nAbstract—We show that boats swim on all rivers.\n" + _text("1 Introduction", "2 Method")
    )
    assert paper.sections[1].role == "abstract"
    assert paper.text[sentences(paper)[0].start :].startswith("We show that boats")
    assert "Abstract" not in dict(_roles("abstract-level reasoning is hard.\n" + _text("1 Introduction", "2 Method")))


def test_text_before_an_introduction_without_a_title_is_the_abstract():
    paper = from_text(
        "A Title\n\nWe show that boats swim on all rivers of the world.\n" + _text("1 Introduction", "2 Method")
    )
    assert paper.sections[0].role == "abstract"
    assert paper.text[sentences(paper)[0].start :].startswith("We show that boats")
    front = from_text(
        "A Title\n\nAn Author of the University of Rivers and Boats.\n" + _text("Abstract", "1 Introduction")
    )
    assert front.sections[0].title == "Front" and "Author" not in front.text[sentences(front)[0].start :][:70]


def test_without_headings_there_are_windows_and_references_stay_apart():
    parts = split(BODY * 300)
    assert [parts[0].role, parts[-1].role] == ["introduction", "conclusion"] and len(parts) > 3
    assert max(part.end - part.start for part in parts) <= 6000
    listed = split(BODY * 300 + "References\n" + "[1] A. Author. Results of experiments. 2020.\n" * 20)
    assert listed[-1].role == "references" and listed[-2].role == "conclusion"
    assert split("") == () and [s.role for s in split("few words")] == ["introduction"]


def test_references_are_never_quoted_nor_sent():
    paper = from_text(
        _text("1 Introduction", "2 Experiments") + "References\n[1] We outperform all results of tables.\n" * 9
    )
    assert all(sentence.section.role != "references" for sentence in sentences(paper))
    assert "outperform" not in context.body(paper)
    assert all(s.role != "references" for q in questions() for s in context.routed(paper, q))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(
                ["Abstract", "1 Introduction", "2 Method", "References", "3.1 Data", "A. B", "\n", BODY, "\u2028"]
            ),
            st.text(max_size=60),
        ),
        max_size=30,
    ),
    st.lists(st.integers(0, 500), max_size=4),
)
def test_sections_have_neither_gaps_nor_overlaps_and_sentences_lie_in_them(lines, starts):
    text = "\n".join(lines)
    paper = from_text(text, page_starts=tuple(sorted(starts)))
    assert "".join(text[s.start : s.end] for s in paper.sections) == text
    assert all(s.start < s.end for s in paper.sections)
    last = 0
    for sentence in sentences(paper):
        assert last <= sentence.start < sentence.end and sentence.section.start <= sentence.start
        assert sentence.end <= sentence.section.end and text[sentence.start : sentence.end].strip()
        last = sentence.end


def test_sentences_end_where_they_end():
    text = (
        "1 Introduction\nSmith et al. showed, e.g. in Fig. 3, that this holds for J. Doe as well. "
        "Is it true for all of us? (It is true for all of them.) The second paragraph has no stop at its end here\n\n"
        "This one follows it and is fine.\n"
        "2 Method\nNothing.\n"
    )
    paper = from_text(text)
    assert [paper.text[s.start : s.end] for s in sentences(paper)] == [
        "Smith et al. showed, e.g. in Fig. 3, that this holds for J. Doe as well.",
        "Is it true for all of us?",
        "(It is true for all of them.)",
        "The second paragraph has no stop at its end here",
        "This one follows it and is fine.",
    ]
    chinese = from_text("摘要\n我们提出一种新的方法。实验结果表明它更好！\n1 引言\n这是一个问题。\n")
    assert [chinese.text[s.start : s.end] for s in sentences(chinese)][:2] == [
        "我们提出一种新的方法。",
        "实验结果表明它更好！",
    ]


@pytest.mark.parametrize(
    "piece", ["A. ", "e.g. X", ".", ". a ", "\n", "1 Introduction\n", "A B. \n\n", "I. X\n", "Abstract—"]
)
def test_a_text_of_one_piece_repeated_takes_no_long_time(piece):
    text = piece * (400_000 // len(piece))
    begin = time.process_time()
    sentences(from_text(text))
    assert time.process_time() - begin < 5


def test_what_stands_for_a_missing_text_is_the_abstract():
    paper = from_abstract("Title", "We show this.", "why")
    assert paper.text == "We show this." and paper.notes == ("why",) and paper.sections[0].role == "abstract"
    assert paper.page_of(3) == 0
