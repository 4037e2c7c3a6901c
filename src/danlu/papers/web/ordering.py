"""Orders of a list, and the cursor that leads from one chunk of it to the next.

A chunk is asked for by its place, the list's snapshot, and the positions of the papers that the order moved to the
front. So every chunk is cut from one and the same sequence, whatever is polled or counted between two requests, and no
process has to remember anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from starlette.datastructures import QueryParams

from danlu.papers import counters, schema
from danlu.papers.search import Index
from danlu.papers.store import Store
from danlu.papers.tokens import query_words
from danlu.papers.web.errors import BadRequest

CHUNK, MOST = 25, 500
#: Papers that an order by stars or preference can move to the front.
MOVED = 300
SORTS = {"": "source", "stars": "stars", "time": "time", "preference": "preference"}


@dataclass(frozen=True)
class Asked:
    """How a list is asked for: its order, the size of a chunk, and where the chunk begins."""

    sort: str = ""
    show: int = CHUNK
    words: str = ""
    after: int = 0
    snapshot: int | None = None
    head: tuple[int, ...] | None = None


def read(query: QueryParams, sorts: Sequence[str] = tuple(SORTS)) -> Asked:
    """Read the parameters of a list.

    Args:
        query: of the request.
        sorts: that this list has.

    Raises:
        BadRequest: one that cannot be read.
    """
    sort = query.get("sort", "")
    if sort not in sorts:
        known = ", ".join(name for name in sorts if name)
        raise BadRequest(f"sort must be one of {known}, or be left out", sort)
    head = query.get("head")
    return Asked(
        sort,
        _number(query, "show", CHUNK, 1, MOST),
        query.get("words", "")[:2000],
        _number(query, "after", 0, 0, 10**6),
        _number(query, "snapshot", 0, 0, 2**62) if "snapshot" in query else None,
        None if head is None else _positions(head),
    )


def _number(query: QueryParams, name: str, default: int, low: int, high: int) -> int:
    text = query.get(name)
    if text is None or text == "":
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) <= high):
        raise BadRequest(f"{name} must be a whole number from {low} to {high}", text)
    return int(text)


def _positions(text: str) -> tuple[int, ...]:
    parts = text.split(".") if text else []
    if len(parts) > MOVED or not all(part.isascii() and part.isdigit() and len(part) < 8 for part in parts):
        raise BadRequest(f"head must be at most {MOVED} positions joined by dots", text)
    return tuple(dict.fromkeys(int(part) for part in parts))


def arrange(store: Store, index: Index, keys: Sequence[int], asked: Asked) -> tuple[list[int], tuple[int, ...]]:
    """The positions of a list in the order asked for.

    Args:
        store: knows stars and times.
        index: knows preference.
        keys: of the papers, in the list's own order.
        asked: with the head of an earlier chunk, which is then followed.

    Returns:
        Positions in ``keys``, and the head for the next chunk.
    """
    if asked.sort == "":
        return list(range(len(keys))), ()
    if asked.head is not None and asked.after:
        head = tuple(place for place in asked.head if place < len(keys))
    elif asked.sort == "time":
        # Times do not change, so that this order needs no head.
        times = _times(store, keys)
        return sorted(range(len(keys)), key=lambda place: times.get(keys[place], datetime.min), reverse=True), ()
    elif asked.sort == "stars":
        starred = counters.stars(store, keys)
        places = [place for place in range(len(keys)) if starred.get(keys[place])]
        head = tuple(sorted(places, key=lambda place: -starred[keys[place]])[:MOVED])
    else:
        head = _moved(keys, index.rank(query_words(asked.words), keys)) if asked.words else ()
    front = set(head)
    return [*head, *(place for place in range(len(keys)) if place not in front)], head


def _moved(keys: Sequence[int], ranked: Sequence[int]) -> tuple[int, ...]:
    """The positions at the front of an order, up to the place from which on the list's own order holds."""
    place_of = {key: place for place, key in enumerate(keys)}
    places = [place_of[key] for key in ranked]
    end = max(len(places) - 1, 0)
    while end and places[end - 1] < places[end]:
        end -= 1
    return tuple(places[: min(end, MOVED)])


def _times(store: Store, keys: Sequence[int]) -> dict[int, datetime]:
    table = schema.paper
    with store.reading() as connection:
        rows = connection.execute(select(table.c.pk, table.c.submitted_at).where(table.c.pk.in_(keys)))
        return {row.pk: row.submitted_at for row in rows if row.submitted_at is not None}
