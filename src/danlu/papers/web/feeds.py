"""Atom feeds of every list: a subject, a venue, the venues added last, a search."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, time
from urllib.parse import quote
from xml.etree.ElementTree import Element, SubElement, tostring

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from danlu.papers import lists
from danlu.papers.categories import InvalidExpression, parse_expression, shown
from danlu.papers.rows import Paper
from danlu.papers.web import security
from danlu.papers.web.errors import BadRequest, Unknown
from danlu.papers.web.views import web_address

router = APIRouter()

_ATOM = "http://www.w3.org/2005/Atom"
#: Entries of a search's feed, and venues in the feed of venues.
SEARCHED, VENUES = 100, 50
_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)


@router.get("/feed/arxiv/{expression}")
def subject(request: Request, expression: str) -> Response:
    """The latest list of a subject, in the order of its page."""
    try:
        wanted = parse_expression(expression)
    except InvalidExpression as error:
        raise BadRequest(str(error), error.rest[:60]) from error
    store = request.app.state.site.store
    day = lists.latest_day(store, wanted)
    found = lists.day_list(store, wanted, day) if day else None
    papers = lists.papers(store, [entry.pk for entry in found.entries]) if found else []
    title = f"{wanted}, {day.isoformat()}" if day else str(wanted)
    return _feed(request, title, f"/arxiv/{quote(str(wanted), safe='+-.,')}", papers, _midnight(day))


@router.get("/feed/venue/latest")
def venues(request: Request) -> Response:
    """The venues, newest first."""
    root, base = _root(request, "Venues", "/")
    listed = lists.venues(request.app.state.site.store)[:VENUES]
    for venue in listed:
        address = f"{base}/venue/{quote(venue.slug)}"
        entry = SubElement(root, "entry")
        _text(entry, "id", address)
        _text(entry, "title", f"{venue.name} {venue.year}: {venue.count} papers")
        SubElement(entry, "link", {"rel": "alternate", "href": address})
        _text(entry, "updated", _stamp(datetime(venue.year, 1, 1, tzinfo=UTC)))
    newest = max((venue.year for venue in listed), default=1970)
    return _answer(root, datetime(newest, 1, 1, tzinfo=UTC))


@router.get("/feed/venue/{slug}")
def venue(request: Request, slug: str) -> Response:
    """The papers of a venue, in the order of its page."""
    name, dot, year = slug.rpartition(".")
    store = request.app.state.site.store
    known = year.isascii() and year.isdigit() and len(year) == 4
    found = lists.venue_list(store, name, int(year)) if dot and known else None
    if found is None:
        raise Unknown(f"There is no venue {slug[:80]}.")
    papers = lists.papers(store, [entry.pk for entry in found.entries])
    return _feed(request, f"{name} {year}", f"/venue/{quote(slug)}", papers, _newest(papers))


@router.get("/feed/search")
def search(request: Request, query: str = "", branch: str = "arxiv") -> Response:
    """The newest papers that a search finds."""
    if branch not in ("arxiv", "venue"):
        raise BadRequest("branch must be arxiv or venue", branch[:60])
    security.limit(request, "search")
    site = request.app.state.site
    hits = site.index.search(query, SEARCHED, sort="date", branch=branch)
    papers = lists.papers(site.store, hits.keys)
    path = f"/{branch}/search?query={quote(query, safe='')}"
    return _feed(request, f"Search: {query[:200]}", path, papers, _newest(papers))


def _feed(request: Request, title: str, path: str, papers: Sequence[Paper], updated: datetime) -> Response:
    root, base = _root(request, title, path)
    for paper in papers:
        branch = "arxiv" if paper.paper.source == "arxiv" else "venue"
        address = f"{base}/{branch}/{quote(str(paper.paper), safe='/@.')}"
        entry = SubElement(root, "entry")
        _text(entry, "id", address)
        _text(entry, "title", paper.title)
        SubElement(entry, "link", {"rel": "alternate", "href": address})
        pdf = web_address(paper.pdf_url)
        if pdf:
            SubElement(entry, "link", {"rel": "related", "type": "application/pdf", "href": pdf})
        for name in paper.authors:
            _text(SubElement(entry, "author"), "name", name)
        for code in shown(paper.categories):
            SubElement(entry, "category", {"term": code})
        _text(entry, "updated", _stamp(_moment(paper)))
        if paper.submitted_at:
            _text(entry, "published", _stamp(paper.submitted_at.replace(tzinfo=UTC)))
        _text(entry, "summary", paper.abstract)
    return _answer(root, updated)


def _root(request: Request, title: str, path: str) -> tuple[Element, str]:
    base = (request.app.state.site.settings.public_url or str(request.base_url)).rstrip("/")
    root = Element("feed", {"xmlns": _ATOM})
    _text(root, "id", base + path)
    _text(root, "title", title)
    SubElement(root, "link", {"rel": "alternate", "href": base + path})
    SubElement(
        root,
        "link",
        {"rel": "self", "href": base + request.url.path + (f"?{request.url.query}" if request.url.query else "")},
    )
    _text(SubElement(root, "author"), "name", "danlu papers")
    return root, base


def _answer(root: Element, updated: datetime) -> Response:
    # The time of the newest thing in it, so that the same feed is the same text.
    element = Element("updated")
    element.text = _stamp(updated)
    root.insert(2, element)
    body = b'<?xml version="1.0" encoding="utf-8"?>\n' + tostring(root, encoding="utf-8")
    return Response(body, media_type="application/atom+xml; charset=utf-8")


def _text(parent: Element, name: str, text: str) -> None:
    """An element with text; characters that XML does not have are left out."""
    SubElement(parent, name).text = "".join(
        c
        for c in text
        if c in "\t\n\r" or (ord(c) >= 32 and not 0xD800 <= ord(c) <= 0xDFFF and ord(c) not in (0xFFFE, 0xFFFF))
    )


def _moment(paper: Paper) -> datetime:
    moment = paper.updated_at or paper.submitted_at
    return moment.replace(tzinfo=UTC) if moment else _midnight(paper.announced_on)


def _newest(papers: Sequence[Paper]) -> datetime:
    return max((_moment(paper) for paper in papers), default=_BEGINNING)


def _midnight(day: date | None) -> datetime:
    return datetime.combine(day, time(), UTC) if day else _BEGINNING


def _stamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
