"""How the site is: the last polls of its sources, its queue, its index, and whether somebody should look."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from fastapi import APIRouter
from sqlalchemy import func, select
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from danlu.papers import schema
from danlu.papers.search.documents import latest_change
from danlu.papers.web.state import Site

router = APIRouter()

#: Without a successful poll for this long, on a weekday, something is wrong.
SILENT = timedelta(hours=26)


@router.get("/health")
def health(request: Request) -> Response:
    """The state of the site; status 503 where something is wrong, so that a monitor needs no more."""
    found = state(request.app.state.site)
    return JSONResponse(found, 200 if found["state"] == "ok" else 503, {"Cache-Control": "no-store"})


def state(site: Site, now: datetime | None = None) -> dict[str, Any]:
    """What works and what does not.

    Args:
        site: to look at.
        now: the time, in UTC without zone.
    """
    moment = now or datetime.now(UTC).replace(tzinfo=None)
    with site.store.reading() as connection:
        count = connection.scalar(select(func.count()).select_from(schema.paper)) or 0
        query = select(schema.poll).where(schema.poll.c.source != "snapshot")
        polls = [_poll(dict(row), moment) for row in connection.execute(query).mappings()]
    alarms = []
    if site.settings.follow and moment.weekday() < 5:
        alarms = [
            f"{poll['source']} {poll['key']}: no successful poll for {SILENT}" for poll in polls if poll["silent"]
        ]
        if not any(poll["source"] == "rss" for poll in polls):
            alarms.append("nothing has been polled yet")
    return {
        "state": "alarm" if alarms else "ok",
        "alarms": alarms,
        "papers": count,
        "following": site.settings.follow,
        "polls": polls,
        "jobs": site.queue.depth(),
        "index": {
            "engine": site.settings.search,
            "papers": site.index.count(),
            "behind": max(0, count - site.index.count()),
        },
        "change": latest_change(site.store),
        "engine": site.engine.label if site.engine is not None else None,
    }


def _poll(row: dict[str, Any], now: datetime) -> dict[str, Any]:
    last = row["last_ok"]
    return {
        "source": row["source"],
        "key": row["key"],
        "last_ok": last.isoformat() + "Z" if last else None,
        "hours": round((now - last).total_seconds() / 3600, 1) if last else None,
        "silent": last is None or now - last > SILENT,
        "expected": row["expected_n"],
        "got": row["got_n"],
        "warning": row["warning"],
        "error": row["error"],
    }
