from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, date, datetime

import pytest
import sqlalchemy as sa

from danlu.papers import schema
from danlu.papers.ids import parse_id
from danlu.papers.lists import find, papers
from danlu.papers.migrations import upgrade
from danlu.papers.records import Listing, PaperRecord, VenuePlace
from danlu.papers.store import Store

DAY = date(2024, 1, 15)
FIRST = datetime(2024, 1, 12, 18, 0, tzinfo=UTC)
SECOND = datetime(2024, 2, 1, 9, 0, tzinfo=UTC)

RSS = PaperRecord(
    parse_id("2401.06769"),
    "rss",
    title="A title from the feed",
    abstract="Feed abstract.",
    authors=("Ann Lee, Jr.", "Bo Chen"),
    authors_provisional=True,
    categories=("cs.LG", "cs.AI"),
    version=1,
    listings=(Listing(DAY, "cs.LG", "new", 3), Listing(DAY, "cs.AI", "cross", 40)),
)
API = PaperRecord(
    parse_id("2401.06769"),
    "api",
    title="A title from the interface",
    authors=("Ann Lee Jr.", "Bo Chen"),
    categories=("cs.LG", "cs.AI", "stat.ML"),
    comment="12 pages",
    version=2,
    versions=((1, FIRST),),
    submitted_at=FIRST,
    updated_at=SECOND,
    listings=(Listing(DAY, "cs.LG", "new", None, late=True),),
)
OAI = PaperRecord(
    parse_id("2401.06769"),
    "oai",
    title="A title from the archive",
    abstract="Archive abstract.",
    license="CC BY 4.0",
    versions=((1, FIRST), (2, SECOND)),
    listings=(Listing(date(2024, 1, 16), "cs.LG", "new", None, approximate=True),),
    venues=(VenuePlace("ICLR", 2024, "Oral", 7),),
)
KAGGLE = PaperRecord(
    parse_id("2401.06769"),
    "kaggle",
    title="A title from a snapshot",
    doi="10.1/x",
    journal_ref="J. 1",
    extra={"submitter": "Ann"},
)


def _contents(store):
    """Every row but the numbers that only say when it was written."""
    hidden = {"pk", "changed", "seq", "added_at", "id", "venue_id"}
    found = {}
    with store.reading() as connection:
        for table in (
            schema.paper,
            schema.paper_version,
            schema.paper_cat,
            schema.listing,
            schema.venue,
            schema.venue_paper,
        ):
            rows = connection.execute(sa.select(table)).mappings()
            kept = [{name: value for name, value in row.items() if name not in hidden} for row in rows]
            found[table.name] = sorted(json.dumps(row, sort_keys=True, default=str) for row in kept)
    return found


def _paper(store):
    return papers(store, list(find(store, [parse_id("2401.06769")]).values()))[0]


def test_every_field_keeps_the_value_of_the_best_source(store):
    store.upsert([RSS, KAGGLE, API])
    paper = _paper(store)
    assert paper.title == "A title from the interface" and paper.abstract == "Feed abstract."
    assert paper.authors == ("Ann Lee Jr.", "Bo Chen") and not paper.authors_provisional
    assert (paper.comment, paper.doi, paper.journal_ref) == ("12 pages", "10.1/x", "J. 1")
    assert (
        paper.version == 2 and paper.submitted_at == datetime(2024, 1, 12, 18) and paper.extra == {"submitter": "Ann"}
    )
    assert paper.announced_on == DAY


def test_the_order_of_sources_does_not_change_the_rows():
    seen = set()
    for order in itertools.permutations([RSS, API, OAI, KAGGLE]):
        store = Store()
        for record in order:
            store.upsert([record])
        seen.add(repr(_contents(store)))
        store.close()
        together = Store()
        together.upsert(order)
        seen.add(repr(_contents(together)))
        together.close()
    assert len(seen) == 1


def test_writing_the_same_again_changes_no_row(store):
    records = [RSS, API, OAI, KAGGLE]
    store.upsert(records)
    before = _contents(store)
    written = store.upsert(records)
    assert (written.added, written.changed, written.unchanged) == (0, 0, 1)
    assert _contents(store) == before


def test_an_empty_field_overwrites_nothing(store):
    store.upsert([API])
    store.upsert([replace(OAI, title="", abstract="")])
    assert _paper(store).title == "A title from the interface"


def test_categories_that_a_better_source_does_not_have_are_gone(store):
    store.upsert([RSS])
    store.upsert([replace(API, categories=("stat.ML",))])
    with store.reading() as connection:
        assert list(connection.scalars(sa.select(schema.paper_cat.c.cat))) == ["stat.ML"]
    assert _paper(store).categories == ("stat.ML",)


def test_a_withdrawal_stays(store):
    store.upsert([replace(OAI, withdrawn=True)])
    store.upsert([API])
    assert _paper(store).withdrawn


def test_changes_are_numbered_in_order(store):
    store.upsert([RSS])
    first = _paper(store).changed
    store.upsert([KAGGLE])
    assert _paper(store).changed > first
    store.upsert([KAGGLE])
    assert _paper(store).changed == first + 1


def test_writers_at_once_lose_nothing(store):
    def write(part):
        other = Store(store.url.render_as_string(hide_password=False), migrate=False)
        for i in range(10):
            number = part * 10 + i + 1
            other.upsert(
                [replace(RSS, paper=parse_id(f"2402.{number:05d}")), replace(RSS, paper=parse_id("2403.00001"))]
            )
        other.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    with store.reading() as connection:
        keys = list(connection.scalars(sa.select(schema.paper.c.pk)))
    assert len(keys) == len(set(keys)) == 41


def test_a_failed_batch_leaves_nothing_behind(store):
    class Broken(Exception):
        pass

    def records():
        yield RSS
        raise Broken

    with pytest.raises(Broken):
        store.upsert(records())
    assert _contents(store)["paper"] == []


def test_opening_again_keeps_what_is_there(store):
    store.upsert([RSS])
    upgrade(store.engine)
    assert _paper(store).title == "A title from the feed"


def test_a_secret_is_made_once(store):
    assert store.secret("forms") == store.secret("forms") != store.secret("other")


def test_other_databases_are_refused():
    with pytest.raises(ValueError, match="SQLite or PostgreSQL"):
        Store("mysql://localhost/x")


def test_times_without_zone_are_refused():
    with pytest.raises(ValueError, match="time zone"):
        PaperRecord(parse_id("2401.06769"), "api", submitted_at=datetime(2024, 1, 1))
    with pytest.raises(ValueError, match="origin must be one of"):
        PaperRecord(parse_id("2401.06769"), "hearsay")
