"""Identifiers of papers: one canonical form each, and the addresses that are built from them.

An arXiv paper is called by its bare identifier (``2401.06769``, ``math/0611800``). Every other paper carries its
origin behind an at sign: ``rnJxelIZrq@OpenReview``, ``2024.naacl-long.431@ACL``, ``v202-slug@PMLR``. Digits are
ASCII digits: the digit class of a regular expression would also take those of other scripts.

Source: arXiv's description of its identifiers; Scientific Spaces archive 10088.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import quote

ARXIV = "arxiv"

#: Archives of the old scheme, which ended in March 2007.
OLD_ARCHIVES = frozenset(
    "acc-phys adap-org alg-geom ao-sci astro-ph atom-ph bayes-an chao-dyn chem-ph cmp-lg comp-gas cond-mat cs dg-ga "
    "funct-an gr-qc hep-ex hep-lat hep-ph hep-th math math-ph mtrl-th nlin nucl-ex nucl-th patt-sol physics plasm-ph "
    "q-alg q-bio quant-ph solv-int supr-con".split()
)

_NEW = re.compile(r"([0-9]{2})([0-9]{2})\.([0-9]{4,5})(?:v([1-9][0-9]*))?\Z")
_OLD = re.compile(r"([a-z]+(?:-[a-z]+)?)(?:\.[A-Za-z-]{2,10})?/([0-9]{2})([0-9]{2})([0-9]{3})(?:v([1-9][0-9]*))?\Z")
_VENUE = re.compile(r"[A-Za-z0-9_-](?:[A-Za-z0-9._~-]{0,198}[A-Za-z0-9_~-])?\Z")
_VOLUME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")
_DOI_PREFIX = "10.48550/arxiv."

#: In running text: a boundary on both sides, and not the tail of a DOI, which would give numbers of other papers.
_IN_TEXT = re.compile(
    r"(?<![0-9A-Za-z./-])(?:arxiv:\s?|(?:https?://)?(?:www\.|export\.)?arxiv\.org/(?:abs|pdf|html)/|(?:https?://doi\.org/)?10\.48550/arxiv\.)?"
    r"((?:[a-z]+(?:-[a-z]+)?(?:\.[A-Z]{2})?/[0-9]{7}|[0-9]{4}\.[0-9]{4,5})(?:v[1-9][0-9]*)?)(?![0-9A-Za-z])(?!\.[0-9])",
    re.IGNORECASE,
)


class ArxivId(NamedTuple):
    """A canonical arXiv identifier without version, and the version asked for (None: the latest)."""

    identifier: str
    version: int | None = None

    def __str__(self) -> str:
        return self.identifier if self.version is None else f"{self.identifier}v{self.version}"


class InvalidIdentifier(ValueError):
    """Text that is no identifier of a paper; the message names what is wrong with it."""


def parse_arxiv(text: str) -> ArxivId:
    """Read one arXiv identifier and bring it to its canonical form.

    Args:
        text: an identifier of either scheme, with or without ``arXiv:`` and a version. A number of four or five digits
            is padded again to the width of its month (four digits to December 2014, five after); the subject class of
            the old scheme is dropped.

    Returns:
        The canonical identifier and its version.

    Raises:
        InvalidIdentifier: text that is none, a month or number out of range, a number that cannot be padded.
    """
    if not isinstance(text, str):
        raise InvalidIdentifier(f"an arXiv identifier must be text, got {type(text).__name__}")
    bare = text.strip()
    if bare[:6].lower() == "arxiv:":
        bare = bare[6:].lstrip()
    elif bare[: len(_DOI_PREFIX)].lower() == _DOI_PREFIX:
        bare = bare[len(_DOI_PREFIX) :]
    if len(bare) > 60:
        raise InvalidIdentifier(f"no arXiv identifier is as long as {bare[:40]!r}...")
    new, old = _NEW.match(bare), _OLD.match(bare)
    if new:
        return _new_scheme(bare, *new.groups())
    if old:
        return _old_scheme(bare, *old.groups())
    raise InvalidIdentifier(f"not an arXiv identifier: {bare!r} (expected a form such as 2401.06769 or math/0611800)")


def _new_scheme(text: str, year: str, month: str, number: str, version: str | None) -> ArxivId:
    stamp = year + month
    if not 1 <= int(month) <= 12 or not "0704" <= stamp <= "9012":
        raise InvalidIdentifier(f"no month {month} of 20{year} in the scheme that began in April 2007: {text!r}")
    width = 4 if stamp <= "1412" else 5
    digits = number.lstrip("0")
    if not digits:
        raise InvalidIdentifier(f"numbers begin at 1, got {text!r}")
    if len(digits) > width:
        raise InvalidIdentifier(f"numbers of 20{year}-{month} have {width} digits, got {text!r}")
    return ArxivId(f"{stamp}.{digits.zfill(width)}", int(version) if version else None)


def _old_scheme(text: str, archive: str, year: str, month: str, number: str, version: str | None) -> ArxivId:
    if archive not in OLD_ARCHIVES:
        raise InvalidIdentifier(f"no archive {archive!r} in the old scheme: {text!r}")
    full_year = int(year) + (1900 if int(year) >= 91 else 2000)
    if not 1 <= int(month) <= 12 or not 199107 <= full_year * 100 + int(month) <= 200703 or number == "000":
        raise InvalidIdentifier(f"the old scheme ran from July 1991 to March 2007 and counted from 001, got {text!r}")
    return ArxivId(f"{archive}/{year}{month}{number}", int(version) if version else None)


@dataclass(frozen=True)
class Source:
    """Where papers come from: how their pages are addressed, and which hosts may be asked.

    Args:
        name: as it stands behind the at sign.
        abs_url: template of the page of a paper.
        pdf_url: template of its PDF, or None where there is none with a stable address.
        hosts: the only hosts that requests for this source may go to.
    """

    name: str
    abs_url: str
    pdf_url: str | None
    hosts: tuple[str, ...]


SOURCES = {
    source.name.lower(): source
    for source in (
        Source("arXiv", "https://arxiv.org/abs/{id}", "https://arxiv.org/pdf/{id}", ("arxiv.org", "export.arxiv.org")),
        Source(
            "OpenReview",
            "https://openreview.net/forum?id={id}",
            "https://openreview.net/pdf?id={id}",
            ("openreview.net", "api2.openreview.net", "api.openreview.net"),
        ),
        Source("ACL", "https://aclanthology.org/{id}/", "https://aclanthology.org/{id}.pdf", ("aclanthology.org",)),
        Source(
            "PMLR",
            "https://proceedings.mlr.press/{volume}/{slug}.html",
            "https://proceedings.mlr.press/{volume}/{slug}/{slug}.pdf",
            ("proceedings.mlr.press",),
        ),
        Source(
            "IJCAI",
            "https://www.ijcai.org/proceedings/{volume}/{id}",
            "https://www.ijcai.org/proceedings/{volume}/{id}.pdf",
            ("www.ijcai.org",),
        ),
        Source("AAAI", "https://ojs.aaai.org/index.php/AAAI/article/view/{id}", None, ("ojs.aaai.org",)),
        Source(
            "CVF",
            "https://openaccess.thecvf.com/content/{volume}/html/{id}.html",
            "https://openaccess.thecvf.com/content/{volume}/papers/{id}.pdf",
            ("openaccess.thecvf.com",),
        ),
        Source("USENIX", "https://www.usenix.org/conference/{volume}/presentation/{id}", None, ("www.usenix.org",)),
        Source("Local", "", None, ()),
    )
}


class PaperId(NamedTuple):
    """A canonical identifier of any source: ``str()`` gives the form used in addresses."""

    source: str
    identifier: str
    volume: str | None = None
    version: int | None = None

    def __str__(self) -> str:
        if self.source == ARXIV:
            return str(ArxivId(self.identifier, self.version))
        return "@".join(part for part in (self.identifier, self.volume, SOURCES[self.source].name) if part)

    @property
    def ext_id(self) -> str:
        """The identifier within its source, as it is stored: without version."""
        return self.identifier if self.volume is None else f"{self.identifier}@{self.volume}"


def parse_id(text: str) -> PaperId:
    """Read an identifier of any source.

    Args:
        text: an arXiv identifier, ``<id>@<Source>`` or ``<id>@<volume>@<Source>``; the source in any case.

    Returns:
        Its canonical form: parsing that again gives the same.

    Raises:
        InvalidIdentifier: text that is none, or a source that is unknown.
    """
    if not isinstance(text, str) or "@" not in text:
        arxiv = parse_arxiv(text)
        return PaperId(ARXIV, arxiv.identifier, None, arxiv.version)
    parts = text.strip().split("@")
    source = SOURCES.get(parts[-1].lower())
    if source is None or len(parts) > 3:
        known = ", ".join(each.name for each in SOURCES.values())
        raise InvalidIdentifier(f"unknown source {parts[-1][:40]!r} in {text[:80]!r}; known are {known}")
    if source.name.lower() == ARXIV:
        return parse_id("@".join(parts[:-1]))
    volume = parts[1] if len(parts) == 3 else None
    if not _VENUE.match(parts[0]) or (volume is not None and not _VOLUME.match(volume)):
        raise InvalidIdentifier(f"not an identifier of {source.name}: {text[:80]!r} (letters, digits and . _ ~ - only)")
    return PaperId(source.name.lower(), parts[0], volume)


def find_arxiv_ids(text: str) -> list[ArxivId]:
    """The arXiv identifiers in running text or an address, in order, each once; numbers inside other DOIs are not."""
    found: dict[ArxivId, None] = {}
    for match in _IN_TEXT.finditer(text):
        try:
            found[parse_arxiv(_lower_archive(match.group(1)))] = None
        except InvalidIdentifier:
            continue
    return list(found)


def _lower_archive(text: str) -> str:
    return text if "/" not in text else text.split("/")[0].split(".")[0].lower() + "/" + text.split("/")[1]


def abs_url(paper: PaperId) -> str | None:
    """Address of the page of a paper at its source: built from the identifier, never taken from data."""
    return _address(SOURCES[paper.source].abs_url, paper)


def pdf_url(paper: PaperId) -> str | None:
    """Address of the PDF at the source, or None where the source has no stable one."""
    template = SOURCES[paper.source].pdf_url
    return None if template is None else _address(template, paper)


def _address(template: str, paper: PaperId) -> str | None:
    volume, slug = paper.volume, paper.identifier
    if "{slug}" in template and volume is None:
        volume, _, slug = paper.identifier.partition("-")
    if not template or ("{volume}" in template and not volume):
        return None
    name = str(ArxivId(paper.identifier, paper.version)) if paper.source == ARXIV else paper.identifier
    return template.format(id=quote(name, safe="/"), volume=quote(volume or "", safe=""), slug=quote(slug, safe=""))
