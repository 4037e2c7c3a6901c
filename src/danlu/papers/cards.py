"""Answer cards: what has been answered about a paper, asking for it, and following an answer as it is written.

Reading a card never starts work. Whoever asks for the same paper, version, language and engine gets the same job.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import select

from danlu.papers import schema
from danlu.papers.jobs import HISTORY, QUEUED, RUNNING, Job, Queue
from danlu.papers.rows import Paper
from danlu.papers.store import Store

QUESTIONS = 6
KIND = "answer"
#: Number of the entry that holds notes on the whole card, such as that only the abstract was read.
NOTES = 0


@dataclass(frozen=True)
class Answer:
    """One finished answer: its question's number, Markdown, and the quotes it rests on."""

    q: int
    text: str
    sources: list[dict[str, Any]] = field(default_factory=list)
    created_at: datetime | None = None


@dataclass(frozen=True)
class Card:
    """What is known about a paper's questions.

    Args:
        key: of the card: paper, version, language and engine.
        version: of the paper that was read; 0 where versions are not known.
        lang: of the answers.
        answers: those that are finished, in the order of the questions.
        notes: on the whole card.
        job: that is answering, or the latest one; None where none is known any more.
    """

    key: str
    version: int
    lang: str
    answers: tuple[Answer, ...]
    notes: tuple[str, ...] = ()
    job: Job | None = None

    @property
    def complete(self) -> bool:
        """Whether every question is answered."""
        return len(self.answers) == QUESTIONS


class Cards:
    """The cards of a store, for one engine.

    Args:
        store: the database.
        queue: its jobs.
        engine_key: of the engine that answers now; cards of other engines are not shown.
    """

    def __init__(self, store: Store, queue: Queue, engine_key: str) -> None:
        self.store, self.queue, self.engine_key = store, queue, engine_key

    def key_for(self, pk: int, version: int, lang: str) -> str:
        """What makes two requests the same."""
        return f"{KIND}:{pk}:v{version}:{lang}:{self.engine_key[:32]}"

    def get(self, paper: Paper, version: int | None, lang: str) -> Card | None:
        """The card of a paper, or None where nothing has been asked yet. It starts nothing.

        Args:
            paper: asked about.
            version: of it; the latest unless given.
            lang: of the answers.
        """
        number = version or paper.version or 0
        key = self.key_for(paper.pk, number, lang)
        rows = self.rows(paper.pk, number, lang)
        job = self.queue.latest(key)
        if not rows and job is None:
            return None
        answers = tuple(
            Answer(row["q"], row["text"], list(row["sources"]), row["created_at"]) for row in rows if row["q"]
        )
        notes = tuple(line for row in rows if row["q"] == NOTES for line in row["text"].splitlines())
        return Card(key, number, lang, answers, notes, job)

    def ask(self, paper: Paper, version: int | None, lang: str, prio: int = HISTORY) -> Job:
        """Ask for a card; the job that is answering it already, or a new one.

        Args:
            paper: asked about.
            version: of it; the latest unless given.
            lang: of the answers.
            prio: of the job.
        """
        number = version or paper.version or 0
        payload = {"pk": paper.pk, "version": number, "lang": lang}
        return self.queue.put(KIND, self.key_for(paper.pk, number, lang), payload, prio)

    def versions(self, pk: int, lang: str) -> list[int]:
        """Versions of a paper that this engine has answered questions about, in order."""
        table = schema.answer
        query = select(table.c.v).where(
            table.c.pk == pk, table.c.lang == lang, table.c.engine_key == self.engine_key, table.c.q > NOTES
        )
        with self.store.reading() as connection:
            return sorted(set(connection.scalars(query)))

    def rows(self, pk: int, version: int, lang: str) -> Sequence[sa.RowMapping]:
        """Finished entries of a card in the order of the questions."""
        table = schema.answer
        query = select(table).where(*self._here(pk, version, lang)).order_by(table.c.q)
        with self.store.reading() as connection:
            return connection.execute(query).mappings().all()

    def write(self, pk: int, version: int, lang: str, q: int, text: str, sources: list[dict[str, Any]]) -> None:
        """Keep a finished entry, in the place of an earlier one."""
        table = schema.answer
        with self.store.writing() as connection:
            connection.execute(table.delete().where(*self._here(pk, version, lang), table.c.q == q))
            connection.execute(
                table.insert().values(
                    pk=pk, v=version, lang=lang, engine_key=self.engine_key, q=q, state="done", text=text,
                    sources=sources, created_at=datetime.now(UTC).replace(tzinfo=None),
                )
            )  # fmt: skip

    def forget(self, pk: int, version: int, lang: str) -> None:
        """Remove the entries of a card, so that asking again answers anew."""
        with self.store.writing() as connection:
            connection.execute(schema.answer.delete().where(*self._here(pk, version, lang)))

    def append(self, job_id: int, q: int, text: str) -> None:
        """Add a chunk to a running answer: every process can read it from then on."""
        with self.store.writing() as connection:
            connection.execute(schema.answer_chunk.insert().values(job_id=job_id, q=q, text=text))

    def chunks(self, job_id: int, after: int = 0) -> list[tuple[int, int, str]]:
        """Chunks of a job behind one of them: number, question, text."""
        table = schema.answer_chunk
        query = select(table.c.id, table.c.q, table.c.text).where(table.c.job_id == job_id, table.c.id > after)
        with self.store.reading() as connection:
            return [(row.id, row.q, row.text) for row in connection.execute(query.order_by(table.c.id))]

    def restart(self, job_id: int, q: int) -> None:
        """Make void what was written for a question: an empty chunk says so, and the earlier ones go.

        The chunk comes first: a database may give the number of a deleted last row again, and a reader who has that
        number already would miss what bears it.
        """
        table = schema.answer_chunk
        with self.store.writing() as connection:
            inserted = connection.execute(table.insert().values(job_id=job_id, q=q, text="")).inserted_primary_key
            number = int(inserted[0])  # type: ignore[index]
            connection.execute(table.delete().where(table.c.job_id == job_id, table.c.q == q, table.c.id < number))

    def tidy(self, before: datetime) -> int:
        """Remove the chunks of jobs that ended and were asked for before a time (UTC): their answers are kept whole.

        Returns:
            How many there were.
        """
        table, jobs = schema.answer_chunk, schema.job
        live = select(jobs.c.id).where(jobs.c.state.in_((QUEUED, RUNNING)) | (jobs.c.created_at >= before))
        with self.store.writing() as connection:
            return int(connection.execute(table.delete().where(table.c.job_id.not_in(live))).rowcount)

    def _here(self, pk: int, version: int, lang: str) -> tuple[sa.ColumnElement[bool], ...]:
        table = schema.answer
        return (table.c.pk == pk, table.c.v == version, table.c.lang == lang, table.c.engine_key == self.engine_key)
