"""What the store makes of guessed places and of equal claims; the order of records never matters."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from datetime import date

from tests.papers.contents import contents

from danlu.papers.ids import parse_id
from danlu.papers.records import Listing, PaperRecord
from danlu.papers.store import Store

EARLY, DAY, LATER = date(2024, 1, 15), date(2024, 1, 16), date(2024, 1, 17)
PAPER = PaperRecord(parse_id("2401.00001"), "api", title="A")


def guess(day, *cats, origin="api"):
    places = tuple(
        Listing(day, cat, "new" if i == 0 else "cross", None, approximate=True) for i, cat in enumerate(cats)
    )
    return replace(PAPER, origin=origin, listings=places)


def known(day, cat, kind="new"):
    return replace(PAPER, origin="rss", listings=(Listing(day, cat, kind, 3),))


def places(*records):
    """Places after the records in every order, one at a time and together: they are the same."""
    found = set()
    for order in itertools.permutations(records):
        one, whole = Store(), Store()
        for record in order:
            one.upsert([record])
        whole.upsert(order)
        for store in (one, whole):
            found.add("\n".join(contents(store)["listing"]))
            store.close()
    assert len(found) == 1
    rows = [json.loads(row) for row in found.pop().splitlines()]
    return {(row["announced_on"], row["cat"], row["kind"], row["approximate"]) for row in rows}


def test_a_guess_gives_way_to_the_list_and_takes_its_day_in_other_categories():
    assert places(guess(EARLY, "cs.LG", "cs.AI"), known(DAY, "cs.LG")) == {
        ("2024-01-16", "cs.LG", "new", False),
        ("2024-01-16", "cs.AI", "cross", True),
    }


def test_guesses_of_several_sources_are_one():
    found = places(guess(EARLY, "cs.LG"), guess(DAY, "cs.LG", "cs.AI", origin="kaggle"), guess(LATER, "cs.LG"))
    assert found == {("2024-01-15", "cs.LG", "new", True), ("2024-01-15", "cs.AI", "cross", True)}


def test_every_list_that_is_known_stays_and_a_replacement_announces_nothing():
    found = places(known(DAY, "cs.LG"), known(LATER, "cs.AI", "cross"), guess(EARLY, "cs.LG", "cs.AI", "stat.ML"))
    assert found == {
        ("2024-01-16", "cs.LG", "new", False),
        ("2024-01-17", "cs.AI", "cross", False),
        ("2024-01-16", "stat.ML", "cross", True),
    }
    found = places(known(LATER, "cs.LG", "replace"), guess(EARLY, "cs.LG"))
    assert found == {("2024-01-17", "cs.LG", "replace", False), ("2024-01-15", "cs.LG", "new", True)}


def test_of_equal_claims_one_wins_in_every_order():
    titles = set()
    for order in itertools.permutations("ABC"):
        store = Store()
        for title in order:
            store.upsert([replace(PAPER, title=title, authors=(title,), extra={"x": title})])
        titles.add("\n".join(contents(store)["paper"]))
        store.close()
    assert len(titles) == 1
