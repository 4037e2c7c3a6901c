"""One library of a few papers, and an index of it by each engine in turn."""

from __future__ import annotations

from datetime import UTC, date, datetime

import pytest

from danlu.papers.ids import PaperId, parse_id
from danlu.papers.records import Listing, PaperRecord, VenuePlace
from danlu.papers.search import open_index
from danlu.papers.store import Store

ENGINES = ["fts5", "tantivy"]


def make(number, title, abstract="", day=date(2024, 1, 15), categories=("cs.LG",), authors=(), venues=(), **more):
    """A paper of arXiv, or of a venue alone where it has no category."""
    name = f"2401.{number:05d}"
    return PaperRecord(
        parse_id(name) if categories else PaperId("ACL", name),
        "rss" if categories else "venue",
        title=title,
        abstract=abstract,
        authors=authors,
        categories=categories,
        listings=tuple(Listing(day, code, "new", number) for code in categories),
        submitted_at=datetime(day.year, day.month, day.day, tzinfo=UTC),
        venues=tuple(VenuePlace(venue, year, "Poster", number) for venue, year in venues),
        **more,
    )


LIBRARY = [
    make(1, "Rotary position embedding", "Queries turn by an angle.", authors=("Jianlin Su", "Erwin Schrödinger")),
    make(2, "Rectified flow", "Straight paths between noise and pictures.", date(2024, 1, 16), ("cs.CV", "cs.LG")),
    make(3, "Flow matching", "A velocity is matched; rectified when straight.", date(2023, 5, 1), ("cs.CV",)),
    make(4, "State-of-the-art parsing", "Position of heads.", date(2022, 12, 31), ("cs.CL",), venues=[("ACL", 2023)]),
    make(5, "扩散模型的采样", "Sampling of diffusion models: 快速采样。", date(2024, 2, 29), ("math.NA", "cs.LG")),
    make(
        6, "A venue's own paper", "Naïve parsing of flow.", categories=(), venues=[("ICLR", 2024), ("AAAI Symp", 2024)]
    ),
]


def fill(store):
    """Write the library paper by paper: they change one after another."""
    for record in LIBRARY:
        store.upsert([record])


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """To be read alone."""
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('library') / 'papers.db'}")
    fill(store)
    yield store
    store.close()


@pytest.fixture(params=ENGINES, scope="module")
def engine(request):
    """The name of an engine."""
    return request.param


@pytest.fixture(scope="module")
def index(engine, library, tmp_path_factory):
    """To be searched alone."""
    opened = open_index(tmp_path_factory.mktemp("search"), engine)
    assert opened.update(library) == len(LIBRARY)
    yield opened
    opened.close()
