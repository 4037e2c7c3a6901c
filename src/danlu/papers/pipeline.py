"""One answer job: fetch the paper, take its text, ask one question at a time, keep each answer once it is there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from datetime import time as time_of_day

from danlu.papers import budget, lists
from danlu.papers.answer.context import instruction_note
from danlu.papers.answer.pdf import extract
from danlu.papers.answer.questions import questions
from danlu.papers.answer.sections import from_abstract
from danlu.papers.answer.types import (
    AnswerError,
    BudgetExceeded,
    Engine,
    EngineUnavailable,
    NoText,
    PaperText,
    Piece,
    Question,
)
from danlu.papers.cards import NOTES, Cards
from danlu.papers.ids import ARXIV, SOURCES, pdf_url
from danlu.papers.jobs import Job, Queue
from danlu.papers.net.errors import FetchError
from danlu.papers.net.fetch import PDF_BYTES, Fetcher
from danlu.papers.rows import Paper
from danlu.papers.worker import holding

logger = logging.getLogger("danlu.papers.pipeline")

#: Longest time that text of a running answer waits before it is stored.
FLUSH = 0.25
#: After an engine was not available, and chunks of finished answers, which anybody may still be reading.
AGAIN, KEPT = timedelta(minutes=5), timedelta(days=1)
_PDF_TYPES = ("application/pdf", "application/x-pdf", "application/octet-stream")


@dataclass
class Answering:
    """What an answer job needs.

    Args:
        cards: where answers are kept.
        engine: that answers.
        fetcher: brings PDFs; None where the site has no network, and answers rest on abstracts.
        tokens_per_day: limit of the engine, 0 for none.
        clock: monotonic seconds.
    """

    cards: Cards
    engine: Engine
    fetcher: Fetcher | None = None
    tokens_per_day: int = 0
    clock: Callable[[], float] = field(default=time.monotonic)

    @property
    def queue(self) -> Queue:
        """The jobs of the store."""
        return self.cards.queue

    async def run(self, job: Job) -> None:
        """Do a job that has been claimed, to its end in the queue.

        Raises:
            LeaseLost: another worker has it by now.
            asyncio.CancelledError: at a shutdown; what was written stays, and the worker gives the job back.
        """
        try:
            await holding(self.queue, job, self._answer(job))
        except AnswerError as error:
            await self._fail(job, error.kind, str(error), _retry_at(error, datetime.now(UTC)))
        except FetchError as error:
            retry_at = error.retry_at.replace(tzinfo=UTC) if error.retry_at else None
            await self._fail(job, error.kind, str(error), retry_at)
        else:
            await asyncio.to_thread(self.queue.finish, job)
            await asyncio.to_thread(self.cards.tidy, (datetime.now(UTC) - KEPT).replace(tzinfo=None))

    async def _fail(self, job: Job, kind: str, message: str, retry_at: datetime | None) -> None:
        logger.warning("answer job %d (%s) failed: %s: %s", job.id, job.key, kind, message)
        moment = retry_at.replace(tzinfo=None) if retry_at else None
        await asyncio.to_thread(self.queue.fail, job, kind, message, moment)

    async def _answer(self, job: Job) -> None:
        pk, version, lang = job.payload["pk"], job.payload["version"], job.payload["lang"]
        found = await asyncio.to_thread(lists.papers, self.cards.store, [pk])
        if not found:
            raise NoText("the paper is not in the store any more")
        asked = questions(lang)
        done = {row["q"]: row["text"] for row in await asyncio.to_thread(self.cards.rows, pk, version, lang)}
        left = [question for question in asked if question.number not in done]
        if not left:
            return
        text = await self._text(job, found[0], version)
        if not text.text.strip():
            raise NoText("there is neither a text nor an abstract")
        warning = instruction_note(text)
        notes = text.notes + ((warning,) if warning else ())
        await asyncio.to_thread(self.cards.write, pk, version, lang, NOTES, "\n".join(notes), [])
        history = [(question, done[question.number]) for question in asked if question.number in done]
        for question in left:
            await self._check_budget()
            answer = await self._ask(job, text, question, history, (pk, version, lang), len(asked))
            history.append((question, answer))

    async def _text(self, job: Job, paper: Paper, version: int) -> PaperText:
        """The full text of a paper; its abstract, with a note that says why, where there is no full text to be had."""
        # Built from the identifier: an address that somebody wrote into a record is for readers to click on.
        address = pdf_url(paper.paper._replace(version=version or None if paper.paper.source == ARXIV else None))
        if self.fetcher is None or address is None:
            why = (
                "This site does not fetch papers"
                if self.fetcher is None
                else "The source has no PDF at a stable address"
            )
            return from_abstract(paper.title, paper.abstract, f"{why}: the answers rest on the abstract alone.")
        await asyncio.to_thread(self.queue.renew, job, "fetching")
        source = SOURCES[paper.paper.source]
        try:
            fetched = await self.fetcher.get(address, source, max_bytes=PDF_BYTES, accept=_PDF_TYPES, prio=job.prio)
            await asyncio.to_thread(self.queue.renew, job, "extracting")
            return await asyncio.to_thread(extract, fetched.body, title=paper.title)
        except NoText as error:
            note = f"The PDF gave no text ({error}): the answers rest on the abstract alone."
            return from_abstract(paper.title, paper.abstract, note)

    async def _ask(
        self,
        job: Job,
        text: PaperText,
        question: Question,
        history: list[tuple[Question, str]],
        place: tuple[int, int, str],
        total: int,
    ) -> str:
        """One question: pieces are stored as chunks while they come, and the whole as an answer at the end."""
        finished = len(history) / total
        await asyncio.to_thread(self.queue.renew, job, "answering", finished)
        if any(q == question.number for _, q, _ in await asyncio.to_thread(self.cards.chunks, job.id)):
            # An earlier try broke off within this question.
            await asyncio.to_thread(self.cards.restart, job.id, question.number)
        pieces: list[Piece] = []
        waiting, spent, told = "", 0, self.clock()
        try:
            async for piece in _at_least_every(FLUSH, self.engine.answer(text, question, history)):
                if piece is not None and piece.restart:
                    spent += sum(each.tokens for each in pieces)
                    pieces, waiting = [], ""
                    await asyncio.to_thread(self.cards.restart, job.id, question.number)
                if piece is not None:
                    pieces.append(piece)
                    waiting += piece.text
                now = self.clock()
                # The first words are shown at once, later ones together with those that come at the same time.
                if waiting and (now - told >= FLUSH or waiting == "".join(each.text for each in pieces)):
                    await asyncio.to_thread(self.cards.append, job.id, question.number, waiting)
                    # How long an answer will be is not known: the share nears one question and never reaches it.
                    share = 1 - 1 / (1 + sum(len(each.text) for each in pieces) / 600)
                    await asyncio.to_thread(self.queue.renew, job, "answering", finished + share / total)
                    waiting, told = "", now
        finally:
            # What an answer cost is spent, whether or not it came to its end.
            spent += sum(piece.tokens for piece in pieces)
            if spent:
                await asyncio.to_thread(budget.spend, self.cards.store, self.engine.name, spent)
        if waiting:
            await asyncio.to_thread(self.cards.append, job.id, question.number, waiting)
        answer = "".join(piece.text for piece in pieces)
        if not answer.strip():
            raise EngineUnavailable("the engine gave an empty answer")
        quotes = [asdict(quote) for piece in pieces for quote in piece.quotes]
        await asyncio.to_thread(self.cards.write, *place, question.number, answer, quotes)
        await asyncio.to_thread(self.queue.renew, job, "answering", finished + 1 / total)
        return answer

    async def _check_budget(self) -> None:
        if not self.tokens_per_day:
            return
        spent = await asyncio.to_thread(budget.spent, self.cards.store, self.engine.name)
        if spent >= self.tokens_per_day:
            raise BudgetExceeded(f"the {self.tokens_per_day} tokens of today are used up")


def _retry_at(error: AnswerError, now: datetime) -> datetime | None:
    """When the same may succeed, or None."""
    if isinstance(error, BudgetExceeded):
        return datetime.combine(now.date() + timedelta(days=1), time_of_day(), UTC)
    if not error.retryable:
        return None
    asked = error.retry_after if isinstance(error, EngineUnavailable) else None
    return now + max(AGAIN, timedelta(seconds=asked or 0.0))


async def _at_least_every(seconds: float, pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece | None]:
    """The pieces as they come, and None whenever none has come for a while."""
    while True:
        following = asyncio.ensure_future(anext(pieces, None))
        try:
            while not (await asyncio.wait({following}, timeout=seconds))[0]:
                yield None
            piece = following.result()
        finally:
            if not following.done():
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
        if piece is None:
            return
        yield piece
