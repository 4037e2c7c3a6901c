"""Pages that are not lists: the entrance, the reader's own settings and stars, help."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from fastapi import APIRouter
from sqlalchemy import func, select
from starlette.requests import Request
from starlette.responses import Response

from danlu.papers import lists, schema
from danlu.papers.categories import Category, vocabulary

router = APIRouter(include_in_schema=False)


def _groups() -> list[tuple[str, list[tuple[str, list[Category]]]]]:
    """Subjects that still take papers, by group and archive, in the source's order."""
    active = [category for category in vocabulary().values() if category.active]
    found = []
    for group, of_group in groupby(active, key=lambda category: category.group):
        archives: list[tuple[str, list[Category]]] = []
        for archive, of_archive in groupby(of_group, key=lambda category: category.archive):
            archives.append((archive, list(of_archive)))
        found.append((group, archives))
    return found


def _by_year(venues: Iterable[lists.Venue]) -> list[tuple[int, list[lists.Venue]]]:
    return [(year, list(of_year)) for year, of_year in groupby(venues, key=lambda venue: venue.year)]


@router.get("/")
def home(request: Request) -> Response:
    """The entrance: subjects, venues, search."""
    site, cache = request.app.state.site, request.app.state.cache

    def totals() -> tuple[int, object]:
        with site.store.reading() as connection:
            count = connection.scalar(select(func.count()).select_from(schema.paper))
            return int(count or 0), connection.scalar(select(func.max(schema.listing.c.announced_on)))

    count, latest = cache.get("totals", totals)
    venues = cache.get("venues", lambda: lists.venues(site.store))
    return request.app.state.pages.render(
        request, "home.html", groups=_groups(), years=_by_year(venues), count=count, latest=latest
    )


@router.get("/starred")
def starred(request: Request) -> Response:
    """The reader's stars: they are in the browser, which fills this page."""
    return request.app.state.pages.render(request, "starred.html")


@router.get("/settings")
def settings(request: Request) -> Response:
    """The reader's own settings: they are in the browser, which fills this page."""
    return request.app.state.pages.render(request, "settings.html")


@router.get("/help")
def help_page(request: Request) -> Response:
    """How the site is used."""
    return request.app.state.pages.render(request, "help.html")
