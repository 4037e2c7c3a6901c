"""Atom feeds of every list: a subject, a venue, the venues added last, a search.

A feed has the papers of its page in their order. Nothing in it depends on the time of the request, so that readers see
a change only where there is one. Earlier days of a subject are linked as archives (RFC 5005): a reader that was away
loses nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta
from urllib.parse import quote, urlencode
from xml.etree.ElementTree import Element, SubElement, tostring

from fastapi import APIRouter
from sqlalchemy import select
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from danlu.papers import ids, lists, schema
from danlu.papers.categories import Expression, InvalidExpression, parse_expression, shown
from danlu.papers.rows import Paper, PaperList
from danlu.papers.web import security
from danlu.papers.web.errors import BadRequest, Unknown
from danlu.papers.web.lists import day_of, read_day
from danlu.papers.web.models import clean
from danlu.papers.web.ordering import read
from danlu.papers.web.venues import SLUG
from danlu.papers.web.views import address, papers_url, web_address

router = APIRouter(include_in_schema=False)

ATOM, HISTORY = "http://www.w3.org/2005/Atom", "http://purl.org/syndication/history/1.0"
#: Entries of one document: more than any day has.
MOST = 2000
#: Results of a search in one document, and venues in the feed of venues.
SEARCHED, VENUES = 100, 50
_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)


@router.get("/feed/arxiv/{expression}")
def subject(request: Request, expression: str) -> Response:
    """The list of a subject: of the latest day, or of the one asked for."""
    wanted = read_expression(expression)
    if str(wanted) != expression:
        query = f"?{request.url.query}" if request.url.query else ""
        return RedirectResponse(address(f"/feed/arxiv/{wanted}") + query, 301)
    asked = read_day(request.query_params.get("date"))
    day, found = day_of(request, wanted, asked)
    links = {}
    if day is not None and day > date.min:
        earlier = lists.latest_day(request.app.state.site.store, wanted, day - timedelta(days=1))
        if earlier is not None:
            links["prev-archive"] = address(f"/feed/arxiv/{wanted}", date=earlier)
    if asked is not None:
        links["current"] = address(f"/feed/arxiv/{wanted}")
    title = f"{wanted}, {day}" if day else str(wanted)
    page = address(f"/arxiv/{wanted}", date=asked)
    return _papers(request, title, page, found, links, _midnight(day), archive=asked is not None)


@router.get("/feed/venue/latest")
def venues(request: Request) -> Response:
    """The venues that were added last."""
    store, table = request.app.state.site.store, schema.venue
    query = select(table.c.name, table.c.year, table.c.added_at).order_by(table.c.added_at.desc(), table.c.name)
    counts = {(venue.name, venue.year): venue.count for venue in lists.venues(store)}
    with store.reading() as connection:
        rows = connection.execute(query.limit(VENUES)).all()
    base = security.base(request)
    root = _root(request, "Venues", "/#venues", {})
    _text(root, "updated", _stamp(max((row.added_at.replace(tzinfo=UTC) for row in rows), default=_BEGINNING)))
    for row in rows:
        entry = SubElement(root, "entry")
        page = base + address(f"/venue/{row.name}.{row.year}")
        _text(entry, "id", page)
        _text(entry, "title", f"{row.name} {row.year}: {counts.get((row.name, row.year), 0)} papers")
        SubElement(entry, "link", rel="alternate", type="text/html", href=page)
        _text(entry, "updated", _stamp(row.added_at.replace(tzinfo=UTC)))
    return _answer(request, root)


@router.get("/feed/venue/{slug}")
def venue(request: Request, slug: str) -> Response:
    """The papers of a venue, of one group or of all; without a year, of its latest."""
    found = find_venue(request, slug)
    group = request.query_params.get("group") or None
    title = f"{found.name} {found.year}" + (f", {group[:80]}" if group else "")
    page = address(f"/venue/{found.slug}", group=group)
    return _papers(request, title, page, venue_papers(request, found, group), {})


@router.get("/feed/search")
def search(request: Request) -> Response:
    """The papers that a search finds, newest first."""
    text, branch = request.query_params.get("query", "")[:2000], request.query_params.get("branch", "arxiv")
    if branch not in ("arxiv", "venue"):
        raise BadRequest("branch must be arxiv or venue", branch[:200])
    security.limit(request, "search")
    hits = request.app.state.site.index.search(text, sort="date", branch=branch)
    page = address(f"/{branch}/search", query=text, sort="date")
    return _papers(request, f"Search: {text}", page, hits.keys, {}, most=SEARCHED)


def read_expression(text: str) -> Expression:
    """The subjects that a reader asks for.

    Raises:
        BadRequest: text that is no expression.
    """
    try:
        return parse_expression(text)
    except InvalidExpression as error:
        raise BadRequest(str(error), error.rest[:200]) from None


def find_venue(request: Request, slug: str) -> lists.Venue:
    """The venue of an address: ``NAME.YEAR``, or ``NAME`` for its latest year; its case does not matter.

    Raises:
        Unknown: there is none.
    """
    match = SLUG.match(slug)
    known: list[lists.Venue] = request.app.state.cache.get("venues", lambda: lists.venues(request.app.state.site.store))
    # They come newest first.
    for each in known:
        named = match is not None and each.name.casefold() == match["name"].casefold()
        if match is not None and named and match["year"] in (None, str(each.year)):
            return each
    raise Unknown(f"This site has no venue {slug[:80]}.", (("All venues", "/#venues"),))


def venue_papers(request: Request, venue: lists.Venue, group: str | None) -> PaperList:
    """The papers of a venue in its own order.

    Raises:
        BadRequest: a group that it has not.
        Unknown: it has gone meanwhile.
    """
    if group is not None and group not in venue.groups:
        known = ", ".join(sorted(name for name in venue.groups if name)) or "none"
        raise BadRequest(f"{venue.slug} has no such group; it has: {known}", group[:200])
    found = lists.venue_list(request.app.state.site.store, venue.name, venue.year, group)
    if found is None:
        raise Unknown(f"This site has no venue {venue.slug}.")
    return found


def _papers(
    request: Request,
    title: str,
    page: str,
    found: PaperList | Sequence[int],
    links: dict[str, str],
    earliest: datetime = _BEGINNING,
    archive: bool = False,
    most: int = MOST,
) -> Response:
    """A feed of papers; what does not fit into one document is linked as the next one."""
    keys = [entry.pk for entry in found.entries] if isinstance(found, PaperList) else list(found)
    after = read(request.query_params, ("", "date")).after
    if after + most < len(keys):
        query = {**request.query_params, "after": after + most}
        links = {**links, "next": f"{quote(request.url.path, safe='/+,.-@')}?{urlencode(query)}"}
    papers = lists.papers(request.app.state.site.store, keys[after : after + most])
    root = _root(request, title, page, links)
    # The newest thing in it, and not the time of the request: the same feed is the same text.
    _text(root, "updated", _stamp(max([earliest, *map(_moment, papers)])))
    if archive:
        SubElement(root, "fh:archive", {"xmlns:fh": HISTORY})
    base = security.base(request)
    for paper in papers:
        _entry(root, paper, base)
    return _answer(request, root)


def _root(request: Request, title: str, page: str, links: dict[str, str]) -> Element:
    base = security.base(request)
    own = base + quote(request.url.path, safe="/+,.-@") + (f"?{request.url.query}" if request.url.query else "")
    root = Element("feed", xmlns=ATOM)
    _text(root, "id", own)
    _text(root, "title", title)
    _text(SubElement(root, "author"), "name", "danlu papers")
    SubElement(root, "link", rel="self", type="application/atom+xml", href=clean(own))
    SubElement(root, "link", rel="alternate", type="text/html", href=base + page)
    for relation, path in links.items():
        SubElement(root, "link", rel=relation, type="application/atom+xml", href=base + path)
    return root


def _entry(root: Element, paper: Paper, base: str) -> None:
    entry = SubElement(root, "entry")
    page = base + papers_url([paper.paper])
    # The source's own address is the same on every site, and under every name of this one.
    _text(entry, "id", ids.abs_url(paper.paper) or page)
    _text(entry, "title", paper.title)
    SubElement(entry, "link", rel="alternate", type="text/html", href=page)
    pdf = web_address(paper.pdf_url)
    if pdf:
        SubElement(entry, "link", rel="related", type="application/pdf", href=clean(pdf))
    for name in paper.authors:
        _text(SubElement(entry, "author"), "name", name)
    for code in shown(paper.categories):
        SubElement(entry, "category", term=clean(code))
    if paper.submitted_at is not None:
        _text(entry, "published", _stamp(paper.submitted_at.replace(tzinfo=UTC)))
    _text(entry, "updated", _stamp(_moment(paper)))
    _text(entry, "summary", paper.abstract)


def _answer(request: Request, root: Element) -> Response:
    body = tostring(root, encoding="utf-8", xml_declaration=True)
    # Weak, because the answer may be compressed on its way.
    mark = f'W/"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {"ETag": mark, "Cache-Control": "max-age=300"}
    if mark in [part.strip() for part in request.headers.get("If-None-Match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/atom+xml; charset=utf-8", headers=headers)


def _text(parent: Element, name: str, text: str) -> None:
    SubElement(parent, name).text = clean(text)


def _moment(paper: Paper) -> datetime:
    moment = paper.updated_at or paper.submitted_at
    return moment.replace(tzinfo=UTC) if moment else _midnight(paper.announced_on)


def _midnight(day: date | None) -> datetime:
    return datetime.combine(day, time(), UTC) if day else _BEGINNING


def _stamp(moment: datetime) -> str:
    return moment.replace(microsecond=0).isoformat().replace("+00:00", "Z")
