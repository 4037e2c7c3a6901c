"""Answering the six questions about one paper, without a site: from a PDF, or from its text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from danlu.papers.answer import context
from danlu.papers.answer.pdf import extract
from danlu.papers.answer.questions import questions as fixed_questions
from danlu.papers.answer.sections import from_text
from danlu.papers.answer.types import Engine, PaperText, Piece, Question, Quote


@dataclass(frozen=True)
class PaperAnswer:
    """A question and its answer.

    Args:
        question: that was asked.
        text: the answer in Markdown.
        quotes: that it rests on; ``paper.text[start:end]`` is the quoted sentence.
    """

    question: Question
    text: str
    quotes: tuple[Quote, ...] = ()


def read_paper(path_or_text: Path | str, title: str = "") -> PaperText:
    """The text of a paper with its sections.

    Args:
        path_or_text: a PDF or text file as a ``Path``, or the text itself.
        title: of the paper, where it is known.

    Raises:
        NoText: a PDF that cannot be read.
        FileNotFoundError: there is no such file.
    """
    if isinstance(path_or_text, str):
        return from_text(path_or_text, title)
    with path_or_text.open("rb") as file:
        is_pdf = b"%PDF-" in file.read(1024)
    if is_pdf or path_or_text.suffix.lower() == ".pdf":
        return extract(path_or_text, title or path_or_text.stem)
    return from_text(path_or_text.read_text(encoding="utf-8", errors="replace"), title or path_or_text.stem)


async def stream_answers(
    paper: PaperText, engine: Engine, questions: Sequence[Question]
) -> AsyncIterator[tuple[Question, Piece]]:
    """The pieces of every answer in turn; each question sees the answers before it.

    Args:
        paper: of `read_paper`.
        engine: that answers.
        questions: to ask, in order.
    """
    history: list[tuple[Question, str]] = []
    for question in questions:
        text = ""
        async for piece in engine.answer(paper, question, history):
            text = piece.text if piece.restart else text + piece.text
            yield question, piece
        history.append((question, text))


async def answer_paper_async(
    path_or_text: Path | str | PaperText,
    engine: Engine | None = None,
    questions: Sequence[Question] | None = None,
    lang: str = "en",
) -> tuple[list[PaperAnswer], tuple[str, ...]]:
    """Answer the questions about one paper.

    Args:
        path_or_text: a PDF or text file as a ``Path``, the text itself, or a paper that was read before.
        engine: that answers; quotes from the paper unless given.
        questions: to ask; the six fixed ones unless given.
        lang: of the fixed ones.

    Returns:
        The answers, and notes on the whole.

    Raises:
        AnswerError: the paper has no text, or the engine cannot answer.
        ValueError: no questions in this language.
    """
    asked = fixed_questions(lang) if questions is None else tuple(questions)
    if isinstance(path_or_text, PaperText):
        paper = path_or_text
    else:
        paper = await asyncio.to_thread(read_paper, path_or_text)
    if engine is None:
        from danlu.papers.answer.extractive import ExtractiveEngine

        engine = ExtractiveEngine()
    pieces: dict[int, list[Piece]] = {question.number: [] for question in asked}
    async for question, piece in stream_answers(paper, engine, asked):
        if piece.restart:
            pieces[question.number].clear()
        pieces[question.number].append(piece)
    answers = [
        PaperAnswer(
            question,
            "".join(piece.text for piece in pieces[question.number]).strip(),
            tuple(quote for piece in pieces[question.number] for quote in piece.quotes),
        )
        for question in asked
    ]
    warning = context.instruction_note(paper)
    return answers, paper.notes + ((warning,) if warning else ())


def answer_paper(
    path_or_text: Path | str | PaperText,
    engine: Engine | None = None,
    questions: Sequence[Question] | None = None,
    lang: str = "en",
) -> tuple[list[PaperAnswer], tuple[str, ...]]:
    """`answer_paper_async` for programs that are not asynchronous."""
    return asyncio.run(answer_paper_async(path_or_text, engine, questions, lang))
