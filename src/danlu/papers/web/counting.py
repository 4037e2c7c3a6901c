"""Counting openings of papers, and telling the browser what a paper is about: its reader's word cloud is kept there."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import cast

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from danlu.papers import counters
from danlu.papers.web import security
from danlu.papers.web.answers import find
from danlu.papers.web.errors import BadRequest

router = APIRouter(include_in_schema=False)


@router.post("/count/{paper_id:path}")
async def count(request: Request, paper_id: str) -> Response:
    """Count an opening; the answer has the new count and the paper's keywords."""
    await security.require(request)
    security.limit(request, "count")
    kind = (await security.form(request)).get("kind", "")
    if kind not in counters.COUNTED:
        raise BadRequest(f"kind must be one of {', '.join(counters.COUNTED)}", kind[:40])
    return await run_in_threadpool(_count, request, paper_id, cast(counters.Counted, kind))


def _count(request: Request, paper_id: str, kind: counters.Counted) -> Response:
    site = request.app.state.site
    paper, _ = find(request, paper_id)
    today = datetime.now(UTC).date()
    digest = counters.reader_digest(site.store, security.client(request), today)
    total = counters.count(site.store, paper.pk, kind, today, digest)
    words = [[keyword.term, round(keyword.weight, 3)] for keyword in site.index.keywords(paper)]
    return JSONResponse({"kind": kind, "count": total, "keywords": words})
