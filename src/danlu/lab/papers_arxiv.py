"""A played arXiv: it answers as the real one does, with what it lacks and with its faults; nothing leaves the machine.

Feeds, the query interface and OAI-PMH are written out from the same records, so that what comes back can be compared.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape, quoteattr

if TYPE_CHECKING:
    from danlu.papers.ids import Source
    from danlu.papers.net.fetch import Fetched
    from danlu.papers.records import PaperRecord

_HEAD = '<?xml version="1.0" encoding="UTF-8"?>\n'
#: What may come in place of an answer.
FAULTS = ("overloaded", "page", "cut", "empty")
PAGE = b"<!DOCTYPE html><html><body>Are you a person?</body></html>"


def rss(records: Sequence[PaperRecord], day: date) -> bytes:
    """A daily list in RSS 2.0 as arXiv writes it; each record's first listing gives its kind."""
    moment = f"{day:%a, %d %b %Y} 00:00:00 -0500"
    items = "".join(
        f"<item><title>{escape(r.title)}</title><link>https://arxiv.org/abs/{r.paper}</link>"
        f"<description>arXiv:{r.paper}v{r.version} Announce Type: {r.listings[0].kind} \nAbstract: {escape(r.abstract)}"
        f'</description><guid isPermaLink="false">oai:arXiv.org:{r.paper}v{r.version}</guid>'
        + "".join(f"<category>{code}</category>" for code in r.categories)
        + f"<pubDate>{moment}</pubDate><arxiv:announce_type>{r.listings[0].kind}</arxiv:announce_type>"
        f"<dc:rights>{escape(r.license)}</dc:rights><dc:creator>{escape(', '.join(r.authors))}</dc:creator>"
        + (f"<arxiv:DOI>{escape(r.doi)}</arxiv:DOI>" if r.doi else "")
        + (f"<arxiv:journal_reference>{escape(r.journal_ref)}</arxiv:journal_reference>" if r.journal_ref else "")
        + "</item>"
        for r in records
    )
    return (
        f'{_HEAD}<rss xmlns:arxiv="http://arxiv.org/schemas/atom" xmlns:dc="http://purl.org/dc/elements/1.1/" '
        f'xmlns:atom="http://www.w3.org/2005/Atom" version="2.0"><channel><title>updates on arXiv.org</title>'
        f"<link>http://rss.arxiv.org/rss/x</link><lastBuildDate>{moment}</lastBuildDate><skipDays><day>Sunday</day>"
        f"<day>Saturday</day></skipDays>{items}</channel></rss>"
    ).encode()


def atom(records: Sequence[PaperRecord], day: date) -> bytes:
    """A daily list in Atom as arXiv writes it."""
    moment = f"{day.isoformat()}T00:00:00-05:00"
    entries = "".join(
        f"<entry><id>oai:arXiv.org:{r.paper}v{r.version}</id><title>{escape(r.title)}</title>"
        f"<updated>{datetime.now(UTC).isoformat()}</updated>"
        f'<link href="https://arxiv.org/abs/{r.paper}" rel="alternate" type="text/html"/>'
        f"<summary>arXiv:{r.paper}v{r.version} Announce Type: {r.listings[0].kind} \nAbstract: {escape(r.abstract)}"
        "</summary>"
        + "".join(f"<category term={quoteattr(code)}/>" for code in r.categories)
        + f"<published>{moment}</published><arxiv:announce_type>{r.listings[0].kind}</arxiv:announce_type>"
        f"<dc:rights>{escape(r.license)}</dc:rights><dc:creator>{escape(', '.join(r.authors))}</dc:creator>"
        + (f"<arxiv:DOI>{escape(r.doi)}</arxiv:DOI>" if r.doi else "")
        + (f"<arxiv:journal_reference>{escape(r.journal_ref)}</arxiv:journal_reference>" if r.journal_ref else "")
        + "</entry>"
        for r in records
    )
    return (
        f'{_HEAD}<feed xmlns="http://www.w3.org/2005/Atom" xmlns:arxiv="http://arxiv.org/schemas/atom" '
        f'xmlns:dc="http://purl.org/dc/elements/1.1/" xml:lang="en-us"><id>http://rss.arxiv.org/atom/x</id>'
        f"<title>updates on arXiv.org</title><updated>{datetime.now(UTC).isoformat()}</updated>{entries}</feed>"
    ).encode()


def api(records: Sequence[PaperRecord], total: int | None = None, start: int = 0) -> bytes:
    """A page of the query interface."""
    entries = "".join(
        f"<entry><id>http://arxiv.org/abs/{r.paper}v{r.version}</id><updated>{_zulu(r.updated_at)}</updated>"
        f"<published>{_zulu(r.submitted_at)}</published><title>{escape(r.title)}</title>"
        f"<summary>  {escape(r.abstract)}\n</summary>"
        + "".join(f"<author><name>{escape(name)}</name></author>" for name in r.authors)
        + (f"<arxiv:doi>{escape(r.doi)}</arxiv:doi>" if r.doi else "")
        + (f"<arxiv:comment>{escape(r.comment)}</arxiv:comment>" if r.comment else "")
        + (f"<arxiv:journal_ref>{escape(r.journal_ref)}</arxiv:journal_ref>" if r.journal_ref else "")
        + f'<arxiv:primary_category term={quoteattr(r.categories[0])} scheme="http://arxiv.org/schemas/atom"/>'
        + "".join(
            f'<category term={quoteattr(c)} scheme="http://arxiv.org/schemas/atom"/>' for c in (*r.categories, *r.codes)
        )
        + "</entry>"
        for r in records
    )
    return _api_feed(entries, len(records) if total is None else total, start)


def api_error(message: str) -> bytes:
    """The interface's way to say that a request is wrong: an entry that looks like a paper."""
    return _api_feed(
        f"<entry><id>http://arxiv.org/api/errors#{message.replace(' ', '_')}</id><title>Error</title>"
        f"<summary>{escape(message)}</summary><updated>2024-01-16T00:00:00-05:00</updated>"
        "<author><name>arXiv api core</name></author></entry>",
        1,
        0,
    )


def oai(
    records: Sequence[PaperRecord], responded: date, stamp: date, token: str | None = None, raw: bool = False
) -> bytes:
    """A page of a harvest; withdrawn records come as deleted."""
    entries = "".join(_oai_record(r, stamp, raw) for r in records)
    mark = "" if token is None else f"<resumptionToken>{escape(token)}</resumptionToken>"
    return _oai_answer(f"<ListRecords>{entries}{mark}</ListRecords>", responded)


def oai_error(code: str, responded: date, message: str = "no") -> bytes:
    """A refusal of OAI-PMH."""
    return _oai_answer(f"<error code={quoteattr(code)}>{escape(message)}</error>", responded)


@dataclass
class Arxiv:
    """A played arXiv with one day's papers.

    Args:
        day: of the mailing.
        records: everything that was announced, in the order of the feed.
        feed_lacks: identifiers that the feed leaves out.
        interface_lacks: those that the query interface leaves out.
        mailing: whether there is one today; without it the feed is empty.
        faults: share of requests that fail in a random way.
        seed: of the faults.
        asked: addresses in the order they came.
    """

    day: date
    records: Sequence[PaperRecord]
    feed_lacks: Collection[str] = ()
    interface_lacks: Collection[str] = ()
    mailing: bool = True
    faults: float = 0.0
    seed: int = 0
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def answer(self, url: str) -> tuple[int, bytes]:
        """Status and body of an address."""
        self.asked.append(url)
        status, body = self._whole(url)
        if self._random.random() >= self.faults:
            return status, body
        fault = self._random.choice(FAULTS)
        if fault == "overloaded":
            return 503, b""
        if fault == "page":
            return 200, PAGE
        if fault == "cut":
            return 200, body[: len(body) // 2]
        return 200, atom([], self.day) if "rss." in url else _api_feed("", len(self.records), 0)

    async def get(self, url: str, source: Source, *_: object, **__: object) -> Fetched:
        """What a fetcher gives after its own tries."""
        from danlu.papers.net.errors import Unavailable
        from danlu.papers.net.fetch import Fetched
        from danlu.papers.net.guard import check_url

        check_url(url, source.hosts)
        status, body = self.answer(url)
        if status != 200:
            raise Unavailable(f"status {status}")
        return Fetched(200, body, url)

    def _whole(self, url: str) -> tuple[int, bytes]:
        parts = urlsplit(url)
        asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if parts.path.startswith(("/atom/", "/rss/")):
            listed = [r for r in self.records if str(r.paper) not in self.feed_lacks] if self.mailing else []
            return 200, (atom if parts.path.startswith("/atom/") else rss)(listed, self.day)
        known = [r for r in self.records if str(r.paper) not in self.interface_lacks]
        if "id_list" in asked:
            wanted = asked["id_list"].split(",")
            return 200, api([r for r in known if str(r.paper) in wanted])
        if parts.path == "/api/query":
            code = asked["search_query"].removeprefix("cat:")
            start, count = int(asked["start"]), int(asked["max_results"])
            found = sorted((r for r in known if code in r.categories), key=lambda r: str(r.submitted_at), reverse=True)
            return 200, api(found[start : start + count], len(found), start)
        if parts.path == "/oai":
            first = int(asked.get("resumptionToken", "0"))
            token = str(first + 50) if first + 50 < len(known) else ""
            return 200, oai(known[first : first + 50], self.day, self.day, token)
        return 404, b""


def fixture_day(day: date = date(2024, 1, 16), papers: int = 133, category: str = "cs.LG") -> list[PaperRecord]:
    """The papers of one day, submitted in time for it, with neighbouring identifiers.

    Args:
        day: of the mailing, a Tuesday to Friday.
        papers: how many.
        category: of all of them; every third is crossed into it from another.
    """
    from danlu.papers.ids import ARXIV, PaperId
    from danlu.papers.records import Listing, PaperRecord

    open_at = datetime.combine(day - timedelta(days=2), time(19), UTC)
    found = []
    for i in range(papers):
        own = ("stat.ML", category) if i % 3 == 2 else (category, "cs.AI")
        submitted = open_at + timedelta(minutes=10 * i)
        found.append(
            PaperRecord(
                PaperId(ARXIV, f"{day:%y%m}.{7000 + 7 * i:05d}"),
                "api",
                title=f"On the {i}th thing that matters for learning",
                abstract=f"We study thing {i} & show that $x < {i}$.",
                authors=(f"Ann Number{i}", "Bo Chen"),
                categories=own,
                version=1,
                versions=((1, submitted),),
                submitted_at=submitted,
                updated_at=submitted,
                listings=(Listing(day, category, "cross" if i % 3 == 2 else "new", i),),
            )
        )
    return found


def _zulu(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}" if moment else ""


def _api_feed(entries: str, total: int, start: int) -> bytes:
    return (
        f'{_HEAD}<feed xmlns="http://www.w3.org/2005/Atom" xmlns:arxiv="http://arxiv.org/schemas/atom" '
        f'xmlns:opensearch="http://a9.com/-/spec/opensearch/1.1/"><title>ArXiv Query</title><id>http://arxiv.org/api/q'
        f"</id><opensearch:totalResults>{total}</opensearch:totalResults><opensearch:startIndex>{start}"
        f"</opensearch:startIndex><opensearch:itemsPerPage>500</opensearch:itemsPerPage>{entries}</feed>"
    ).encode()


def _oai_answer(inside: str, responded: date) -> bytes:
    return (
        f'{_HEAD}<OAI-PMH xmlns="http://www.openarchives.org/OAI/2.0/"><responseDate>{responded}T02:00:00Z'
        f'</responseDate><request verb="ListRecords">http://oaipmh.arxiv.org/oai</request>{inside}</OAI-PMH>'
    ).encode()


def _oai_record(record: PaperRecord, stamp: date, raw: bool) -> str:
    header = f"<identifier>oai:arXiv.org:{record.paper}</identifier><datestamp>{stamp}</datestamp>"
    if record.withdrawn:
        return f'<record><header status="deleted">{header}</header></record>'
    prefix = "arXivRaw" if raw else "arXiv"
    versions = "".join(
        f'<version version="v{number}"><date>{moment:%a, %d %b %Y %H:%M:%S} GMT</date><size>9kb</size></version>'
        for number, moment in record.versions
    )
    dates = "".join(
        f"<{name}>{moment.date()}</{name}>"
        for name, moment in (("created", record.submitted_at), ("updated", record.updated_at))
        if moment is not None
    )
    split = "".join(
        f"<author><keyname>{escape(name.rpartition(' ')[2])}</keyname>"
        f"<forenames>{escape(name.rpartition(' ')[0])}</forenames></author>"
        for name in record.authors
    )
    fields = {
        "title": record.title,
        "categories": " ".join(record.categories),
        "msc-class": "; ".join(record.codes),
        "comments": record.comment,
        "journal-ref": record.journal_ref,
        "doi": record.doi,
        "license": record.license,
        "abstract": record.abstract,
    }
    texts = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in fields.items() if value)
    own = (
        f"{versions}<authors>{escape(', '.join(record.authors))}</authors>"
        if raw
        else f"{dates}<authors>{split}</authors>"
    )
    return (
        f"<record><header>{header}<setSpec>cs</setSpec></header><metadata>"
        f'<{prefix} xmlns="http://arxiv.org/OAI/{prefix}/"><id>{record.paper}</id>{own}{texts}</{prefix}></metadata></record>'
    )
