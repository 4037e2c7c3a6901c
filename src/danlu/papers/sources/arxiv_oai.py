"""arXiv's OAI-PMH interface: every change of every record, for keeping complete and for filling from nothing.

Dates are those of the last modification. A harvest goes on from one resumption token to the next until one is empty;
the tokens carry no counts and expire within a day.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from urllib.parse import urlencode
from xml.etree.ElementTree import Element

from danlu.papers.categories import split_codes
from danlu.papers.ids import ARXIV, PaperId, parse_arxiv
from danlu.papers.records import PaperRecord
from danlu.papers.sources.arxiv_feed import split_names
from danlu.papers.sources.latex import doi, originals, plain
from danlu.papers.sources.moments import iso, rfc2822, version_number
from danlu.papers.sources.xml import BadDocument, parse_xml, text_of

_OAI = "{http://www.openarchives.org/OAI/2.0/}"
_ARXIV = "{http://arxiv.org/OAI/arXiv/}"
_RAW = "{http://arxiv.org/OAI/arXivRaw/}"
BASE = "https://oaipmh.arxiv.org/oai"


class HarvestError(ValueError):
    """The interface refuses the request.

    Attributes:
        code: of the protocol, such as ``badResumptionToken``.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


@dataclass(frozen=True)
class Harvest:
    """One page of a harvest.

    Args:
        records: of the page; withdrawn ones hold nothing but their identifier.
        token: of the next page, empty at the end.
        responded_on: the interface's own date, from which the next harvest starts.
        datestamp: latest date of modification on the page, from which a broken harvest starts again.
        earliest: date of modification on the page, which tells whether pages come in order.
        skipped: records that could not be read.
    """

    records: tuple[PaperRecord, ...]
    token: str
    responded_on: date
    datestamp: date | None
    earliest: date | None = None
    skipped: int = 0


def list_url(base: str = BASE, token: str = "", since: date | None = None, archive: str = "", raw: bool = False) -> str:
    """Address of the first page of a harvest, or of the one that a token stands for; a token goes alone.

    Args:
        base: of the interface.
        token: of the page.
        since: earliest modification.
        archive: a set such as ``cs:cs:AI`` or ``physics:hep-th``; all unless given.
        raw: with the history of versions, and authors as one string.
    """
    if token:
        return f"{base}?{urlencode({'verb': 'ListRecords', 'resumptionToken': token})}"
    asked = {"verb": "ListRecords", "metadataPrefix": "arXivRaw" if raw else "arXiv"}
    if since is not None:
        asked["from"] = since.isoformat()
    if archive:
        asked["set"] = archive
    return f"{base}?{urlencode(asked)}"


def parse_harvest(body: bytes) -> Harvest:
    """Read a page of a harvest; no matching records is an empty page.

    Raises:
        HarvestError: the interface refuses the request.
        BadDocument: not an answer of the interface.
    """
    root = parse_xml(body, "an OAI-PMH answer")
    if root.tag != f"{_OAI}OAI-PMH":
        raise BadDocument(f"expected an OAI-PMH answer, got an element {root.tag[:60]!r}")
    try:
        responded_on = iso(text_of(root.find(f"{_OAI}responseDate"))).date()
    except ValueError as error:
        raise BadDocument(f"expected an OAI-PMH answer with its date: {error}") from error
    refusal = root.find(f"{_OAI}error")
    if refusal is not None:
        code = refusal.get("code", "")
        if code == "noRecordsMatch":
            return Harvest((), "", responded_on, None)
        raise HarvestError(code, text_of(refusal))
    listed = root.find(f"{_OAI}ListRecords")
    if listed is None:
        raise BadDocument("expected a list of records from OAI-PMH, got another answer")
    records: list[PaperRecord] = []
    stamps: list[date] = []
    skipped = 0
    for record in listed.findall(f"{_OAI}record"):
        try:
            found, stamp = _record(record)
        except ValueError:
            skipped += 1
            continue
        records.append(found)
        stamps.append(stamp)
    token = text_of(listed.find(f"{_OAI}resumptionToken"))
    return Harvest(tuple(records), token, responded_on, max(stamps, default=None), min(stamps, default=None), skipped)


def _record(record: Element) -> tuple[PaperRecord, date]:
    header = record.find(f"{_OAI}header")
    if header is None:
        raise ValueError("a record without header")
    stamp = iso(text_of(header.find(f"{_OAI}datestamp"))).date()
    paper = PaperId(ARXIV, parse_arxiv(text_of(header.find(f"{_OAI}identifier")).rpartition(":")[2]).identifier)
    if header.get("status") == "deleted":
        return PaperRecord(paper, "oai", withdrawn=True), stamp
    entry = record.find(f"{_OAI}metadata/{_ARXIV}arXiv")
    if entry is not None:
        return _read(entry, _ARXIV, paper, _authors(entry)), stamp
    entry = record.find(f"{_OAI}metadata/{_RAW}arXivRaw")
    if entry is not None:
        return _read(
            entry, _RAW, paper, split_names(text_of(entry.find(f"{_RAW}authors")).replace(" and ", ", "))
        ), stamp
    raise ValueError("a record without metadata that can be read")


def _read(entry: Element, space: str, paper: PaperId, authors: tuple[str, ...]) -> PaperRecord:
    def of(name: str) -> str:
        return text_of(entry.find(f"{space}{name}"))

    versions = tuple(
        (version_number(each.get("version", "")), rfc2822(text_of(each.find(f"{space}date"))))
        for each in entry.findall(f"{space}version")
    )
    created, updated = of("created"), of("updated")
    submitted_at = min((moment for _, moment in versions), default=iso(created) if created else None)
    updated_at = max((moment for _, moment in versions), default=iso(updated) if updated else submitted_at)
    categories, codes = split_codes([*of("categories").split(), *_codes(of("acm-class")), *_codes(of("msc-class"))])
    return PaperRecord(
        paper,
        "oai",
        title=plain(of("title")),
        abstract=plain(of("abstract")),
        authors=authors,
        authors_provisional=space == _RAW,
        categories=categories,
        codes=codes,
        comment=plain(of("comments")),
        doi=doi(of("doi")),
        journal_ref=plain(of("journal-ref")),
        license=of("license"),
        version=max((number for number, _ in versions), default=None),
        versions=versions,
        submitted_at=submitted_at,
        updated_at=updated_at,
        extra=originals(title=of("title")),
    )


def _authors(entry: Element) -> tuple[str, ...]:
    names = []
    for author in entry.findall(f"{_ARXIV}authors/{_ARXIV}author"):
        parts = [text_of(author.find(f"{_ARXIV}{name}")) for name in ("forenames", "keyname", "suffix")]
        names.append(plain(" ".join(part for part in parts if part)))
    return tuple(names)


def _codes(text: str) -> list[str]:
    return [part.strip() for part in text.replace(",", ";").split(";") if part.strip()]
