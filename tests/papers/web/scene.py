"""A site on a few papers whose text is as hostile as text can be."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, date, datetime

from danlu.papers.answer.types import Piece, Quote
from danlu.papers.cards import Cards
from danlu.papers.ids import parse_id
from danlu.papers.jobs import Queue
from danlu.papers.records import Listing, PaperRecord, VenuePlace
from danlu.papers.search import open_index
from danlu.papers.settings import Settings
from danlu.papers.store import Store
from danlu.papers.streams import Streams
from danlu.papers.web.state import Site

DAY, BEFORE = date(2024, 5, 17), date(2024, 5, 16)


class Scripted:
    """An engine that says what the test wrote, one piece at a time."""

    name = "scripted"
    label = "Scripted engine"

    def __init__(self, pieces=("The *first* part, ", "and $a_1 * b_2$ the rest."), pause=0.0):
        self.pieces, self.pause, self.calls = pieces, pause, 0

    def key(self):
        return "scripted-1"

    async def answer(self, paper, question, history):
        self.calls += 1
        for place, text in enumerate(self.pieces):
            await asyncio.sleep(self.pause)
            yield Piece(text, (Quote(0, 10, "Method", 3),) if place == 0 else ())

    async def close(self):
        pass


def record(identifier, title="", categories=("cs.AI",), day=DAY, **more):
    more.setdefault("abstract", f"An abstract about {title.lower()}.")
    listings = more.pop("listings", None)
    if listings is None:
        listings = tuple(
            Listing(day, code, "cross" if place else "new", int(identifier[-3:]) if identifier[-1].isdigit() else 0)
            for place, code in enumerate(categories)
        )
    return PaperRecord(
        parse_id(identifier),
        "api",
        title=title,
        authors=more.pop("authors", ("Ada Lovelace", "Kurt Gödel")),
        categories=categories,
        version=more.pop("version", 1),
        versions=more.pop("versions", ()),
        submitted_at=more.pop("submitted_at", datetime(2024, 5, 15, 10, 30, tzinfo=UTC)),
        listings=listings,
        **more,
    )


def papers():
    yield record("2405.00001", "Rotary <b>positions</b> & $x_1 < y$", ("cs.AI", "cs.LG"))
    yield record("2405.00002", 'Quotes "of" $5 and $10', ("cs.LG",), submitted_at=datetime(2024, 5, 16, tzinfo=UTC))
    yield record(
        "2405.00003", "<script>alert(1)</script>", ("cs.CY", "cs.AI"), authors=tuple(f"Author {i}" for i in range(60))
    )
    yield record(
        "2405.00004", "Five versions", ("cs.AI",), version=5,
        versions=tuple((v, datetime(2024, 5, v, tzinfo=UTC)) for v in range(1, 6)),
    )  # fmt: skip
    yield record("hep-th/9901001", "Strings of old", ("hep-th",), day=BEFORE)
    for number in range(100, 160):
        yield record(
            f"2405.00{number}",
            f"Filler number {number} of graphs",
            ("cs.AI",),
            listings=(Listing(DAY, "cs.AI", "new", number),),
        )
    yield record("2405.00500", "It came late", ("cs.AI",), listings=(Listing(DAY, "cs.AI", "new", None, late=True),))
    yield record("2404.00001", "Yesterday", ("cs.AI",), day=BEFORE)
    for number in range(3):
        yield record(
            f"note{number}@OpenReview", f"Venue paper {number}", (), listings=(),
            venues=(VenuePlace("ICLR", 2024, "Oral" if number == 0 else "Poster", number),),
        )  # fmt: skip
    yield record("old1@OpenReview", "Of the year before", (), listings=(), venues=(VenuePlace("ICLR", 2023, "", 0),))


def make_site(folder, engine, **settings):
    store = Store(f"sqlite:///{folder / 'papers.db'}")
    store.upsert(papers())
    index = open_index(folder / "search")
    index.update(store)
    queue = Queue(store)
    cards = Cards(store, queue, engine.key() if engine else "")
    return Site(Settings(data=folder, **settings), store, index, queue, cards, Streams(cards, 0.02), engine, None)


def shown(text):
    """The identifiers of the papers on a page, in order."""
    return re.findall(r'<article class="paper" data-id="([^"]+)"', text)
