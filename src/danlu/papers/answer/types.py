"""What answering works with: the text of a paper, questions, pieces of answers, and the ways in which it can fail."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Section:
    """A part of a paper.

    Args:
        title: its heading, or a description where it has none.
        role: ``abstract``, ``introduction``, ``related``, ``method``, ``experiments``, ``discussion``, ``limitations``,
            ``conclusion``, ``appendix``, ``references`` or ``other``.
        start: place of its first character in the text.
        end: place behind its last one.
        page_from: first page, from 1; 0 where there are no pages.
        page_to: last page.
    """

    title: str
    role: str
    start: int
    end: int
    page_from: int = 0
    page_to: int = 0


@dataclass(frozen=True)
class PaperText:
    """The text of a paper.

    Args:
        text: of all pages, cleaned.
        title: of the paper, where it is known.
        page_starts: place of the first character of each page.
        sections: in order, without gaps or overlaps.
        notes: what a reader must know about it, such as that only the abstract was read.
    """

    text: str
    title: str = ""
    page_starts: tuple[int, ...] = ()
    sections: tuple[Section, ...] = ()
    notes: tuple[str, ...] = ()

    def page_of(self, place: int) -> int:
        """The page, from 1, that a place in the text is on; 0 where there are no pages."""
        return sum(start <= place for start in self.page_starts)


@dataclass(frozen=True)
class Question:
    """One of the fixed questions: its number (1..6) and its text in one language."""

    number: int
    text: str
    lang: str = "en"


@dataclass(frozen=True)
class Quote:
    """Where in the paper something stands: ``text[start:end]`` is the quoted sentence."""

    start: int
    end: int
    section: str = ""
    page: int = 0


@dataclass(frozen=True)
class Piece:
    """The next part of an answer.

    Args:
        text: in Markdown.
        quotes: that it rests on.
        tokens: that it cost.
        restart: the answer begins anew with this piece: what came before is void.
    """

    text: str
    quotes: tuple[Quote, ...] = ()
    tokens: int = 0
    restart: bool = False


#: Questions of the same card that have been answered, with their answers: an engine may go on from them.
History = Sequence[tuple[Question, str]]


class Engine(Protocol):
    """Something that answers questions about a paper."""

    name: str

    @property
    def label(self) -> str:
        """Who answers, for readers: engine and model."""

    def key(self) -> str:
        """A hash of everything that changes its answers: name, model, prompts, questions, extractor, parameters."""

    def answer(self, paper: PaperText, question: Question, history: History) -> AsyncIterator[Piece]:
        """Answer a question piece by piece.

        Raises:
            AnswerError: it cannot.
        """

    async def close(self) -> None:
        """Give connections and memory back."""


class AnswerError(Exception):
    """An answer that cannot be given.

    Attributes:
        kind: a word for programs.
        retryable: whether the same may succeed later.
    """

    kind = "failed"
    retryable = False


class NoText(AnswerError):
    """The document holds no text that can be read: it is scanned, broken, or no document at all."""

    kind = "no_text"


class TooLong(AnswerError):
    """The text does not fit into what the engine reads at once."""

    kind = "too_long"


class EngineUnavailable(AnswerError):
    """The engine cannot be reached or is overloaded.

    Attributes:
        retry_after: seconds that it asks to wait, or None.
    """

    kind = "engine_unavailable"
    retryable = True

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineRefused(AnswerError):
    """The engine will not answer: a wrong key, an unknown model, a refused request."""

    kind = "engine_refused"


class BudgetExceeded(AnswerError):
    """The tokens of the day are used up."""

    kind = "budget"
    retryable = True
