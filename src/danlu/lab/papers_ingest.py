"""Claims on filling a site with papers: what a day's list lacks by where it is read."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from danlu.lab.claim import Check, Context, Evidence, Plot, Table
from danlu.lab.papers_arxiv import Arxiv, fixture_day
from danlu.lab.runner import claim

_DAY, _BEGIN = date(2024, 1, 16), datetime(2024, 1, 16, 5, 10, tzinfo=UTC)
_PAPERS, _LATE, _LAGGING = 133, 50, range(100, 110)
_SHARES = (0.0, 0.1, 0.3, 0.5)
_HOURS = 40


@dataclass(frozen=True)
class Way:
    """A way of reading a day: its sources, and whether it looks again."""

    feed: bool
    interface: bool
    again: bool


WAYS = {
    "interface, once": Way(False, True, False),
    "feed, once": Way(True, False, False),
    "both, once": Way(True, True, False),
    "both, again and again": Way(True, True, True),
}


@claim(
    name="papers-complete",
    title="No single source has every paper of a day",
    source="archive 9978, and the change log of the site that it describes",
    statement="The query interface of arXiv lags behind: of the 132 papers in a day's list it had 122. A site that "
    "reads the feed and the interface, and asks again, shows every paper once, whatever fails on the way.",
    measurement="A played day of 133 papers: the feed has 132, the interface at first 122 of them, and after twelve "
    "hours the one that the feed lacks. Listed papers by way of reading, for shares of requests that fail at random: "
    "overload, a web page, half an answer, an empty one; eight seeds.",
    budget=20,
)
def papers_complete(context: Context) -> Evidence:
    """Four ways of reading one day, four shares of faults."""
    seeds = [context.seeds[0] + i for i in range(8)]
    cases = [(name, share) for name in WAYS for share in _SHARES]
    found: dict[tuple[str, float], list[tuple[int, int, int]]] = {}
    for name, share in context.track(cases, description="reading the day", total=len(cases)):
        found[name, share] = [read_day(WAYS[name], share, seed) for seed in (seeds if share else seeds[:1])]
    calm = {name: found[name, 0.0][0] for name in WAYS}
    complete = [each for share in _SHARES for each in found["both, again and again", share]]
    shown = ", ".join(f"{name} {calm[name][0]}" for name in WAYS)
    checks = (
        Check("without faults: interface 122, feed 132, both again and again 133",
              [calm[name][0] for name in ("interface, once", "feed, once", "both, again and again")] == [122, 132, 133],
              shown),
        Check("both again and again: 133 in every run, each once", all(each[:2] == (133, 133) for each in complete),
              f"{min(each[0] for each in complete)} to {max(each[0] for each in complete)}"),
        Check("exactly one of them is marked as added later where nothing fails",
              calm["both, again and again"][2] == 1, str(calm["both, again and again"][2])),
        Check("with half the requests failing, one look loses more than a paper on average",
              _mean(found["both, once", 0.5]) < 132, f"{_mean(found['both, once', 0.5]):.1f}"),
    )  # fmt: skip
    rows = tuple((name, *(f"{_mean(found[name, share]):.1f}" for share in _SHARES)) for name in WAYS)
    return Evidence(
        summary=f"Of {_PAPERS} papers: {shown}. With half of all requests failing, looking again still brings all.",
        checks=checks,
        tables=(Table("Papers listed, mean", ("way", *(f"{share:.0%} fail" for share in _SHARES)), rows),),
        plots=(
            Plot(
                "Papers of the day that a reader sees",
                "share of requests that fail",
                "papers",
                _SHARES,
                {name: tuple(_mean(found[name, share]) for share in _SHARES) for name in WAYS},
            ),
        ),
        notes=(
            "The site decides by itself when to look again: half an hour after a look that failed or brought news, "
            f"twelve hours after one that did not; {_HOURS} hours are played.",
            "The feed of arXiv is usually complete; that it lacks one paper here is the case that re-polling is for.",
        ),
    )


def read_day(way: Way, faults: float, seed: int) -> tuple[int, int, int]:
    """Papers listed, different ones among them, and those marked as added later.

    Args:
        way: of reading.
        faults: share of requests that fail.
        seed: of the faults.
    """
    return asyncio.run(_read_day(way, faults, seed))


async def _read_day(way: Way, faults: float, seed: int) -> tuple[int, int, int]:
    from danlu.papers.categories import parse_expression
    from danlu.papers.lists import day_list
    from danlu.papers.sources.polling import poll
    from danlu.papers.store import Store

    records = fixture_day(_DAY, _PAPERS)
    late = str(records[_LATE].paper)
    lagging = {str(records[i].paper) for i in _LAGGING}
    early = Arxiv(_DAY, records, {late}, lagging | {late}, faults=faults, seed=seed)
    store, now = Store(), _BEGIN
    try:
        fetcher: Any = early
        while now < _BEGIN + timedelta(hours=_HOURS):
            if now >= _BEGIN + timedelta(hours=12):
                early.interface_lacks = lagging
            report = await poll(store, fetcher, "cs.LG", now, feed=way.feed, interface=way.interface)
            if not way.again or report.again_at is None:
                break
            now = max(report.again_at.replace(tzinfo=UTC), now + timedelta(minutes=1))
        entries = day_list(store, parse_expression("cs.LG"), _DAY).entries
    finally:
        store.close()
    return len(entries), len({entry.pk for entry in entries}), sum(entry.late for entry in entries)


def _mean(runs: Sequence[tuple[int, int, int]]) -> float:
    return sum(run[0] for run in runs) / len(runs)
