"""Papers for reference managers: BibTeX, RIS and JSON."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from danlu.papers import lists
from danlu.papers.ids import ARXIV, InvalidIdentifier, PaperId, parse_id
from danlu.papers.rows import Paper
from danlu.papers.store import Store
from danlu.papers.web.errors import BadRequest, Unknown
from danlu.papers.web.formulas import pieces
from danlu.papers.web.models import PaperModel, clean, paper_model
from danlu.papers.web.views import MOST_BYTES, MOST_IDS, source_links

router = APIRouter(include_in_schema=False)

#: Media type and ending of each format.
FORMATS = {
    "bibtex": ("application/x-bibtex", "bib"),
    "ris": ("application/x-research-info-systems", "ris"),
    "json": ("application/json", "json"),
}
# Braces get names: BibTeX counts them even behind a backslash.
_TEX = {
    "\\": r"\textbackslash{}", "{": r"\textbraceleft{}", "}": r"\textbraceright{}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "%": r"\%", "&": r"\&", "#": r"\#", "_": r"\_", "$": r"\$",
}  # fmt: skip
_ESCAPED = re.compile(r"\\.|%", re.DOTALL)
_IN_MATH = {r"\{": r"\lbrace ", r"\}": r"\rbrace ", "%": r"\%"}
_PARTICLES = frozenset("al bin da de del den der di dos du el la le ten ter van von zu".split())


class Exported(BaseModel):
    """Papers in the order asked for, and the identifiers of those that are not here."""

    papers: list[PaperModel]
    missing: list[str]


class Found(NamedTuple):
    """Papers in the order asked for with the versions asked for, and those that are not here."""

    papers: list[tuple[Paper, int | None]]
    missing: list[PaperId]


@router.get("/export")
def export(request: Request, ids: str = "", format: str = "bibtex") -> Response:
    """Papers as a file; those that are not here are named in a header."""
    if format not in FORMATS:
        raise BadRequest(f"format must be one of {', '.join(FORMATS)}", format[:200])
    wanted = read_ids(ids)
    found = stored(request.app.state.site.store, wanted)
    if not found.papers:
        names = ", ".join(map(str, found.missing[:5])) + (" and more" if len(found.missing) > 5 else "")
        raise Unknown(f"This site does not have {names}.", source_links(found.missing))
    media, ending = FORMATS[format]
    # Identifiers are ASCII letters, digits and signs that no header minds; a slash is none of a file's name.
    name = str(wanted[0]).replace("/", "-").replace("@", "-") if len(wanted) == 1 else "papers"
    headers = {"Content-Disposition": f'attachment; filename="{name}.{ending}"'}
    if found.missing:
        headers["X-Missing"] = ",".join(map(str, found.missing))
    text = {"bibtex": bibtex, "ris": ris, "json": as_json}[format](found)
    return Response(text.encode("utf-8"), media_type=f"{media}; charset=utf-8", headers=headers)


def read_ids(text: str) -> list[PaperId]:
    """The identifiers in an address, each once.

    Raises:
        BadRequest: one that is none, or too many.
    """
    if len(text.encode("utf-8", "replace")) > MOST_BYTES:
        raise BadRequest(f"an address of papers has at most {MOST_BYTES} bytes", text[:40])
    found: dict[PaperId, None] = {}
    for part in text.split(","):
        try:
            found[parse_id(part)] = None
        except InvalidIdentifier as error:
            raise BadRequest(str(error), part[:200]) from None
    if len(found) > MOST_IDS:
        raise BadRequest(f"an address names at most {MOST_IDS} papers, this one {len(found)}", text[:40])
    return list(found)


def stored(store: Store, wanted: Sequence[PaperId]) -> Found:
    """The papers of identifiers; a version that is not known is not here."""
    keys = lists.find(store, wanted)
    held = {paper.pk: paper for paper in lists.papers(store, list(set(keys.values())))}
    papers: list[tuple[Paper, int | None]] = []
    missing: list[PaperId] = []
    for each in wanted:
        paper = held.get(keys.get(each, -1))
        if paper is None or (each.version or 0) > (paper.version or 10**9):
            missing.append(each)
        else:
            papers.append((paper, each.version))
    return Found(papers, missing)


def as_json(found: Found) -> str:
    """Papers as the interface gives them."""
    models = [paper_model(paper, version) for paper, version in found.papers]
    return Exported(papers=models, missing=[str(paper) for paper in found.missing]).model_dump_json(indent=1)


def bibtex(found: Found) -> str:
    """Papers as BibTeX, with keys that differ."""
    taken: set[str] = set()
    return "\n".join(_entry(paper_model(paper, version), paper, taken) for paper, version in found.papers)


def _entry(model: PaperModel, paper: Paper, taken: set[str]) -> str:
    place = model.venues[0] if model.venues else None
    on_arxiv = paper.paper.source == ARXIV
    fields = {
        # A second pair of braces keeps the capitals.
        "title": f"{{{tex(model.title)}}}",
        "author": " and ".join(_tex_name(name) for name in model.authors),
        "booktitle": tex(f"{place.name} {place.year}") if place else "",
        "year": str(_year(model) or ""),
        "eprint": model.id if on_arxiv else "",
        "archiveprefix": "arXiv" if on_arxiv else "",
        "primaryclass": tex(model.categories[0]) if on_arxiv and model.categories else "",
        "doi": tex(model.doi),
        "url": _address(model.abs_url),
        "note": tex(model.journal_ref),
        "abstract": tex(model.abstract),
    }
    lines = [f"  {name} = {{{value}}},\n" for name, value in fields.items() if value not in ("", "{}")]
    return f"@{'inproceedings' if place else 'misc'}{{{_key(model, taken)},\n{''.join(lines)}}}\n"


def _key(model: PaperModel, taken: set[str]) -> str:
    """Last name, year and first word of the title; the identifier behind it where another paper has that already."""
    word = next((part for part in re.findall(r"\w+", model.title) if len(part) > 3), "")
    name = " ".join(_split(model.authors[0])[:1]) if model.authors else ""
    key = _ascii(f"{name}{_year(model) or ''}{word}") or _ascii(model.id)
    if key in taken:
        key = f"{key}-{_ascii(model.id)}"
    taken.add(key)
    return key


def _ascii(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", unicodedata.normalize("NFKD", text.casefold()))


def tex(text: str) -> str:
    """Text as TeX; formulas stay as they are, unless their braces would end the field."""
    parts = []
    for kind, part in pieces(" ".join(clean(text).split())):
        if kind != "text":
            part = _ESCAPED.sub(lambda match: _IN_MATH.get(match.group(), match.group()), part)
            if _balanced(part):
                parts.append(part)
                continue
        parts.append("".join(_TEX.get(character, character) for character in part))
    return "".join(parts)


def _balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0


def _tex_name(name: str) -> str:
    """A name of an author: what is no person's, or would be taken for several, stands in braces."""
    whole = "," in name or " and " in f" {name.lower()} " or "collaboration" in name.lower()
    return f"{{{tex(name)}}}" if whole else tex(name)


def _address(address: str | None) -> str:
    """An address in a field: what TeX or BibTeX would read otherwise is written as in addresses."""
    quoted = re.sub(r"[{}\\\s]", lambda match: f"%{ord(match.group()):02X}", address or "")
    return re.sub(r"([%#])", r"\\\1", quoted)


def ris(found: Found) -> str:
    """Papers as RIS: one tag and value a line."""
    return "".join(_record(paper_model(paper, version)) for paper, version in found.papers)


def _record(model: PaperModel) -> str:
    place = model.venues[0] if model.venues else None
    date = model.submitted_at
    lines = [("TY", "CPAPER" if place else "UNPB"), ("TI", model.title)]
    lines += [("AU", ", ".join(part for part in _split(name) if part)) for name in model.authors]
    lines += [("PY", str(_year(model) or "")), ("DA", f"{date:%Y/%m/%d}" if date and not place else "")]
    lines += [("T2", f"{place.name} {place.year}" if place else ""), ("AB", model.abstract)]
    lines += [("KW", code) for code in model.categories]
    lines += [("DO", model.doi), ("UR", model.abs_url or ""), ("L1", model.pdf_url or ""), ("AN", model.id)]
    # White space is folded, so that no value can begin a line of its own.
    folded = [(tag, " ".join(clean(value).split())) for tag, value in lines]
    return "".join(f"{tag}  - {value}\r\n" for tag, value in folded if value) + "ER  - \r\n"


def _split(name: str) -> tuple[str, str]:
    """Last and first names: particles such as "van" belong to the last name, a group has no first one."""
    parts = name.split()
    if len(parts) < 2 or "," in name or "collaboration" in name.lower():
        return " ".join(parts), ""
    place = len(parts) - 1
    while place > 1 and parts[place - 1].lower() in _PARTICLES:
        place -= 1
    return " ".join(parts[place:]), " ".join(parts[:place])


def _year(model: PaperModel) -> int | None:
    if model.venues:
        return model.venues[0].year
    moment: datetime | None = model.submitted_at or model.updated_at
    return moment.year if moment else model.announced_on.year if model.announced_on else None
