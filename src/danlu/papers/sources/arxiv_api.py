"""The query interface of arXiv: details of papers, and the history of a category.

It reports errors as an ordinary entry with status 200, leaves out identifiers that it does not know, and now and then
gives an empty page in the middle of a long result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from urllib.parse import urlencode
from xml.etree.ElementTree import Element

from danlu.papers.categories import split_codes
from danlu.papers.ids import ARXIV, SOURCES, PaperId, parse_arxiv
from danlu.papers.records import PaperRecord
from danlu.papers.sources.latex import doi, originals, plain
from danlu.papers.sources.moments import iso
from danlu.papers.sources.xml import BadDocument, parse_xml, text_of

_ATOM = "{http://www.w3.org/2005/Atom}"
_ARXIV = "{http://arxiv.org/schemas/atom}"
_SEARCH = "{http://a9.com/-/spec/opensearch/1.1/}"
#: Every host of arXiv that is asked, redirects included.
ARXIV_SOURCE = replace(SOURCES[ARXIV], hosts=("arxiv.org", "export.arxiv.org", "rss.arxiv.org", "oaipmh.arxiv.org"))
BASE = "https://export.arxiv.org/api/query"
#: Most results of one request, and the place behind which it gives none.
PAGE, DEPTH = 2000, 30_000


class ApiError(ValueError):
    """The interface answered that the request is wrong."""


@dataclass(frozen=True)
class Page:
    """One page of results.

    Args:
        records: in the order of the answer.
        total: results in all, as the interface counts them.
        start: place of the first one.
        skipped: entries that could not be read.
    """

    records: tuple[PaperRecord, ...]
    total: int
    start: int
    skipped: int = 0


def ids_url(identifiers: Iterable[str]) -> str:
    """Address of the details of some papers, at most `PAGE` of them."""
    listed = list(identifiers)
    return f"{BASE}?{urlencode({'id_list': ','.join(listed), 'max_results': len(listed)})}"


def category_url(category: str, start: int = 0, count: int = 500) -> str:
    """Address of the newest papers of a category, by their submission."""
    asked = {"search_query": f"cat:{category}", "start": start, "max_results": min(count, PAGE)}
    return f"{BASE}?{urlencode({**asked, 'sortBy': 'submittedDate', 'sortOrder': 'descending'})}"


def parse_page(body: bytes) -> Page:
    """Read a page of results.

    Raises:
        ApiError: the page holds the interface's own error, which looks like a paper.
        BadDocument: not an answer of the interface.
    """
    root = parse_xml(body, "an answer of arXiv's interface")
    if root.tag != f"{_ATOM}feed":
        raise BadDocument(f"expected an answer of arXiv's interface, got an element {root.tag[:60]!r}")
    records: list[PaperRecord] = []
    skipped = 0
    for entry in root.findall(f"{_ATOM}entry"):
        identifier = text_of(entry.find(f"{_ATOM}id"))
        if "/api/errors" in identifier:
            raise ApiError(text_of(entry.find(f"{_ATOM}summary")) or "the interface reports an error")
        try:
            records.append(_record(entry, identifier))
        except ValueError:
            skipped += 1
    total, start = (text_of(root.find(f"{_SEARCH}{name}")) for name in ("totalResults", "startIndex"))
    return Page(tuple(records), _number(total, len(records)), _number(start, 0), skipped)


def _record(entry: Element, identifier: str) -> PaperRecord:
    found = parse_arxiv(identifier.partition("/abs/")[2])
    primary = entry.find(f"{_ARXIV}primary_category")
    terms = [each.get("term", "") for each in entry.findall(f"{_ATOM}category")]
    first = [] if primary is None else [primary.get("term", "")]
    categories, codes = split_codes([*first, *terms])
    submitted = iso(text_of(entry.find(f"{_ATOM}published")))
    updated = iso(text_of(entry.find(f"{_ATOM}updated")))
    title = text_of(entry.find(f"{_ATOM}title"))
    known = {1: submitted} if found.version != 1 else {1: updated}
    if found.version is not None:
        known[found.version] = updated
    return PaperRecord(
        PaperId(ARXIV, found.identifier),
        "api",
        title=plain(title),
        abstract=plain(text_of(entry.find(f"{_ATOM}summary"))),
        authors=tuple(plain(text_of(each)) for each in entry.findall(f"{_ATOM}author/{_ATOM}name")),
        categories=categories,
        codes=codes,
        comment=plain(text_of(entry.find(f"{_ARXIV}comment"))),
        doi=doi(text_of(entry.find(f"{_ARXIV}doi"))),
        journal_ref=plain(text_of(entry.find(f"{_ARXIV}journal_ref"))),
        version=found.version,
        versions=tuple(sorted(known.items())),
        submitted_at=submitted,
        updated_at=updated,
        extra=originals(title=title),
    )


def _number(text: str, otherwise: int) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else otherwise
