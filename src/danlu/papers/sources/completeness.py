"""What a day's list lacks, and where a paper belongs of which no list says so.

A paper that stands in no list is given the place where those went that were submitted with it; where none did, the
mailing that it was in time for. One that stands in the list of one category is given the same day in its others. Such
places are marked as guesses, and give way when a list brings the paper.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date

from sqlalchemy import func, select

from danlu.papers import schema
from danlu.papers.ids import ARXIV
from danlu.papers.lists import ANNOUNCED
from danlu.papers.records import Listing, PaperRecord
from danlu.papers.sources.mailing import mailing_day
from danlu.papers.store import Store

#: Identifiers in a row that may be missing from a day's list.
GAP = 50
_PART = 1000


@dataclass(frozen=True)
class Placed:
    """Records with their places, how many of them are late for a list, and how many belong to each day."""

    records: list[PaperRecord]
    late: int
    days: Counter[date]


def place(store: Store, found: Iterable[PaperRecord], codes: Collection[str] | None = None) -> Placed:
    """Give papers that stand in no list a place in one.

    Args:
        store: whose lists are known.
        found: papers; of those without a time of submission nothing is said.
        codes: of lists that they may stand in; those of their own categories unless given.
    """
    unique = {record.paper.identifier: record for record in found}
    listed = listed_days(store, list(unique))
    went: dict[date, Counter[date]] = {}
    for identifier, record in unique.items():
        day = listed.get(identifier)
        if day is not None and record.submitted_at:
            went.setdefault(mailing_day(record.submitted_at), Counter())[day] += 1
    targets = {guess: max(counts, key=lambda day: (counts[day], -day.toordinal())) for guess, counts in went.items()}
    placed = Placed([], 0, Counter())
    shown: dict[date, bool] = {}
    late = 0
    for identifier, record in unique.items():
        known = listed.get(identifier)
        own = [code for code in record.categories if codes is None or code in codes]
        if known is None and record.submitted_at and own:
            guess = mailing_day(record.submitted_at)
            day = targets.get(guess, guess)
            if day not in shown:
                shown[day] = _is_shown(store, day, codes)
            record = _guessed(record, own, day, shown[day])
            late += shown[day] and identifier not in listed
            placed.days[day] += 1
        elif known is not None:
            record = _guessed(record, own, known, False)
            placed.days[known] += 1
        placed.records.append(record)
    return replace(placed, late=late)


def _guessed(record: PaperRecord, codes: Iterable[str], day: date, late: bool) -> PaperRecord:
    """A record with guessed places; those in lists that are known to have it are dropped by the store."""
    places = (Listing(day, c, "new" if c == record.categories[0] else "cross", None, late, True) for c in codes)
    return replace(record, listings=tuple(places))


def mark_late(store: Store, records: Iterable[PaperRecord], day: date, codes: Iterable[str]) -> list[PaperRecord]:
    """Records of a list that was shown before: places that it did not have are late, and stay so."""
    table = schema.listing
    query = (
        select(schema.paper.c.ext_id)
        .join(table, table.c.pk == schema.paper.c.pk)
        .where(table.c.announced_on == day, table.c.cat.in_(sorted(codes)), table.c.kind.in_(ANNOUNCED))
        .where(table.c.late.is_(False), schema.paper.c.source == ARXIV)
    )
    with store.reading() as connection:
        known = set(connection.scalars(query))
    return [record if record.paper.identifier in known else _late(record, day) for record in records]


def count_day(store: Store, day: date, codes: Iterable[str]) -> int:
    """Papers in a day's lists of some categories."""
    table = schema.listing
    query = select(func.count(table.c.pk.distinct())).where(
        table.c.announced_on == day, table.c.cat.in_(sorted(codes)), table.c.kind.in_(ANNOUNCED)
    )
    with store.reading() as connection:
        return int(connection.scalar(query) or 0)


def gaps(identifiers: Iterable[str]) -> list[str]:
    """Warnings about runs of identifiers that are missing from a day's list.

    A list of one category has gaps by chance: only one of more than `GAP` that chance gives less than once in a hundred
    lists is told. The ends of the list do not count, because papers may be held back for weeks.
    """
    numbers: dict[str, list[int]] = {}
    for identifier in identifiers:
        month, dot, number = identifier.partition(".")
        if dot:
            numbers.setdefault(month, []).append(int(number))
    found = []
    for month, every in numbers.items():
        listed = sorted(every)[len(every) // 10 : len(every) - len(every) // 10]
        steps = [(after - before, before) for before, after in zip(listed, listed[1:], strict=False)]
        if not steps:
            continue
        usual = sorted(step for step, _ in steps)[len(steps) // 2] / math.log(2)
        limit = max(GAP, usual * (math.log(len(steps)) + 5))
        found += [
            f"{step - 1} identifiers in a row are missing after {month}.{before:0{4 if month <= '1412' else 5}d}"
            for step, before in steps
            if step > limit
        ]
    return found


def _late(record: PaperRecord, day: date) -> PaperRecord:
    places = (replace(each, late=each.announced_on == day and each.kind in ANNOUNCED) for each in record.listings)
    return replace(record, listings=tuple(places))


def listed_days(store: Store, identifiers: Sequence[str]) -> dict[str, date | None]:
    """The first day on which each paper is known to have been announced; None where it is only guessed."""
    table, paper = schema.listing, schema.paper
    found: dict[str, date | None] = {}
    with store.reading() as connection:
        for first in range(0, len(identifiers), _PART):
            query = (
                select(paper.c.ext_id, table.c.announced_on, table.c.approximate)
                .join(table, table.c.pk == paper.c.pk)
                .where(paper.c.source == ARXIV, paper.c.ext_id.in_(identifiers[first : first + _PART]))
                .where(table.c.kind.in_(ANNOUNCED))
            )
            for row in connection.execute(query):
                known = found.setdefault(row.ext_id, None)
                if not row.approximate:
                    found[row.ext_id] = min(known or row.announced_on, row.announced_on)
    return found


def _is_shown(store: Store, day: date, codes: Collection[str] | None) -> bool:
    """Whether a list of the day has been published."""
    table = schema.listing
    query = select(table.c.pk).where(
        table.c.announced_on == day, table.c.kind.in_(ANNOUNCED), table.c.approximate.is_(False)
    )
    if codes is not None:
        query = query.where(table.c.cat.in_(sorted(codes)))
    with store.reading() as connection:
        return connection.scalar(query.limit(1)) is not None
