"""Daily lists of a subject expression; the same address also takes identifiers of papers."""

from __future__ import annotations

import re
from datetime import date, timedelta
from typing import Any

from fastapi import APIRouter
from sqlalchemy import func, select
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from danlu.papers import lists, schema
from danlu.papers.categories import Expression, InvalidExpression, parse_expression
from danlu.papers.rows import Entry, PaperList
from danlu.papers.web import ordering, singles
from danlu.papers.web.errors import BadRequest
from danlu.papers.web.rendering import is_fragment
from danlu.papers.web.views import address, views

router = APIRouter(include_in_schema=False)
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}\Z")
_OPERATOR = re.compile(r"\s*([,+-])\s*")


@router.get("/arxiv")
@router.get("/arxiv/")
def chosen(request: Request) -> Response:
    """The list of the subjects that were chosen in a form."""
    query = request.query_params
    text = _OPERATOR.sub(r"\1", query.get("subjects", "").strip())
    # Where somebody wrote the address by hand, a plus has become a space.
    parts = [re.sub(r"\s+", "+", text)] if text else []
    joined = "+".join([*parts, *query.getlist("include")]) + "".join(f"-{name}" for name in query.getlist("exclude"))
    if not joined:
        return RedirectResponse("/", 302)
    return RedirectResponse(address(f"/arxiv/{_expression(joined)}", date=query.get("date", "")), 302)


@router.get("/arxiv/{rest:path}")
async def arxiv(request: Request, rest: str) -> Response:
    """The list of a subject expression, or the papers with these identifiers."""
    try:
        expression = parse_expression(rest)
    except InvalidExpression as error:
        if not any(character.isdigit() for character in rest):
            raise BadRequest(str(error), error.rest) from None
        return await singles.papers_page(request, rest)
    return await run_in_threadpool(day_page, request, expression, rest)


def _expression(text: str) -> Expression:
    try:
        return parse_expression(text)
    except InvalidExpression as error:
        raise BadRequest(str(error), error.rest) from None


def read_day(text: str | None) -> date | None:
    """The day that a reader asks for.

    Raises:
        BadRequest: it is none.
    """
    if not text:
        return None
    try:
        if _DATE.match(text):
            return date.fromisoformat(text)
    except ValueError:
        pass
    raise BadRequest("date must be a day such as 2024-05-17", text)


def day_page(request: Request, expression: Expression, written: str) -> Response:
    """The list of one day."""
    site, cache = request.app.state.site, request.app.state.cache
    day, asked = read_day(request.query_params.get("date")), ordering.read(request.query_params)
    if str(expression) != written:
        target = address(f"/arxiv/{expression}") + (f"?{request.url.query}" if request.url.query else "")
        return RedirectResponse(target, 301)
    name = str(expression)
    day, found = day_of(request, expression, day, asked.snapshot)
    values = list_values(request, found, asked, f"/arxiv/{name}", date=day)
    if is_fragment(request):
        return request.app.state.pages.render(request, "_cards.html", **values)
    days = cache.get(("days", name), lambda: lists.days(site.store, expression))
    earlier, later = cache.get(("around", name, day), lambda: _around(request, expression, day))
    return request.app.state.pages.render(
        request, "list.html", expression=expression, day=day, days=days, earlier=earlier, later=later,
        total=len(found.entries), late=sum(entry.late for entry in found.entries),
        crosses=sum(entry.kind == "cross" for entry in found.entries), **values,
    )  # fmt: skip


def day_of(
    request: Request, expression: Expression, asked: date | None, snapshot: int | None = None
) -> tuple[date | None, PaperList]:
    """The day asked for or the latest one, and its list; no day where nothing has been announced."""
    store, cache, name = request.app.state.site.store, request.app.state.cache, str(expression)
    day = asked or cache.get(("latest", name), lambda: lists.latest_day(store, expression))
    if day is None:
        return None, PaperList(())
    key = ("list", name, day, snapshot)
    lasting = snapshot is not None
    return day, cache.get(key, lambda: lists.day_list(store, expression, day, snapshot), lasting=lasting)


def _around(request: Request, expression: Expression, day: date | None) -> tuple[date | None, date | None]:
    """The nearest days with a list before and after this one."""
    if day is None:
        return None, None
    store, table = request.app.state.site.store, schema.listing
    earlier = lists.latest_day(store, expression, day - timedelta(days=1)) if day > date.min else None
    wanted, _ = expression.codes()
    query = select(func.min(table.c.announced_on)).where(table.c.cat.in_(sorted(wanted)), table.c.announced_on > day)
    with store.reading() as connection:
        return earlier, connection.scalar(query.where(table.c.kind.in_(lists.ANNOUNCED)))


def list_values(
    request: Request, found: PaperList, asked: ordering.Asked, path: str, marked: tuple[str, ...] = (), **query: Any
) -> dict[str, Any]:
    """What the template of cards needs for one chunk of a list, and the address of the next one.

    Args:
        request: that is answered.
        found: the whole list.
        asked: which part, in which order.
        path: of the list.
        marked: words to mark.
        **query: parameters that belong to the list.
    """
    site = request.app.state.site
    keys = [entry.pk for entry in found.entries]
    order, head = ordering.arrange(site.store, site.index, keys, asked)
    chunk: list[Entry] = [found.entries[place] for place in order[asked.after : asked.after + asked.show]]
    end = asked.after + len(chunk)
    show = asked.show if asked.show != ordering.CHUNK else ""
    kept = {"sort": asked.sort, "words": asked.words, "show": show, **query}
    following = None
    if chunk and end < len(keys):
        place = {"after": end, "snapshot": found.snapshot, "head": ".".join(map(str, head)) if head else ""}
        following = address(path, **kept, **place)
    return {
        "rows": views(site.store, chunk, asked.after + 1),
        "following": following,
        "asked": asked,
        "path": path,
        "query": query,
        "marked": marked,
    }
