"""Answer cards: reading one starts nothing, asking needs a POST, and a running answer is followed as events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter
from sqlalchemy import func, select
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from danlu.papers import lists, schema
from danlu.papers.answer.questions import questions
from danlu.papers.cards import KIND, Card
from danlu.papers.ids import InvalidIdentifier, PaperId, parse_id
from danlu.papers.jobs import HISTORY, TODAY, TOKEN
from danlu.papers.rows import Paper
from danlu.papers.web import security
from danlu.papers.web.errors import BadRequest, Unknown
from danlu.papers.web.markdown import to_html
from danlu.papers.web.rendering import is_fragment
from danlu.papers.web.views import papers_url, source_links, web_address

router = APIRouter(include_in_schema=False)
_STREAM = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}


def find(request: Request, text: str) -> tuple[Paper, PaperId]:
    """The stored paper of an identifier, and the identifier.

    Raises:
        BadRequest: no identifier.
        Unknown: none that is stored.
    """
    try:
        paper = parse_id(text)
    except InvalidIdentifier as error:
        raise BadRequest(str(error), text[:200]) from None
    store = request.app.state.site.store
    held = lists.papers(store, list(lists.find(store, [paper]).values()))
    if not held:
        raise Unknown(f"This site does not have {paper}.", source_links([paper]))
    return held[0], paper


def read_lang(request: Request, text: str | None) -> str:
    """A language of answers; the first that the site has unless given.

    Raises:
        BadRequest: one that it has not.
    """
    known = request.app.state.site.settings.languages
    if text and text not in known:
        raise BadRequest(f"answers here are in {', '.join(known)}", text[:40])
    return text or known[0]


def read_version(text: str | None, paper: Paper, named: PaperId) -> int | None:
    """The version asked about; None: the latest.

    Raises:
        BadRequest: no version of this paper.
    """
    if not text:
        number = named.version
    elif text.isascii() and text.isdigit() and len(text) < 6:
        number = int(text) or None
    else:
        raise BadRequest("v must be the number of a version", text[:40])
    if number is not None and paper.version is not None and number > paper.version:
        raise BadRequest(f"{paper.paper} has {paper.version} versions here", str(number))
    return number


def card_values(request: Request, paper: Paper, version: int | None, lang: str | None) -> dict[str, Any]:
    """What the template of a card needs."""
    site = request.app.state.site
    chosen = read_lang(request, lang)
    card: Card | None = site.cards.get(paper, version, chosen) if site.engine is not None else None
    newest = version or paper.version or 0
    older = [] if site.engine is None else [v for v in site.cards.versions(paper.pk, chosen) if v < newest]
    if card is None and version is None and older:
        # Better the answers on an earlier version, marked as such, than none.
        card = site.cards.get(paper, older[-1], chosen)
    answered = {answer.q: answer for answer in card.answers} if card else {}
    asked = [
        {
            "number": question.number,
            "text": question.text,
            "html": to_html(answered[question.number].text) if question.number in answered else None,
            "places": _places(answered[question.number].sources) if question.number in answered else [],
        }
        for question in questions(chosen)
    ]
    times = [answer.created_at for answer in answered.values() if answer.created_at is not None]
    return {
        "card": card,
        "card_paper": paper,
        "asked_questions": asked,
        "card_day": max(times, default=None),
        "card_lang": chosen,
        "engine_label": site.engine.label if site.engine is not None else "",
        "extracts": site.engine is not None and site.engine.name == "extractive",
        "ahead": site.queue.ahead(card.job) if card and card.job else 0,
        "chat": _chat(request, paper),
    }


def _places(sources: list[dict[str, Any]]) -> list[str]:
    """Where the quotes of an answer stand, each place once."""
    found: dict[str, None] = {}
    for source in sources:
        section, page = str(source.get("section") or ""), source.get("page") or 0
        place = ", ".join(part for part in (section, f"page {page}" if page else "") if part)
        if place:
            found[place] = None
    return list(found)


def _chat(request: Request, paper: Paper) -> str:
    """The address of a general chat that knows what it is about; empty where the operator has set none."""
    template = request.app.state.site.settings.chat_url
    if not template:
        return ""
    here = security.base(request) + papers_url([paper.paper])
    prompt = f"I have questions about the paper {paper.title!r}. PDF: {paper.pdf_url or paper.abs_url} Summary: {here}"
    return web_address(template.replace("{prompt}", quote(prompt, safe=""))) or ""


@router.get("/answers/{paper_id:path}/stream")
async def stream(request: Request, paper_id: str) -> Response:
    """A running answer as server-sent events; whoever lost the connection names the last event that it has."""
    site = request.app.state.site
    paper, _ = await run_in_threadpool(find, request, paper_id)
    number = request.query_params.get("job", "")
    if not (number.isascii() and number.isdigit() and len(number) < 19):
        raise BadRequest("job must be the number of a job", number[:40])
    job = await run_in_threadpool(site.queue.get, int(number))
    if job is None or job.kind != KIND or job.payload.get("pk") != paper.pk:
        raise Unknown(f"There is no job {number} for {paper.paper}.")
    last = request.headers.get("Last-Event-ID") or request.query_params.get("after") or "0"
    after = int(last) if last.isascii() and last.isdigit() and len(last) < 19 else 0
    return StreamingResponse(_events(request, job.id, after), media_type="text/event-stream", headers=_STREAM)


async def _events(request: Request, job_id: int, after: int) -> AsyncIterator[str]:
    # Should the connection break, the browser comes back after a second.
    yield "retry: 1000\n\n"
    async for event in request.app.state.site.streams.follow(job_id, after):
        if event.kind == "beat":
            yield ": still here\n\n"
            continue
        number = f"id: {event.id}\n" if event.id else ""
        yield f"{number}event: {event.kind}\ndata: {json.dumps(event.data)}\n\n"


@router.get("/answers/{paper_id:path}")
def read(request: Request, paper_id: str) -> Response:
    """The card of a paper as a fragment; nothing where nobody has asked yet."""
    paper, named = find(request, paper_id)
    version = read_version(request.query_params.get("v"), paper, named)
    values = card_values(request, paper, version, request.query_params.get("lang"))
    if values["card"] is None:
        return Response(status_code=204)
    return request.app.state.pages.render(request, "_answers.html", **values)


@router.post("/answers/{paper_id:path}")
async def ask(request: Request, paper_id: str) -> Response:
    """Ask the questions about a paper; who asks for what is being answered joins in."""
    await security.require(request)
    site = request.app.state.site
    if site.engine is None:
        raise Unknown("This site answers no questions.")
    form = await security.form(request)
    paper, named = await run_in_threadpool(find, request, paper_id)
    lang = read_lang(request, form.get("lang"))
    version = read_version(form.get("v"), paper, named)
    card = await run_in_threadpool(site.cards.get, paper, version, lang)
    if card is None or not (card.complete or (card.job is not None and card.job.live)):
        # Joining a running job costs nothing, so that only new work counts.
        security.limit(request, "ask")
        prio = await run_in_threadpool(_priority, request, paper)
        await run_in_threadpool(site.cards.ask, paper, version, lang, prio)
    if not is_fragment(request):
        return RedirectResponse(papers_url([named]), 303)
    values = await run_in_threadpool(card_values, request, paper, version or paper.version, lang)
    return request.app.state.pages.render(request, "_answers.html", 202, **values)


def _priority(request: Request, paper: Paper) -> int:
    site, cache = request.app.state.site, request.app.state.cache
    if security.is_admin(request):
        return TOKEN

    def newest() -> object:
        with site.store.reading() as connection:
            return connection.scalar(select(func.max(schema.listing.c.announced_on)))

    return TODAY if paper.announced_on is not None and paper.announced_on == cache.get("newest", newest) else HISTORY
