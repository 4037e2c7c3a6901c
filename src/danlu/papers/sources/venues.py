"""Proceedings of venues, from the files that they publish: ACL Anthology, OpenReview, PMLR, and tables of any other.

Each reader turns one document into records; where the licence of the metadata is known, its note says so.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element

from danlu.papers.ids import PaperId, parse_id
from danlu.papers.records import PaperRecord, VenuePlace
from danlu.papers.sources import bibtex
from danlu.papers.sources.latex import doi, originals, plain, without_braces
from danlu.papers.sources.xml import BadDocument, parse_xml, text_of

#: Licence of the metadata by source.
LICENCES = {"acl": "CC BY 4.0", "openreview": "see the venue's terms", "pmlr": "CC BY 4.0"}
_LONG_FIELD = 10 * 2**20


@dataclass(frozen=True)
class Bad:
    """Something in a document that is no record: where, and why."""

    place: str
    reason: str


Found = PaperRecord | Bad


def read_acl(body: bytes) -> Iterator[Found]:
    """Papers of a collection of the ACL Anthology in XML; the front matter is left out.

    Raises:
        BadDocument: not a collection.
    """
    root = parse_xml(body, "a collection of the ACL Anthology")
    if root.tag != "collection":
        raise BadDocument(f"expected a collection of the ACL Anthology, got an element {root.tag[:60]!r}")
    collection = root.get("id", "")
    for volume in root.findall("volume"):
        meta = volume.find("meta")
        year = (text_of(meta.find("year")) if meta is not None else "") or collection.partition(".")[0]
        name = (text_of(meta.find("venue")) if meta is not None else "") or collection.partition(".")[2] or collection
        for position, paper in enumerate(volume.findall("paper")):
            place = f"{collection}/{volume.get('id')}/{paper.get('id')}"
            try:
                yield _acl_paper(paper, collection, volume.get("id", ""), name, _year(year), position)
            except ValueError as error:
                yield Bad(place, str(error))


def _acl_paper(paper: Element, collection: str, volume: str, venue: str, year: int, position: int) -> PaperRecord:
    identifier = text_of(paper.find("url")) or _anthology_id(collection, volume, paper.get("id", ""))
    if "/" in identifier:
        identifier = identifier.rstrip("/").rpartition("/")[2].removesuffix(".pdf")
    authors = [
        " ".join(part for part in (text_of(each.find("first")), text_of(each.find("last"))) if part)
        for each in paper.findall("author")
    ]
    return PaperRecord(
        parse_id(f"{identifier}@ACL"),
        "venue",
        title=_marked_up(paper.find("title")),
        abstract=_marked_up(paper.find("abstract")),
        authors=tuple(map(plain, authors)),
        doi=doi(text_of(paper.find("doi"))),
        license=LICENCES["acl"],
        venues=(_place(venue.upper(), year, volume.capitalize(), position),),
        extra={"bibkey": text_of(paper.find("bibkey"))},
    )


def _anthology_id(collection: str, volume: str, paper: str) -> str:
    """Identifier of a paper without address: since 2020 its parts, before with the volume in one digit or two."""
    if re.fullmatch(r"[A-Z][0-9]{2}", collection):
        wide = collection[0] == "W"
        return f"{collection}-{volume.zfill(2)}{paper.zfill(2)}" if wide else f"{collection}-{volume}{paper.zfill(3)}"
    return f"{collection}-{volume}.{paper}"


def _marked_up(element: Element | None) -> str:
    """Text of a title or abstract, with its formulas between dollars."""
    if element is None:
        return ""
    return plain("".join(_pieces(element)))


def _pieces(element: Element) -> Iterator[str]:
    yield element.text or ""
    for child in element:
        if child.tag == "tex-math":
            yield f"${''.join(child.itertext()).strip('$')}$"
        else:
            yield from _pieces(child)
        yield child.tail or ""


def read_openreview(body: bytes, venue: str = "") -> Iterator[Found]:
    """Accepted papers of a dump of OpenReview's notes, of either version of its interface.

    Args:
        body: JSON: a list of notes, or an object with ``notes``.
        venue: identifier such as ``ICLR.cc/2024/Conference``; only its accepted papers. All that were accepted anywhere
            unless given.

    Raises:
        BadDocument: not such a dump.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadDocument(f"expected a dump of OpenReview in JSON: {error}") from error
    notes = found.get("notes") if isinstance(found, dict) else found
    if not isinstance(notes, list):
        raise BadDocument("expected a list of OpenReview's notes, or an object that has one under 'notes'")
    for position, note in enumerate(notes):
        try:
            record = _note(note, venue, position)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield Bad(f"note {position}", f"{type(error).__name__}: {error}")
            continue
        if record is not None:
            yield record


def _note(note: dict[str, Any], venue: str, position: int) -> PaperRecord | None:
    def of(name: str) -> Any:
        value = note["content"].get(name, "")
        return (value.get("value") if isinstance(value, dict) else value) or ""

    held = str(of("venueid"))
    match = re.match(r"([A-Za-z0-9-]+?)(?:\.[A-Za-z]+)*/([0-9]{4})/(.+)\Z", held)
    if match is None or (venue and held != venue) or re.search(r"Submission|Rejected|Withdrawn", held):
        return None
    group = re.sub(rf"(?i){re.escape(match.group(1))}|{match.group(2)}|conference", "", str(of("venue"))).strip(" .-")
    authors, keywords = of("authors"), of("keywords")
    title = str(of("title"))
    if not title.strip():
        raise ValueError("it has no title")
    return PaperRecord(
        parse_id(f"{note['id']}@OpenReview"),
        "venue",
        title=plain(title),
        abstract=plain(str(of("abstract"))),
        authors=tuple(plain(str(name)) for name in authors) if isinstance(authors, list) else (),
        license=plain(str(note.get("license") or "")),
        venues=(_place(match.group(1), _year(match.group(2)), group.capitalize(), position),),
        extra={
            "keywords": plain(", ".join(map(str, keywords)) if isinstance(keywords, list) else ""),
            **originals(title=title),
        },
    )


def read_bibtex(body: bytes, source: str = "PMLR", venue: str = "", year: int | None = None) -> Iterator[Found]:
    """Papers of a BibTeX file, such as a volume of PMLR.

    Args:
        body: of the file, UTF-8.
        source: of the identifiers, as in `danlu.papers.ids.SOURCES`.
        venue: name of the venue; the start of ``booktitle`` unless given.
        year: of the venue; each entry's own unless given.
    """
    position = 0
    for entry in bibtex.parse_bibtex(body.decode("utf-8", "replace")):
        if isinstance(entry, bibtex.BadEntry):
            yield Bad("BibTeX", str(entry))
            continue
        try:
            yield _bibtex_record(entry, source, venue, year, position)
        except ValueError as error:
            yield Bad(entry.key or "an entry without key", str(error))
        position += 1


def _bibtex_record(entry: bibtex.Entry, source: str, venue: str, year: int | None, position: int) -> PaperRecord:
    if not entry.text("title"):
        raise ValueError("it has no title")
    eprint = entry.text("eprint")
    is_arxiv = eprint and (entry.text("archiveprefix") or entry.text("eprinttype")).lower() == "arxiv"
    name = venue or entry.text("booktitle") or entry.text("journal")
    when = year or (_year(entry.text("year")) if entry.text("year") else 0)
    return PaperRecord(
        parse_id(eprint if is_arxiv else f"{_slug(entry, source)}@{source}"),
        "bibtex",
        title=entry.text("title"),
        abstract=entry.text("abstract"),
        authors=bibtex.names(entry.fields.get("author", "")),
        doi=doi(entry.text("doi")),
        license=LICENCES.get(source.lower(), ""),
        venues=(_place(name, when, "", position),) if name and when else (),
        extra={"bibkey": plain(entry.key), **originals(title=without_braces(entry.fields["title"]))},
    )


def _slug(entry: bibtex.Entry, source: str) -> str:
    """Identifier of an entry: its key, with what identifiers may not hold replaced and told apart by a hash."""
    key = entry.fields.get("id") or entry.key
    if source.lower() == "pmlr":
        match = re.fullmatch(r"(?:pmlr-)?(v[0-9]+)-(.+)", key.lower())
        return "-".join(match.groups() if match else (f"v{entry.text('volume')}", key.lower()))
    slug = re.sub(r"[^A-Za-z0-9._~-]+", "-", key).strip("-.")[:120]
    return (
        slug if slug == key else f"{slug or 'entry'}-{hashlib.sha256(key.encode('utf-8', 'replace')).hexdigest()[:8]}"
    )


def read_csv(body: bytes, source: str = "Local", venue: str = "", year: int | None = None) -> Iterator[Found]:
    """Papers of a table with the columns id and title, and any of abstract, authors (``;`` between), doi, group."""
    csv.field_size_limit(_LONG_FIELD)
    text = body.decode("utf-8-sig", "replace")
    head = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in head and "," not in head else ",")
    try:
        names = list(reader.fieldnames or ())
    except csv.Error as error:
        raise BadDocument(f"expected a table with commas or tabs: {error}") from error
    missing = {"id", "title"} - {(name or "").strip().lower() for name in names}
    if missing:
        raise BadDocument(
            f"a table of papers must have the columns id and title, {' and '.join(sorted(missing))} is missing"
        )
    try:
        for number, row in enumerate(reader):
            fields = {(name or "").strip().lower(): value for name, value in row.items() if isinstance(value, str)}
            yield _row(fields, f"row {number + 2}", source, venue, year, number)
    except csv.Error as error:
        yield Bad(f"line {reader.line_num}", str(error))


def read_jsonl(body: bytes, source: str = "Local", venue: str = "", year: int | None = None) -> Iterator[Found]:
    """Papers of JSON lines with the names of `read_csv`; authors may be a list."""
    for number, line in enumerate(body.splitlines()):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            yield Bad(f"line {number + 1}", str(error))
            continue
        yield _row(fields, f"line {number + 1}", source, venue, year, number)


def _row(fields: dict[str, Any], place: str, source: str, venue: str, year: int | None, position: int) -> Found:
    try:
        identifier = str(fields.get("id") or "")
        paper: PaperId = parse_id(identifier if "@" in identifier else f"{identifier}@{source}")
        title = plain(str(fields.get("title") or ""))
        if not title:
            raise ValueError("it has no title")
        listed = fields.get("authors") or ""
        authors = listed if isinstance(listed, list) else str(listed).split(";")
        when = year or (_year(str(fields["year"])) if fields.get("year") else 0)
        name = plain(venue or str(fields.get("venue") or ""))
        return PaperRecord(
            paper,
            "generic",
            title=title,
            abstract=plain(str(fields.get("abstract") or "")),
            authors=tuple(plain(str(author)).strip() for author in authors if str(author).strip()),
            doi=doi(str(fields.get("doi") or "")),
            venues=(_place(name, when, plain(str(fields.get("group") or "")), position),) if name and when else (),
        )
    except ValueError as error:
        return Bad(place, str(error))


def _year(text: str) -> int:
    if not re.fullmatch(r"(?:19|20|21)[0-9]{2}", text.strip()):
        raise ValueError(f"not a year: {text[:20]!r}")
    return int(text)


def _place(name: str, year: int, group: str, position: int) -> VenuePlace:
    """A place in a venue, with names as long as the tables hold."""
    return VenuePlace(name[:80], year, group[:80], position)
