"""Sample data: the papers that danlu's methods come from, so that a fresh site has something to read.

Identifiers, titles, authors, categories and venues are the papers' own. The abstracts are in our own words, and the
days on which the sample "announces" them are made up; every paper says so in its comment.
"""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from importlib import resources

from danlu.papers.ids import parse_id
from danlu.papers.records import Listing, PaperRecord, VenuePlace
from danlu.papers.store import Store, Written

#: Days over which the sample is spread.
DAYS = 3
COMMENT = "Sample data: the abstract is in our own words, and the day of the list is made up."


def sample_records(today: date | None = None) -> list[PaperRecord]:
    """The sample as records.

    Args:
        today: the papers are announced on the latest three weekdays up to this day; the current one unless given.

    Returns:
        A few dozen records.
    """
    text = (resources.files("danlu.papers") / "data" / "sample.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    days = _weekdays(today or datetime.now(UTC).date())
    share = -(-len(rows) // DAYS)
    records = []
    for place, row in enumerate(rows):
        submitted = datetime.fromisoformat(row["submitted"]).replace(tzinfo=UTC)
        day = days[place // share]
        records.append(
            PaperRecord(
                parse_id(row["id"]),
                "sample",
                title=row["title"],
                abstract=row["abstract"],
                authors=tuple(row["authors"]),
                categories=tuple(row["categories"]),
                comment=COMMENT,
                version=1,
                versions=((1, submitted),),
                submitted_at=submitted,
                updated_at=submitted,
                listings=tuple(
                    Listing(day, category, "cross" if place_of else "new", place, approximate=True)
                    for place_of, category in enumerate(row["categories"])
                ),
                venues=tuple(VenuePlace(name, year, group, place) for name, year, group in row["venues"]),
            )
        )
    return records


def load_sample(store: Store, today: date | None = None) -> Written:
    """Write the sample into a store; see `sample_records`."""
    return store.upsert(sample_records(today))


def _weekdays(today: date) -> list[date]:
    """The latest weekdays up to a day, newest first."""
    found: list[date] = []
    while len(found) < DAYS:
        if today.weekday() < 5:
            found.append(today)
        today -= timedelta(days=1)
    return found
