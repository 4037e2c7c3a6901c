"""Papers as pages show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote, urlencode

from danlu.papers import counters, ids, lists
from danlu.papers.categories import shown, vocabulary
from danlu.papers.ids import ARXIV, PaperId
from danlu.papers.rows import Entry, Paper
from danlu.papers.store import Store

#: Authors that are shown before the others hide behind "et al.".
AUTHORS = 40
#: Papers in an address of papers, and bytes of it.
MOST_IDS, MOST_BYTES = 200, 8192


@dataclass(frozen=True)
class View:
    """One paper at its place in a list.

    Args:
        paper: itself.
        number: its place, from 1.
        entry: how it came into the list.
        counts: openings by kind.
        version: that was asked for; None: the latest.
    """

    paper: Paper
    number: int
    entry: Entry
    counts: dict[str, int]
    version: int | None = None

    @property
    def id(self) -> str:
        """The identifier, with the version that was asked for."""
        return str(self.paper.paper._replace(version=self.version))

    @property
    def url(self) -> str:
        """The page of this paper here."""
        return papers_url([self.paper.paper._replace(version=self.version)])

    @property
    def abs_url(self) -> str | None:
        """Its page at the source, of the version that was asked for."""
        if self.version is not None:
            return ids.abs_url(self.paper.paper._replace(version=self.version))
        return web_address(self.paper.abs_url)

    @property
    def pdf_url(self) -> str | None:
        """Its PDF at the source, of the version that was asked for."""
        if self.version is not None:
            return ids.pdf_url(self.paper.paper._replace(version=self.version))
        return web_address(self.paper.pdf_url)

    @property
    def subjects(self) -> list[tuple[str, str]]:
        """Code and name of each subject."""
        known = vocabulary()
        return [(code, known[code].name if code in known else code) for code in shown(self.paper.categories)]

    @property
    def authors(self) -> tuple[str, ...]:
        """Those that are always shown."""
        return self.paper.authors if len(self.paper.authors) <= AUTHORS else self.paper.authors[:AUTHORS]

    @property
    def more_authors(self) -> tuple[str, ...]:
        """Those that hide behind "et al."."""
        return self.paper.authors[len(self.authors) :]

    @property
    def branch(self) -> str:
        """Where search looks for its like."""
        return ARXIV if self.paper.paper.source == ARXIV else "venue"


def views(
    store: Store, entries: Sequence[Entry], first: int = 1, versions: dict[int, int | None] | None = None
) -> list[View]:
    """The papers of entries, with what has been counted.

    Args:
        store: to read.
        entries: of a list, in order.
        first: number of the first.
        versions: that were asked for, by key.
    """
    keys = [entry.pk for entry in entries]
    found = {paper.pk: paper for paper in lists.papers(store, keys)}
    counted = counters.counts(store, keys) if keys else {}
    return [
        View(found[entry.pk], first + place, entry, counted.get(entry.pk, {}), (versions or {}).get(entry.pk))
        for place, entry in enumerate(entries)
        if entry.pk in found
    ]


def web_address(address: str | None) -> str | None:
    """An address that a link may have: data could say ``javascript:``."""
    return address if address and address.startswith(("https://", "http://")) else None


def quoted(path: str) -> str:
    """A path as addresses have it; what identifiers and expressions are made of stays readable."""
    return quote(path, safe="@/,+:~-._")


def papers_url(papers: Sequence[PaperId]) -> str:
    """The page of these papers here."""
    branch = ARXIV if all(paper.source == ARXIV for paper in papers) else "venue"
    return f"/{branch}/" + quoted(",".join(str(paper) for paper in papers))


def address(path: str, **query: object) -> str:
    """A path of this site with the parameters that are not empty."""
    given = {name: value for name, value in query.items() if value not in (None, "")}
    return quoted(path) + ("?" + urlencode(given) if given else "")


def source_links(papers: Sequence[PaperId]) -> tuple[tuple[str, str], ...]:
    """Where to look for papers that are not here."""
    found = [(f"{paper} at {ids.SOURCES[paper.source].name}", ids.abs_url(paper)) for paper in papers]
    return tuple((text, address) for text, address in found if address is not None)
