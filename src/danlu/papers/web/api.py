"""The site for programs: JSON for every list, with an OpenAPI document."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.requests import Request

from danlu.papers import lists
from danlu.papers.categories import Expression, InvalidExpression, members, parse_expression, vocabulary
from danlu.papers.ids import InvalidIdentifier, parse_id
from danlu.papers.rows import Entry, Paper
from danlu.papers.web import exports, health, security
from danlu.papers.web.errors import BadRequest, Unknown
from danlu.papers.web.state import Site

router = APIRouter(prefix="/api/v1", tags=["papers"])

#: Papers of one answer.
MOST = 100
Show = Annotated[int, Query(ge=1, le=MOST, description="papers of one answer")]
After = Annotated[int, Query(ge=0, le=1_000_000, description="places to leave out, as next says")]


class PlaceModel(BaseModel):
    """Where a paper was published."""

    name: str
    year: int
    group: str = ""


class PaperModel(BaseModel):
    """A paper; times are UTC, announced_on is the day of its first list."""

    id: str
    version: int | None
    title: str
    abstract: str
    authors: list[str]
    categories: list[str]
    comment: str
    doi: str
    journal_ref: str
    license: str
    submitted_at: str | None
    updated_at: str | None
    announced_on: str | None
    withdrawn: bool
    venues: list[PlaceModel]
    abs_url: str | None
    pdf_url: str | None


class ListedModel(BaseModel):
    """A paper at its place in a list."""

    number: int
    kind: str = ""
    late: bool = False
    group: str = ""
    paper: PaperModel


class ListModel(BaseModel):
    """A part of a list: pass ``snapshot`` and ``next`` back as ``snapshot`` and ``after`` for what follows."""

    title: str
    day: date | None = None
    total: int
    snapshot: int = 0
    next: int | None = None
    partial: bool = False
    papers: list[ListedModel]


class DayModel(BaseModel):
    """A day with lists."""

    day: date
    papers: int


class VenueModel(BaseModel):
    """A venue of one year."""

    name: str
    year: int
    papers: int
    groups: dict[str, int]


class KeywordModel(BaseModel):
    """A word that tells a paper from others."""

    term: str
    weight: float


class CategoryModel(BaseModel):
    """A subject."""

    code: str
    name: str
    group: str
    active: bool


class AnswerModel(BaseModel):
    """One answer of a card, in Markdown."""

    number: int
    text: str
    quotes: list[dict[str, Any]]


class CardModel(BaseModel):
    """What is known about a paper's questions."""

    paper: str
    version: int
    lang: str
    engine: str
    complete: bool
    notes: list[str]
    answers: list[AnswerModel]


@router.get("/openapi.json", include_in_schema=False)
def document(request: Request) -> dict[str, Any]:
    """The OpenAPI document of these routes."""
    return get_openapi(title="danlu papers", version="1", routes=router.routes)


@router.get("/list/{expression}")
def day_list(
    request: Request,
    expression: str,
    day: date | None = None,
    show: Show = 25,
    after: After = 0,
    snapshot: Annotated[int | None, Query(ge=0, le=2**53)] = None,
) -> ListModel:
    """A daily list of a subject expression such as ``cs.AI+cs.LG-cs.CY``; the latest day unless given."""
    wanted, site = _expression(expression), _site(request)
    chosen = day or lists.latest_day(site.store, wanted)
    if chosen is None:
        return ListModel(title=str(wanted), total=0, papers=[])
    found = lists.day_list(site.store, wanted, chosen, snapshot)
    return _part(site, str(wanted), found.entries, show, after, day=chosen, snapshot=found.snapshot)


@router.get("/days/{expression}")
def days(request: Request, expression: str, show: Show = 30, before: date | None = None) -> list[DayModel]:
    """The latest days with lists of a subject, newest first."""
    found = lists.days(_site(request).store, _expression(expression), show, before)
    return [DayModel(day=day, papers=count) for day, count in found]


@router.get("/papers")
def papers(request: Request, ids: str) -> list[PaperModel]:
    """Papers by identifiers between commas; those that are not stored are left out."""
    return [_model(paper) for paper in exports.stored(request, exports.read_ids(ids))]


@router.get("/venues")
def venues(request: Request) -> list[VenueModel]:
    """Every venue, newest year first."""
    found = lists.venues(_site(request).store)
    return [VenueModel(name=v.name, year=v.year, papers=v.count, groups=v.groups) for v in found]


@router.get("/venue/{name}/{year}")
def venue(
    request: Request, name: str, year: int, group: str | None = None, show: Show = 25, after: After = 0
) -> ListModel:
    """The papers of a venue, of one group or of all."""
    site = _site(request)
    found = lists.venue_list(site.store, name, year, group) if 0 <= year <= 9999 else None
    if found is None:
        raise Unknown(f"There is no venue {name[:80]} {year}.")
    return _part(site, f"{name} {year}", found.entries, show, after)


@router.get("/search")
def search(
    request: Request,
    query: str,
    branch: Literal["arxiv", "venue"] | None = None,
    sort: Literal["relevance", "date"] = "relevance",
    show: Show = 25,
    after: After = 0,
) -> ListModel:
    """Papers that match; any text is a query, and at most 1000 are found."""
    security.limit(request, "search")
    site = _site(request)
    hits = site.index.search(query, sort=sort, branch=branch)
    part = _part(site, query, tuple(Entry(key) for key in hits.keys), show, after)
    return part.model_copy(update={"partial": hits.partial})


@router.get("/related/{paper_id:path}")
def related(request: Request, paper_id: str, show: Show = 25) -> ListModel:
    """Papers that share the keywords of one."""
    security.limit(request, "search")
    site, paper = _site(request), _paper(request, paper_id)
    hits = site.index.related(paper)
    return _part(site, f"like {paper.paper}", tuple(Entry(key) for key in hits.keys), show, 0)


@router.get("/keywords/{paper_id:path}")
def keywords(request: Request, paper_id: str) -> list[KeywordModel]:
    """The words that tell a paper from others, heaviest first."""
    found = _site(request).index.keywords(_paper(request, paper_id))
    return [KeywordModel(term=keyword.term, weight=keyword.weight) for keyword in found]


@router.get("/card/{paper_id:path}")
def card(
    request: Request,
    paper_id: str,
    lang: str | None = None,
    version: Annotated[int | None, Query(ge=1, le=10_000)] = None,
) -> CardModel:
    """The answers about a paper, where somebody has asked; reading them starts nothing."""
    site, paper = _site(request), _paper(request, paper_id)
    chosen = lang or site.settings.languages[0]
    if chosen not in site.settings.languages:
        raise BadRequest(f"lang must be one of {', '.join(site.settings.languages)}", chosen[:20])
    found = site.cards.get(paper, version, chosen)
    if found is None or site.engine is None:
        raise Unknown(f"Nobody has asked about {paper.paper} yet.")
    return CardModel(
        paper=str(paper.paper),
        version=found.version,
        lang=found.lang,
        engine=site.engine.label,
        complete=found.complete,
        notes=list(found.notes),
        answers=[AnswerModel(number=answer.q, text=answer.text, quotes=answer.sources) for answer in found.answers],
    )


@router.get("/categories")
def categories() -> list[CategoryModel]:
    """Every subject, in the order of the source."""
    return [CategoryModel(code=c.code, name=c.name, group=c.group, active=c.active) for c in vocabulary().values()]


@router.get("/categories/{name}")
def category(name: str) -> list[str]:
    """The codes that a name stands for, second names included."""
    if name not in vocabulary():
        raise Unknown(f"There is no subject {name[:60]}.")
    return sorted(members(name))


@router.get("/health")
def healthy(request: Request) -> dict[str, Any]:
    """How the site is."""
    return health.state(_site(request))


def _site(request: Request) -> Site:
    return request.app.state.site


def _expression(text: str) -> Expression:
    try:
        return parse_expression(text)
    except InvalidExpression as error:
        raise BadRequest(str(error), error.rest[:60]) from error


def _paper(request: Request, text: str) -> Paper:
    try:
        wanted = parse_id(text)
    except InvalidIdentifier as error:
        raise BadRequest(str(error), text[:60]) from error
    found = exports.stored(request, [wanted])
    if not found:
        raise Unknown(f"{wanted} is not stored here.")
    return found[0]


def _part(
    site: Site,
    title: str,
    entries: tuple[Entry, ...],
    show: int,
    after: int,
    day: date | None = None,
    snapshot: int = 0,
) -> ListModel:
    chosen = entries[after : after + show]
    found = {paper.pk: paper for paper in lists.papers(site.store, [entry.pk for entry in chosen])}
    listed = [
        ListedModel(
            number=after + place, kind=entry.kind, late=entry.late, group=entry.group, paper=_model(found[entry.pk])
        )
        for place, entry in enumerate(chosen, 1)
        if entry.pk in found
    ]
    following = after + show if after + show < len(entries) else None
    return ListModel(title=title, day=day, total=len(entries), snapshot=snapshot, next=following, papers=listed)


def _model(paper: Paper) -> PaperModel:
    return PaperModel.model_validate(exports.entry(paper))
