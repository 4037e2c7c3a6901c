"""Everything that a running site is made of, opened once and shared by pages, workers and commands."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import func, select

from danlu.papers import schema
from danlu.papers.answer.types import Engine
from danlu.papers.cards import Cards
from danlu.papers.jobs import Queue
from danlu.papers.net.fetch import Fetcher
from danlu.papers.sample import load_sample
from danlu.papers.search import Index, open_index
from danlu.papers.settings import Settings
from danlu.papers.store import Store
from danlu.papers.streams import Streams


@dataclass(frozen=True)
class Site:
    """The parts of a site.

    Args:
        settings: of the operator.
        store: the database.
        index: for search.
        queue: jobs of the store.
        cards: answers of the store, for this engine.
        streams: running answers as this process follows them.
        engine: that answers; None where questions cannot be asked.
        fetcher: that asks sources; None where the site has no network.
    """

    settings: Settings
    store: Store
    index: Index
    queue: Queue
    cards: Cards
    streams: Streams
    engine: Engine | None = None
    fetcher: Fetcher | None = None

    def close(self) -> None:
        """Give files and connections back."""
        self.index.close()
        self.store.close()


def open_site(settings: Settings) -> Site:
    """Open a site: the database with its tables up to date, the sample in an empty one, the search index caught up.

    Args:
        settings: of the operator; without a contact the site asks no source for anything.

    Raises:
        ValueError: a database of an unknown kind, an index that this version cannot read, an engine that cannot be.
        ImportError: a package that the settings need is missing.
    """
    from danlu.papers.answer.engines import make

    settings.data.mkdir(parents=True, exist_ok=True)
    store = Store(settings.database_url)
    if settings.sample and _is_empty(store):
        load_sample(store)
    index = open_index(settings.data / "search", settings.search)
    index.update(store)
    engine = make(settings.engine)
    queue = Queue(store)
    cards = Cards(store, queue, "" if engine is None else engine.key())
    fetcher = Fetcher(store, settings.contact) if settings.contact else None
    return Site(settings, store, index, queue, cards, Streams(cards), engine, fetcher)


def _is_empty(store: Store) -> bool:
    with store.reading() as connection:
        return not connection.scalar(select(func.count()).select_from(select(schema.paper.c.pk).limit(1).subquery()))
