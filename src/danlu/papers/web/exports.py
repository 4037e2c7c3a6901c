"""Papers as BibTeX, RIS and JSON, for reference managers."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from danlu.papers import lists
from danlu.papers.categories import shown
from danlu.papers.ids import ARXIV, InvalidIdentifier, PaperId, parse_id
from danlu.papers.rows import Paper
from danlu.papers.web.errors import BadRequest
from danlu.papers.web.views import MOST_BYTES, MOST_IDS, web_address

router = APIRouter()

_TYPES = {
    "bibtex": ("application/x-bibtex", "bib"),
    "ris": ("application/x-research-info-systems", "ris"),
    "json": ("application/json", "json"),
}
_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "%": r"\%", "&": r"\&", "#": r"\#", "_": r"\_", "^": r"\^{}",
    "~": r"\~{}",
}  # fmt: skip
_MATH = re.compile(r"\$[^$]*\$")


@router.get("/export")
def export(request: Request, ids: str = "", format: str = "bibtex") -> Response:
    """The papers of some identifiers in one format, in their order; those that are not stored are left out."""
    if format not in _TYPES:
        raise BadRequest(f"format must be one of {', '.join(_TYPES)}", format[:60])
    papers = stored(request, read_ids(ids))
    kind, ending = _TYPES[format]
    text = {"bibtex": bibtex, "ris": ris, "json": as_json}[format](papers)
    headers = {"Content-Disposition": f'attachment; filename="papers.{ending}"'}
    return Response(text, media_type=f"{kind}; charset=utf-8", headers=headers)


def read_ids(text: str) -> list[PaperId]:
    """Identifiers between commas, each once.

    Raises:
        BadRequest: none, too many, too long, or one that is none.
    """
    if len(text.encode()) > MOST_BYTES:
        raise BadRequest(f"at most {MOST_BYTES} bytes of identifiers are read at once", text[:60])
    found: dict[PaperId, None] = {}
    for part in text.split(","):
        if part.strip():
            try:
                found[parse_id(part)] = None
            except InvalidIdentifier as error:
                raise BadRequest(str(error), part[:60]) from error
    if not found:
        raise BadRequest("ids must hold at least one identifier", text[:60])
    if len(found) > MOST_IDS:
        raise BadRequest(f"at most {MOST_IDS} identifiers are read at once, got {len(found)}")
    return list(found)


def stored(request: Request, wanted: Sequence[PaperId]) -> list[Paper]:
    """The stored ones of some papers, in their order."""
    store = request.app.state.site.store
    found = lists.find(store, wanted)
    return lists.papers(store, [found[paper] for paper in wanted if paper in found])


def bibtex(papers: Sequence[Paper]) -> str:
    """Entries of BibTeX, with keys that differ."""
    seen: set[str] = set()
    return "\n".join(_entry(paper, seen) for paper in papers)


def _entry(paper: Paper, seen: set[str]) -> str:
    venue = paper.venues[0] if paper.venues else None
    fields = {
        "title": "{" + _tex(paper.title) + "}",
        "author": " and ".join(_tex(name) for name in paper.authors),
        "year": str(_year(paper) or ""),
        "booktitle": _tex(f"{venue.name} {venue.year}") if venue else "",
        "journal": _tex(paper.journal_ref) if not venue else "",
        "eprint": paper.paper.identifier if paper.paper.source == ARXIV else "",
        "archiveprefix": "arXiv" if paper.paper.source == ARXIV else "",
        "primaryclass": paper.categories[0] if paper.categories and paper.paper.source == ARXIV else "",
        "doi": _tex(paper.doi),
        "url": (web_address(paper.abs_url) or "").replace("%", r"\%"),
        "abstract": _tex(paper.abstract),
    }
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    return f"@{'inproceedings' if venue else 'misc'}{{{_key(paper, seen)},\n" + "\n".join(lines) + "\n}\n"


def _key(paper: Paper, seen: set[str]) -> str:
    """Last name, year and first word of the title, in ASCII; a letter behind it where that is taken."""
    last = paper.authors[0].split()[-1] if paper.authors else "anonymous"
    word = next((part for part in re.findall(r"\w+", paper.title) if len(part) > 3), "paper")
    plain = unicodedata.normalize("NFKD", f"{last}{_year(paper) or ''}{word}").encode("ascii", "ignore").decode()
    base = re.sub(r"[^a-z0-9]", "", plain.lower()) or f"paper{paper.pk}"
    key, number = base, 0
    while key in seen:
        number += 1
        key = f"{base}{number}"
    seen.add(key)
    return key


def _tex(text: str) -> str:
    """Text for TeX; mathematics between dollars stays as it is where its braces are even."""
    parts, place = [], 0
    for match in _MATH.finditer(text):
        inside = match.group()
        if inside.count("{") != inside.count("}"):
            continue
        parts += [_plain(text[place : match.start()]), inside]
        place = match.end()
    parts.append(_plain(text[place:]))
    return "".join(parts)


def _plain(text: str) -> str:
    return "".join(
        _TEX.get(character, r"\$" if character == "$" else character) for character in " ".join(text.split("\n"))
    )


def ris(papers: Sequence[Paper]) -> str:
    """Records of RIS: a tag and a value on each line."""
    return "\r\n".join(_record(paper) for paper in papers)


def _record(paper: Paper) -> str:
    venue = paper.venues[0] if paper.venues else None
    lines = [("TY", "CPAPER" if venue else "UNPB"), ("TI", paper.title)]
    lines += [("AU", _inverted(name)) for name in paper.authors]
    day = paper.submitted_at.strftime("%Y/%m/%d") if paper.submitted_at else ""
    lines += [("PY", str(_year(paper) or "")), ("DA", day), ("T2", f"{venue.name} {venue.year}" if venue else "")]
    lines += [("DO", paper.doi), ("AN", str(paper.paper)), ("UR", web_address(paper.abs_url) or "")]
    lines += [("L1", web_address(paper.pdf_url) or ""), ("AB", paper.abstract)]
    lines += [("KW", code) for code in shown(paper.categories)]
    return "\r\n".join(f"{tag}  - {' '.join(value.split())}" for tag, value in lines if value) + "\r\nER  - \r\n"


def _inverted(name: str) -> str:
    first, _, last = name.rpartition(" ")
    return f"{last}, {first}" if first else last


def as_json(papers: Sequence[Paper]) -> str:
    """A list of objects."""
    return json.dumps([entry(paper) for paper in papers], ensure_ascii=False, indent=1)


def entry(paper: Paper) -> dict[str, Any]:
    """One paper for programs."""
    return {
        "id": str(paper.paper),
        "version": paper.version,
        "title": paper.title,
        "abstract": paper.abstract,
        "authors": list(paper.authors),
        "categories": list(shown(paper.categories)),
        "comment": paper.comment,
        "doi": paper.doi,
        "journal_ref": paper.journal_ref,
        "license": paper.license,
        "submitted_at": paper.submitted_at.isoformat() + "Z" if paper.submitted_at else None,
        "updated_at": paper.updated_at.isoformat() + "Z" if paper.updated_at else None,
        "announced_on": paper.announced_on.isoformat() if paper.announced_on else None,
        "withdrawn": paper.withdrawn,
        "venues": [{"name": place.name, "year": place.year, "group": place.group} for place in paper.venues],
        "abs_url": web_address(paper.abs_url),
        "pdf_url": web_address(paper.pdf_url),
    }


def _year(paper: Paper) -> int | None:
    if paper.venues:
        return paper.venues[0].year
    moment = paper.submitted_at or paper.updated_at
    return moment.year if moment else None
