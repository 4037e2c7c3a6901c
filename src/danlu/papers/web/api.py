"""The site for programs: JSON of every list, paper and finished answer, described by an OpenAPI document.

Everything here is read with GET, and reading starts no work. What is wrong with a request comes as a problem document
(RFC 9457) with the part that cannot be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query
from fastapi.openapi.utils import get_openapi
from starlette.requests import Request
from starlette.responses import JSONResponse

from danlu.papers import lists
from danlu.papers.answer.questions import questions
from danlu.papers.categories import ALIASES, vocabulary
from danlu.papers.rows import Entry
from danlu.papers.web import answers, exports, feeds, health, ordering, security
from danlu.papers.web.errors import Unknown
from danlu.papers.web.lists import day_of, read_day
from danlu.papers.web.models import (
    AnswerModel,
    CardModel,
    CategoryModel,
    DayListModel,
    DayModel,
    KeywordModel,
    ListedModel,
    ListModel,
    Problem,
    QuoteModel,
    SearchModel,
    VenueListModel,
    VenueModel,
    paper_model,
)
from danlu.papers.web.views import address

PREFIX = "/api/v1"


router = APIRouter(prefix=PREFIX, responses={"4XX": {"model": Problem, "description": "What is wrong"}})

Subjects = Annotated[str, Path(description="an expression of subjects", examples=["cs.AI+cs.LG-cs.CY"])]
Identifier = Annotated[str, Path(description="of a paper", examples=["2104.09864"])]
Day = Annotated[str | None, Query(description="of a mailing: YYYY-MM-DD", json_schema_extra={"format": "date"})]
Show = Annotated[int, Query(ge=1, le=ordering.MOST, description="papers of one answer")]
After = Annotated[int, Query(ge=0, le=10**6, description="how many papers of the list to leave out")]


@router.get("/list/{expression}")
def day_list(
    request: Request,
    expression: Subjects,
    date: Day = None,
    after: After = 0,
    show: Show = ordering.CHUNK,
    snapshot: Annotated[int | None, Query(ge=0, le=2**62, description="of a list read before")] = None,
) -> DayListModel:
    """The papers of a subject on one day, in the order in which the source announced them; on the latest by default."""
    wanted = feeds.read_expression(expression)
    day, found = day_of(request, wanted, read_day(date), snapshot)
    path = f"{PREFIX}/list/{wanted}"
    values = _part(request, found.entries, after, show, path, date=day, snapshot=found.snapshot)
    return DayListModel(expression=str(wanted), day=day, snapshot=found.snapshot, **values)


@router.get("/days/{expression}")
def days(
    request: Request,
    expression: Subjects,
    limit: Annotated[int, Query(ge=1, le=1000, description="how many")] = 30,
    before: Day = None,
) -> list[DayModel]:
    """The latest days on which a subject was announced, newest first."""
    found = lists.days(request.app.state.site.store, feeds.read_expression(expression), limit, read_day(before))
    return [DayModel(day=day, total=total) for day, total in found]


@router.get("/papers")
def papers(
    request: Request,
    ids: Annotated[str, Query(description="identifiers between commas, at most 200", examples=["2104.09864"])],
) -> exports.Exported:
    """Papers by identifier, in this order; those that are not here are named."""
    found = exports.stored(request.app.state.site.store, exports.read_ids(ids))
    return exports.Exported(
        papers=[paper_model(paper, version) for paper, version in found.papers],
        missing=[str(paper) for paper in found.missing],
    )


@router.get("/venues")
def venues(request: Request) -> list[VenueModel]:
    """Every venue, newest year first."""
    return [_venue(each) for each in lists.venues(request.app.state.site.store)]


@router.get("/venue/{slug}")
def venue(
    request: Request,
    slug: Annotated[str, Path(description="NAME.YEAR, or NAME for its latest year", examples=["ICLR.2024"])],
    group: Annotated[str | None, Query(description="such as Oral")] = None,
    after: After = 0,
    show: Show = ordering.CHUNK,
) -> VenueListModel:
    """The papers of a venue in its own order."""
    found = feeds.find_venue(request, slug)
    entries = feeds.venue_papers(request, found, group).entries
    path = f"{PREFIX}/venue/{found.slug}"
    return VenueListModel(venue=_venue(found), **_part(request, entries, after, show, path, group=group))


@router.get("/search")
def search(
    request: Request,
    query: Annotated[str, Query(description="any text", examples=["rotary attention"])] = "",
    branch: Annotated[Literal["arxiv", "venue"] | None, Query(description="both by default")] = None,
    sort: Annotated[Literal["relevance", "date"], Query(description="best or newest first")] = "relevance",
    after: After = 0,
    show: Show = ordering.CHUNK,
) -> SearchModel:
    """Search in titles, abstracts and authors; at most 1000 papers are found."""
    security.limit(request, "search")
    hits = request.app.state.site.index.search(query[:2000], sort=sort, branch=branch)
    path, entries = f"{PREFIX}/search", [Entry(key) for key in hits.keys]
    values = _part(request, entries, after, show, path, query=query[:2000], branch=branch, sort=sort)
    return SearchModel(query=query[:2000], partial=hits.partial, **values)


@router.get("/related/{paper_id:path}")
def related(request: Request, paper_id: Identifier, after: After = 0, show: Show = ordering.CHUNK) -> ListModel:
    """Papers that share the keywords of this one, in its branch."""
    security.limit(request, "search")
    paper, _ = answers.find(request, paper_id)
    hits = request.app.state.site.index.related(paper)
    path = f"{PREFIX}/related/{paper.paper}"
    return ListModel(**_part(request, [Entry(key) for key in hits.keys], after, show, path))


@router.get("/keywords/{paper_id:path}")
def keywords(
    request: Request, paper_id: Identifier, count: Annotated[int, Query(ge=1, le=100, description="how many")] = 10
) -> list[KeywordModel]:
    """The words that tell a paper from others, heaviest first."""
    security.limit(request, "search")
    paper, _ = answers.find(request, paper_id)
    found = request.app.state.site.index.keywords(paper, count)
    return [KeywordModel(term=keyword.term, weight=keyword.weight) for keyword in found]


@router.get("/card/{paper_id:path}")
def card(
    request: Request,
    paper_id: Identifier,
    lang: Annotated[str | None, Query(description="of the answers; the site's first by default")] = None,
    v: Annotated[int | None, Query(ge=1, le=99_999, description="version; the latest by default")] = None,
) -> CardModel:
    """What has been answered about a paper. Asking is for people: it takes a form of the site."""
    site = request.app.state.site
    paper, named = answers.find(request, paper_id)
    chosen = answers.read_lang(request, lang)
    version = answers.read_version(None if v is None else str(v), paper, named)
    found = site.cards.get(paper, version, chosen) if site.engine is not None else None
    if found is None:
        raise Unknown(f"Nobody has asked about {named} here.")
    asked = {question.number: question.text for question in questions(chosen)}
    return CardModel(
        paper=str(paper.paper),
        version=found.version,
        lang=found.lang,
        engine=site.engine.label,
        complete=found.complete,
        state=found.job.state if found.job else "",
        answers=[
            AnswerModel(
                number=each.q,
                question=asked.get(each.q, ""),
                text=each.text,
                quotes=[
                    QuoteModel(section=quote.get("section") or "", page=quote.get("page") or 0)
                    for quote in each.sources
                ],
                created_at=each.created_at,
            )
            for each in found.answers
        ],
        notes=list(found.notes),
    )


@router.get("/categories")
def categories() -> list[CategoryModel]:
    """Every subject, in the order in which the source lists them."""
    return [
        CategoryModel(
            code=each.code,
            name=each.name,
            group=each.group,
            archive=each.archive,
            active=each.active,
            alias_of=ALIASES.get(each.code),
        )
        for each in vocabulary().values()
    ]


@router.get("/health")
def site_health(request: Request) -> health.Health:
    """Whether the site is up to date."""
    return health.examine(request.app.state.site)


@router.get("/openapi.json", include_in_schema=False)
def document() -> JSONResponse:
    """This description of the interface."""
    found = get_openapi(
        title="danlu papers",
        version="1",
        description="Lists, papers, searches and finished answers of this site.",
        routes=[route for route in router.routes if getattr(route, "include_in_schema", False)],
    )
    for path in found["paths"].values():
        # The model of an error is the same everywhere; its media type cannot be said where it is declared.
        content = path["get"]["responses"]["4XX"]["content"]
        content["application/problem+json"] = content.pop("application/json")
    return JSONResponse(found)


def _venue(found: lists.Venue) -> VenueModel:
    return VenueModel(slug=found.slug, name=found.name, year=found.year, total=found.count, groups=found.groups)


def _part(
    request: Request, entries: Sequence[Entry], after: int, show: int, path: str, **query: object
) -> dict[str, Any]:
    """Total, papers and the address of what follows, for one part of a list."""
    part = entries[after : after + show]
    held = {paper.pk: paper for paper in lists.papers(request.app.state.site.store, [entry.pk for entry in part])}
    listed = [
        ListedModel(
            number=after + place, kind=entry.kind, late=entry.late, group=entry.group, paper=paper_model(held[entry.pk])
        )
        for place, entry in enumerate(part, 1)
        if entry.pk in held
    ]
    end = after + show
    following = address(path, **query, after=end, show=show) if end < len(entries) else None
    return {"total": len(entries), "next": following, "papers": listed}
