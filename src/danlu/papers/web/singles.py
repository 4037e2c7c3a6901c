"""Pages of single papers: any number of identifiers in one address."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from danlu.papers import lists
from danlu.papers.ids import ARXIV, PaperId
from danlu.papers.net.errors import FetchError
from danlu.papers.rows import Entry
from danlu.papers.store import Store
from danlu.papers.web import ordering, security
from danlu.papers.web.answers import card_values
from danlu.papers.web.errors import Unknown
from danlu.papers.web.exports import read_ids
from danlu.papers.web.rendering import is_fragment
from danlu.papers.web.views import papers_url, quoted, source_links, views

logger = logging.getLogger("danlu.papers.web")


async def papers_page(request: Request, text: str) -> Response:
    """The page of these papers: they are fetched where they are not stored, and a source has them."""
    papers = read_ids(text)
    asked = ordering.read(request.query_params, ("",))
    if papers_url(papers) != papers_url_of(request, text):
        query = f"?{request.url.query}" if request.url.query else ""
        return RedirectResponse(papers_url(papers) + query, 301)
    store = request.app.state.site.store
    found = await run_in_threadpool(lists.find, store, papers)
    known = await run_in_threadpool(_latest, store, list(found.values()))
    missing = [
        paper for paper in papers
        if paper not in found or (paper.version or 0) > (known.get(found[paper]) or 10**9)
    ]  # fmt: skip
    trouble = await _fetch(request, [paper for paper in missing if paper.source == ARXIV]) if missing else ""
    return await run_in_threadpool(_page, request, papers, asked, trouble)


def papers_url_of(request: Request, text: str) -> str:
    """The address as it was asked for, quoted as ours are."""
    return f"/{request.url.path.split('/')[1]}/" + quoted(text)


async def _fetch(request: Request, papers: list[PaperId]) -> str:
    """Bring papers that are not stored; why that was not possible, or nothing."""
    site = request.app.state.site
    if not papers:
        return ""
    if site.fetcher is None:
        return "This site does not ask arXiv for papers that it does not have."
    from danlu.papers.sources.polling import fetch_papers

    security.limit(request, "fetch")
    names = list(dict.fromkeys(paper.identifier for paper in papers))
    try:
        await asyncio.wait_for(fetch_papers(site.store, site.fetcher, names), 20)
        await run_in_threadpool(site.index.update, site.store)
    except FetchError as error:
        logger.warning("cannot fetch %s: %s", names, error)
        return f"arXiv could not be asked: {error}"
    except (ValueError, TimeoutError) as error:
        logger.warning("cannot fetch %s: %r", names, error)
        return "arXiv did not give an answer that can be read."
    return ""


def _latest(store: Store, keys: list[int]) -> dict[int, int | None]:
    return {paper.pk: paper.version for paper in lists.papers(store, keys)}


def _page(request: Request, papers: list[PaperId], asked: ordering.Asked, trouble: str) -> Response:
    site = request.app.state.site
    found = lists.find(site.store, papers)
    known = _latest(site.store, list(found.values()))
    there = [
        paper for paper in papers
        if paper in found and (paper.version or 0) <= (known.get(found[paper]) or 10**9)
    ]  # fmt: skip
    missing = [paper for paper in papers if paper not in there]
    if not there:
        names = ", ".join(map(str, missing[:5])) + (" and more" if len(missing) > 5 else "")
        message = f"This site does not have {names}. {trouble}".strip()
        latest = [f"{paper.identifier} has {known[found[paper]]} versions here." for paper in missing if paper in found]
        raise Unknown(" ".join([message, *latest]), source_links(missing))
    part = there[asked.after : asked.after + asked.show]
    # Two versions of one paper may stand in one address: the paper is read once.
    full = {row.paper.pk: row for row in views(site.store, [Entry(key) for key in {found[paper] for paper in part}])}
    rows = [
        replace(full[found[paper]], number=asked.after + place, version=paper.version)
        for place, paper in enumerate(part, 1)
    ]
    end = asked.after + len(part)
    following = f"{papers_url(papers)}?after={end}" if end < len(there) else None
    values: dict[str, Any] = {"rows": rows, "following": following, "marked": (), "asked": asked}
    if is_fragment(request):
        return request.app.state.pages.render(request, "_cards.html", **values)
    single = rows[0] if len(papers) == 1 else None
    if single is not None:
        values.update(card_values(request, single.paper, single.version, request.query_params.get("lang")))
        values["versions"] = lists.versions(site.store, single.paper.pk)
    return request.app.state.pages.render(
        request, "papers.html", single=single, missing=source_links(missing), lost=[str(paper) for paper in missing],
        trouble=trouble, ids=",".join(str(paper) for paper in there), total=len(there), **values,
    )  # fmt: skip
