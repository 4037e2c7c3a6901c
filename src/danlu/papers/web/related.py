"""Papers like one paper."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from danlu.papers.rows import Entry, PaperList
from danlu.papers.web import ordering, security
from danlu.papers.web.answers import find
from danlu.papers.web.lists import list_values
from danlu.papers.web.rendering import is_fragment

router = APIRouter(include_in_schema=False)


@router.get("/rel/{paper_id:path}")
def related(request: Request, paper_id: str) -> Response:
    """Papers that share the keywords of this one."""
    site = request.app.state.site
    security.limit(request, "search")
    paper, asked = find(request, paper_id)[0], ordering.read(request.query_params)
    keywords = site.index.keywords(paper)
    hits = site.index.related(paper)
    found = PaperList(tuple(Entry(key) for key in hits.keys))
    values = list_values(request, found, asked, f"/rel/{paper.paper}")
    if is_fragment(request):
        return request.app.state.pages.render(request, "_cards.html", **values)
    return request.app.state.pages.render(
        request, "related.html", paper=paper, keywords=[keyword.term for keyword in keywords], total=hits.total,
        partial=hits.partial, **values,
    )  # fmt: skip
