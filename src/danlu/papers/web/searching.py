"""Search pages. Nothing that can be typed is an error."""

from __future__ import annotations

import re

from fastapi import APIRouter
from sqlalchemy import func, select
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from danlu.papers import schema
from danlu.papers.ids import InvalidIdentifier, PaperId, find_arxiv_ids, parse_id
from danlu.papers.rows import Entry, PaperList
from danlu.papers.search import Hits, parse_query
from danlu.papers.web import ordering, security
from danlu.papers.web.lists import list_values
from danlu.papers.web.rendering import is_fragment
from danlu.papers.web.views import MOST_IDS, papers_url

router = APIRouter(include_in_schema=False)
#: Orders of results: those of the index, and those of lists.
SORTS = ("", "date", "stars", "preference")
_PAGES = (
    (re.compile(r"https?://openreview\.net/(?:forum|pdf)\?(?:.*&)?id=([A-Za-z0-9_-]+)"), "{}@OpenReview"),
    (re.compile(r"https?://(?:www\.)?aclanthology\.org/([0-9A-Z][0-9A-Za-z.-]+?)(?:\.pdf|/)?\Z"), "{}@ACL"),
)
_DOI = re.compile(r"(?:https?://(?:dx\.)?doi\.org/|doi:)?(10\.[0-9]{4,9}/\S+)\Z", re.IGNORECASE)


@router.get("/arxiv/search")
def arxiv(request: Request) -> Response:
    """Search among the papers of arXiv."""
    return _search(request, "arxiv")


@router.get("/venue/search")
def venue(request: Request) -> Response:
    """Search among the papers of venues."""
    return _search(request, "venue")


def _search(request: Request, branch: str) -> Response:
    site, cache = request.app.state.site, request.app.state.cache
    text = request.query_params.get("query", "")[:2000]
    asked = ordering.read(request.query_params, SORTS)
    named = pasted(request, text)
    if named:
        return RedirectResponse(papers_url(named), 302)
    parsed = parse_query(text)
    hits = Hits()
    if not parsed.empty:
        security.limit(request, "search")
        how = "date" if asked.sort == "date" else "relevance"
        hits = cache.get(("search", branch, text, how), lambda: site.index.search(text, sort=how, branch=branch))
    # Papers that came after the first chunk would move the others: they wait for the next search.
    newest = asked.snapshot if asked.snapshot is not None else _newest(request)
    found = PaperList(tuple(Entry(key) for key in hits.keys if key <= newest), newest)
    marks = request.query_params.get("highlight", "1") != "0"
    order = asked if asked.sort != "date" else ordering.Asked("", asked.show, "", asked.after, asked.snapshot)
    values = list_values(
        request, found, order, f"/{branch}/search", parsed.highlighted() if marks else (), query=text,
        highlight="" if marks else "0", **({"sort": "date"} if asked.sort == "date" else {}),
    )  # fmt: skip
    if is_fragment(request):
        return request.app.state.pages.render(request, "_cards.html", **values)
    return request.app.state.pages.render(
        request, "search.html", branch=branch, text=text, parsed=parsed, total=len(found.entries),
        partial=hits.partial, marks=marks, **{**values, "asked": asked},
    )  # fmt: skip


def _newest(request: Request) -> int:
    with request.app.state.site.store.reading() as connection:
        return int(connection.scalar(select(func.max(schema.paper.c.pk))) or 0)


def pasted(request: Request, text: str) -> list[PaperId]:
    """The papers that a query names, where it is nothing but identifiers and addresses of papers."""
    found: list[PaperId] = []
    for part in text.replace(",", " ").split()[: MOST_IDS + 1]:
        paper = _named(request, part)
        if paper is None:
            return []
        found.append(paper)
    return list(dict.fromkeys(found))[:MOST_IDS]


def _named(request: Request, part: str) -> PaperId | None:
    for pattern, template in _PAGES:
        match = pattern.match(part)
        if match:
            return _parsed(template.format(match.group(1)))
    if "@" in part or re.match(r"[a-z-]+(?:\.[A-Z]{2})?/[0-9]{7}|[0-9]{4}\.[0-9]{4,5}(?:v[0-9]+)?\Z", part):
        return _parsed(part)
    arxiv_ids = find_arxiv_ids(part)
    if len(arxiv_ids) == 1:
        return PaperId("arxiv", arxiv_ids[0].identifier, None, arxiv_ids[0].version)
    match = _DOI.match(part)
    if match:
        table = schema.paper
        query = select(table.c.source, table.c.ext_id).where(table.c.doi == match.group(1).replace("\x00", "")).limit(1)
        with request.app.state.site.store.reading() as connection:
            row = connection.execute(query).first()
        if row is not None:
            identifier, _, volume = row.ext_id.partition("@")
            return PaperId(row.source, identifier, volume or None)
    return None


def _parsed(text: str) -> PaperId | None:
    try:
        return parse_id(text)
    except InvalidIdentifier:
        return None
