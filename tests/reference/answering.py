"""Stand-ins for what answers papers: an engine that plays a script, and a fetcher that hands out bytes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from danlu.papers.answer.types import Piece, Quote
from danlu.papers.cards import Cards
from danlu.papers.ids import parse_id
from danlu.papers.jobs import Queue
from danlu.papers.lists import find, papers
from danlu.papers.records import PaperRecord


@dataclass
class Scripted:
    """An engine: ``script`` maps a question's number to pieces, seconds of waiting and errors."""

    script: dict = field(default_factory=dict)
    name: str = "scripted"
    label: str = "a script"
    asked: list = field(default_factory=list)

    def key(self) -> str:
        return "k" * 64

    async def answer(self, paper, question, history):
        self.asked.append((question.number, paper, tuple(history)))
        for step in self.script.get(question.number, [f"Answer {question.number}: ", "word ", "end."]):
            if isinstance(step, BaseException):
                raise step
            if isinstance(step, float):
                await asyncio.sleep(step)
            elif isinstance(step, asyncio.Event):
                await step.wait()
            else:
                yield step if isinstance(step, Piece) else Piece(step, (Quote(0, 3, "Abstract", 1),), tokens=7)

    async def close(self) -> None:
        pass


@dataclass
class Fetching:
    """A fetcher: gives these bytes, or raises this error."""

    body: object
    asked: list = field(default_factory=list)

    async def get(self, url, source, **options):
        self.asked.append((url, source, options))
        if isinstance(self.body, Exception):
            raise self.body

        class Fetched:
            body = self.body

        return Fetched()


def stored(store, identifier="2401.00001", version=3, **values):
    """A paper in the store."""
    given = {
        "origin": "venue" if "@" in identifier else "api",
        "title": "A Title of Boats",
        "abstract": "We propose a method that sorts boats. It solves a difficult problem of all rivers.",
        "authors": ("A. Author",),
    }
    record = PaperRecord(parse_id(identifier), version=version, **{**given, **values})
    store.upsert([record])
    return papers(store, [find(store, [record.paper])[record.paper]])[0]


def cards_of(store, engine=None) -> Cards:
    """The cards of a store."""
    return Cards(store, Queue(store), (engine or Scripted()).key())
