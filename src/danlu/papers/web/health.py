"""Whether the site is up to date: what its sources last gave, what waits in the queue, what search has not read yet."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from danlu.papers import schema
from danlu.papers.sources.mailing import ZONE
from danlu.papers.sources.polling import names_of
from danlu.papers.web.models import Text, Time
from danlu.papers.web.state import Site

router = APIRouter(include_in_schema=False)

#: Hours of weekdays after which a followed source should have been read again.
ALARM = 26.0


class SourceHealth(BaseModel):
    """One source as it was last read."""

    source: Text = Field(description="rss, api or oai")
    key: Text = Field(description="the category or archive that was read")
    last_ok: Time | None = Field(description="when it last gave what could be read, in UTC")
    last_try: Time | None = Field(description="when it was last asked, in UTC")
    hours: float | None = Field(description="since it was last read, without Saturdays and Sundays")
    late: bool = Field(description="the site follows it, and it has not been read for too long")
    expected: int | None = Field(description="entries that it had at most on its day")
    got: int | None = Field(description="entries that it had last")
    error: Text = Field(description="of the latest try")
    warning: Text = Field(description="what could not be read")


class Health(BaseModel):
    """How the site is."""

    state: Literal["ok", "alarm"]
    alarms: list[str] = Field(description="what somebody should look at")
    follow: str = Field(description="the subjects that are kept up to date; empty: none")
    latest_day: date | None = Field(description="of the latest daily list")
    papers: int = Field(description="in the database")
    index_lag: int = Field(description="papers that search does not know yet")
    queue: dict[str, dict[str, int]] = Field(description="jobs by kind and state")
    sources: list[SourceHealth]


def weekday_hours(since: datetime, now: datetime) -> float:
    """Hours between two times, without the Saturdays and Sundays of the source's own calendar.

    Args:
        since: with zone.
        now: with zone.
    """
    total = timedelta()
    day = since.astimezone(ZONE).date()
    while day <= now.astimezone(ZONE).date():
        if day.weekday() < 5:
            # Lengths are taken in UTC: a day on which clocks change has 23 or 25 hours.
            start = datetime.combine(day, time(), ZONE).astimezone(UTC)
            end = datetime.combine(day + timedelta(days=1), time(), ZONE).astimezone(UTC)
            total += max(min(end, now) - max(start, since), timedelta())
        day += timedelta(days=1)
    return total.total_seconds() / 3600


def examine(site: Site, now: datetime | None = None) -> Health:
    """Look at a site.

    Args:
        site: to look at.
        now: with zone; the time of the call unless given.
    """
    moment = now or datetime.now(UTC)
    with site.store.reading() as connection:
        rows = {(row["source"], row["key"]): dict(row) for row in connection.execute(select(schema.poll)).mappings()}
        papers = int(connection.scalar(select(func.count()).select_from(schema.paper)) or 0)
        latest = connection.scalar(select(func.max(schema.listing.c.announced_on)))
    names = names_of(site.settings.follow) if site.settings.follow else []
    for name in names:
        rows.setdefault(("rss", name), {"source": "rss", "key": name})
    sources = [_source(rows[key], names, moment) for key in sorted(rows)]
    alarms = [
        f"{each.source} {each.key} has "
        + ("never been read" if each.hours is None else f"not been read for {each.hours:.0f} hours of weekdays")
        for each in sources
        if each.late
    ]
    return Health(
        state="alarm" if alarms else "ok",
        alarms=alarms,
        follow=site.settings.follow,
        latest_day=latest,
        papers=papers,
        index_lag=max(0, papers - site.index.count()),
        queue=site.queue.depth(),
        sources=sources,
    )


def _source(row: dict, names: list[str], now: datetime) -> SourceHealth:
    read: datetime | None = row.get("last_ok")
    hours = None if read is None else round(weekday_hours(read.replace(tzinfo=UTC), now), 1)
    # The archive's interface names an archive of physics after its group.
    archives = {name.split(".")[0] for name in names}
    followed = row["key"].rpartition(":")[2] in archives if row["source"] == "oai" else row["key"] in names
    return SourceHealth(
        source=row["source"],
        key=row["key"],
        last_ok=read,
        last_try=row.get("last_try"),
        hours=hours,
        late=followed and (hours is None or hours > ALARM),
        expected=row.get("expected_n"),
        got=row.get("got_n"),
        error=row.get("error") or "",
        warning=row.get("warning") or "",
    )


@router.get("/health")
def health(request: Request) -> Response:
    """How the site is: a page for people, JSON for programs; 503 where something is wrong, for monitors."""
    headers = {"Cache-Control": "no-store"}
    try:
        found = examine(request.app.state.site)
    except SQLAlchemyError as error:
        # The message may name files and hosts of the operator.
        return JSONResponse({"state": "down", "error": type(error).__name__}, 503, headers)
    status = 200 if found.state == "ok" else 503
    if "text/html" not in request.headers.get("Accept", ""):
        return JSONResponse(found.model_dump(mode="json"), status, {**headers, "Vary": "Accept"})
    response = request.app.state.pages.render(request, "health.html", status, health=found)
    response.headers.update(headers)
    response.headers["Vary"] = "Accept"
    return response
