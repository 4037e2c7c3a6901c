"""Lists of venues, and papers of sources that are not arXiv."""

from __future__ import annotations

import re

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from danlu.papers import lists
from danlu.papers.web import ordering, singles
from danlu.papers.web.errors import BadRequest, Unknown
from danlu.papers.web.lists import list_values
from danlu.papers.web.rendering import is_fragment
from danlu.papers.web.views import address

router = APIRouter(include_in_schema=False)
#: ``NAME.YEAR``, or ``NAME`` alone for its latest year.
SLUG = re.compile(r"(?P<name>.{1,80}?)(?:\.(?P<year>[0-9]{4}))?\Z")


@router.get("/venue")
@router.get("/venue/")
def index(request: Request) -> Response:
    """The list of venues is on the home page."""
    return RedirectResponse("/#venues", 302)


@router.get("/venue/{rest:path}")
async def venue(request: Request, rest: str) -> Response:
    """The list of a venue, or the papers with these identifiers."""
    if "@" in rest:
        return await singles.papers_page(request, rest)
    return await run_in_threadpool(_venue_page, request, rest)


def _venue_page(request: Request, slug: str) -> Response:
    site, cache = request.app.state.site, request.app.state.cache
    venues: list[lists.Venue] = cache.get("venues", lambda: lists.venues(site.store))
    match = SLUG.match(slug)
    if match is None:
        raise BadRequest("a venue is a name and a year, such as ICLR.2024", slug[:200])
    asked = ordering.read(request.query_params)
    same = [each for each in venues if each.name.casefold() == match["name"].casefold()]
    chosen = [each for each in same if match["year"] is None or each.year == int(match["year"])]
    if not chosen:
        if not same:
            # It may be a list of arXiv papers, which are addressed elsewhere.
            raise Unknown(f"This site has no venue {slug[:80]}.", (("All venues", "/#venues"),))
        years = tuple((each.slug, address(f"/venue/{each.slug}")) for each in same)
        raise Unknown(f"This site has no {match['name']} of {match['year']}.", years)
    # They come newest first.
    held = chosen[0]
    group = request.query_params.get("group") or None
    if group is not None and group not in held.groups:
        known = ", ".join(sorted(name for name in held.groups if name)) or "none"
        raise BadRequest(f"{held.slug} has no such group; it has: {known}", group[:200])
    if match["year"] is not None and held.slug != slug:
        return RedirectResponse(address(f"/venue/{held.slug}", group=group), 301)
    found = cache.get(("venue", held.slug, group), lambda: lists.venue_list(site.store, held.name, held.year, group))
    if found is None:
        raise Unknown(f"This site has no venue {held.slug}.", (("All venues", "/#venues"),))
    values = list_values(request, found, asked, f"/venue/{held.slug}", group=group)
    if is_fragment(request):
        return request.app.state.pages.render(request, "_cards.html", **values)
    return request.app.state.pages.render(
        request, "venue.html", venue=held, group=group, total=len(found.entries), years=same, **values
    )
