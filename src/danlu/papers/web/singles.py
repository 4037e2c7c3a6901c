"""Pages of single papers: any number of identifiers in one address."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from danlu.papers import ids, lists
from danlu.papers.ids import ARXIV, InvalidIdentifier, PaperId, parse_id
from danlu.papers.net.errors import FetchError
from danlu.papers.rows import Entry, Paper
from danlu.papers.store import Store
from danlu.papers.web import ordering, security
from danlu.papers.web.answers import card_values
from danlu.papers.web.errors import BadRequest, Unknown
from danlu.papers.web.rendering import is_fragment
from danlu.papers.web.views import MOST_BYTES, MOST_IDS, papers_url, views

logger = logging.getLogger("danlu.papers.web")


def read_ids(text: str) -> list[PaperId]:
    """The identifiers in an address, each once.

    Raises:
        BadRequest: one that is none, or too many.
    """
    if len(text.encode()) > MOST_BYTES:
        raise BadRequest(f"an address of papers has at most {MOST_BYTES} bytes", text[:40])
    found: dict[PaperId, None] = {}
    for part in text.split(","):
        try:
            found[parse_id(part)] = None
        except InvalidIdentifier as error:
            raise BadRequest(str(error), part[:200]) from None
    if len(found) > MOST_IDS:
        raise BadRequest(f"an address names at most {MOST_IDS} papers, this one {len(found)}", text[:40])
    return list(found)


def stored(request: Request, text: str) -> Paper:
    """The stored paper with this identifier; its version does not matter.

    Raises:
        BadRequest: no identifier.
        Unknown: none that is stored.
    """
    paper = read_ids(text)[0]
    store = request.app.state.site.store
    held = lists.papers(store, list(lists.find(store, [paper]).values()))
    if not held:
        raise Unknown(f"This site does not have {paper}.", source_links([paper]))
    return held[0]


def source_links(papers: Sequence[PaperId]) -> tuple[tuple[str, str], ...]:
    """Where to look for papers that are not here."""
    found = [(f"{paper} at {ids.SOURCES[paper.source].name}", ids.abs_url(paper)) for paper in papers]
    return tuple((text, address) for text, address in found if address is not None)


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
    branch = request.url.path.split("/")[1]
    return f"/{branch}/" + quote(text, safe="@/,+:~-._")


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
