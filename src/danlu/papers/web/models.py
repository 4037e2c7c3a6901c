"""What programs get: papers and lists of them as typed objects, the same in the interface and in exports."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from danlu.papers.categories import shown
from danlu.papers.rows import Entry, Paper
from danlu.papers.web.views import View

#: What XML has not: control characters, halves of characters, and two that are none.
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """Text without the characters that XML and UTF-8 do not have."""
    return _UNFIT.sub("", text)


Text = Annotated[str, BeforeValidator(lambda text: clean(text) if isinstance(text, str) else text)]
#: The database keeps UTC without zone.
Time = Annotated[datetime, AfterValidator(lambda moment: moment.replace(tzinfo=UTC))]


class PlaceModel(BaseModel):
    """Where a paper was published."""

    name: Text
    year: int
    group: Text = Field(description="such as Oral or Poster; may be empty")


class PaperModel(BaseModel):
    """A paper. Text may hold TeX mathematics between dollars; times are UTC."""

    id: str = Field(description="as in addresses; it ends in v and a number where that version was asked for")
    version: int | None = Field(description="the latest that is known")
    title: Text
    abstract: Text
    authors: list[Text]
    categories: list[Text] = Field(description="the primary one first")
    comment: Text
    doi: Text
    journal_ref: Text
    license: Text
    submitted_at: Time | None = Field(description="version 1")
    updated_at: Time | None = Field(description="the latest version")
    announced_on: date | None = Field(description="the day of its first list")
    withdrawn: bool
    venues: list[PlaceModel]
    abs_url: Text | None = Field(description="its page at the source")
    pdf_url: Text | None = Field(description="its PDF at the source")


class ListedModel(BaseModel):
    """A paper at its place in a list."""

    number: int = Field(description="its place, from 1")
    kind: str = Field(description="new or cross, in daily lists")
    late: bool = Field(description="it came after the list was first shown")
    group: Text = Field(description="in lists of venues")
    paper: PaperModel


class ListModel(BaseModel):
    """A part of a list in its own order."""

    total: int = Field(description="papers of the whole list")
    next: str | None = Field(description="address of the part that follows")
    papers: list[ListedModel]


class DayListModel(ListModel):
    """A part of the list of one day."""

    expression: str
    day: date | None = Field(description="of the mailing; null where nothing has been announced")
    snapshot: int = Field(description="gives this very list again, although more has come meanwhile")


class VenueModel(BaseModel):
    """A venue of one year."""

    slug: Text
    name: Text
    year: int
    total: int
    groups: dict[str, int] = Field(description="papers by group")


class VenueListModel(ListModel):
    """A part of the list of a venue."""

    venue: VenueModel


class SearchModel(ListModel):
    """A part of the results of a search."""

    query: Text
    partial: bool = Field(description="only the newest papers were looked at: every word is in very many")


class DayModel(BaseModel):
    """A day with a list."""

    day: date
    total: int


class KeywordModel(BaseModel):
    """A word that tells a paper from others."""

    term: Text
    weight: float


class CategoryModel(BaseModel):
    """A subject."""

    code: str
    name: str
    group: str
    archive: str
    active: bool = Field(description="it still takes papers")
    alias_of: str | None = Field(description="the name under which it is shown")


class QuoteModel(BaseModel):
    """Where in the paper something stands."""

    section: Text = ""
    page: int = 0


class AnswerModel(BaseModel):
    """A finished answer, in Markdown that nobody vouches for."""

    number: int
    question: str
    text: Text
    quotes: list[QuoteModel]
    created_at: Time | None


class CardModel(BaseModel):
    """What has been answered about a paper."""

    paper: str
    version: int
    lang: str
    engine: str
    complete: bool
    state: str = Field(description="of the latest job: queued, running, done or failed; may be empty")
    answers: list[AnswerModel]
    notes: list[Text]


class Problem(BaseModel):
    """What is wrong with a request."""

    type: Literal["about:blank"] = "about:blank"
    title: str
    status: int
    detail: Text = Field(description="a sentence for people")
    token: Text = Field(description="the part of the request that cannot be read; may be empty")


def paper_model(paper: Paper, version: int | None = None) -> PaperModel:
    """A paper for programs.

    Args:
        paper: as stored.
        version: that was asked for.
    """
    view = View(paper, 0, Entry(paper.pk), {}, version)
    return PaperModel(
        id=view.id,
        version=paper.version,
        title=paper.title,
        abstract=paper.abstract,
        authors=list(paper.authors),
        categories=list(shown(paper.categories)),
        comment=paper.comment,
        doi=paper.doi,
        journal_ref=paper.journal_ref,
        license=paper.license,
        submitted_at=paper.submitted_at,
        updated_at=paper.updated_at,
        announced_on=paper.announced_on,
        withdrawn=paper.withdrawn,
        venues=[PlaceModel(name=place.name, year=place.year, group=place.group) for place in paper.venues],
        abs_url=view.abs_url,
        pdf_url=view.pdf_url,
    )
