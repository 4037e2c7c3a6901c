"""The metadata snapshot of all of arXiv: JSON lines, gigabytes of them, often inside a zip file; read as a stream."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from danlu.papers.categories import split_codes
from danlu.papers.ids import ARXIV, InvalidIdentifier, PaperId, parse_arxiv
from danlu.papers.records import Listing, PaperRecord
from danlu.papers.sources.latex import doi, originals, plain
from danlu.papers.sources.mailing import mailing_day
from danlu.papers.sources.moments import rfc2822, version_number
from danlu.papers.sources.xml import BadDocument

#: Longest line that is read: the longest author lists have a few hundred kilobytes.
LINE_BYTES = 4 * 2**20


@contextmanager
def open_lines(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """The lines of a snapshot, and its size in bytes: the file itself, or the one JSON file inside a zip.

    Raises:
        BadDocument: a zip file that is broken, or holds no or several JSON files.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as lines:
            yield lines, path.stat().st_size
        return
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [entry for entry in archive.infolist() if entry.filename.lower().endswith((".json", ".jsonl"))]
            if len(inside) != 1:
                raise BadDocument(f"{path.name} must hold one JSON file, got {len(inside)}")
            with archive.open(inside[0]) as raw:
                yield io.BufferedReader(raw), inside[0].file_size  # type: ignore[type-var]
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise BadDocument(f"{path.name} is a broken or encrypted zip file: {error}") from error


def read_snapshot(lines: IO[bytes], offset: int = 0) -> Iterator[tuple[int, PaperRecord | None]]:
    """Records of a snapshot.

    Args:
        lines: of `open_lines`.
        offset: place in bytes to go on from, at the start of a line.

    Yields:
        The place behind each line, and its record; None for a line that cannot be read.
    """
    if offset:
        lines.seek(offset)
    place = offset
    while line := lines.readline(LINE_BYTES):
        place += len(line)
        if not line.endswith(b"\n") and len(line) == LINE_BYTES:
            while rest := lines.readline(LINE_BYTES):
                place += len(rest)
                if rest.endswith(b"\n"):
                    break
            yield place, None
        elif line.strip():
            yield place, parse_line(line)


def parse_line(line: bytes) -> PaperRecord | None:
    """The record of one line; None where it cannot be read."""
    try:
        entry = json.loads(line)
        return _record(entry)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _record(entry: dict[str, Any]) -> PaperRecord:
    identifier = entry["id"]
    found = parse_arxiv(identifier)
    if found.identifier != identifier and "/" not in identifier:
        # A number that was cut when a program took it for a float cannot be told from another one.
        raise InvalidIdentifier(f"not a canonical identifier: {identifier!r}")
    categories, codes = split_codes(str(entry.get("categories") or "").split())
    versions = tuple(
        (version_number(each["version"]), rfc2822(each["created"])) for each in entry.get("versions") or ()
    )
    submitted_at = min((moment for _, moment in versions), default=None)
    title = str(entry.get("title") or "")
    return PaperRecord(
        PaperId(ARXIV, found.identifier),
        "kaggle",
        title=plain(title),
        abstract=plain(str(entry.get("abstract") or "")),
        authors=_names(entry),
        authors_provisional=not entry.get("authors_parsed"),
        categories=categories,
        codes=codes,
        comment=plain(str(entry.get("comments") or "")),
        doi=doi(str(entry.get("doi") or "")),
        journal_ref=plain(str(entry.get("journal-ref") or "")),
        license=plain(str(entry.get("license") or "")),
        version=max((number for number, _ in versions), default=None),
        versions=versions,
        submitted_at=submitted_at,
        updated_at=max((moment for _, moment in versions), default=None),
        listings=_listings(submitted_at, categories) if submitted_at else (),
        extra=originals(title=title),
    )


def _names(entry: dict[str, Any]) -> tuple[str, ...]:
    parsed = entry.get("authors_parsed")
    if parsed:
        names = (
            f"{parts[1] if len(parts) > 1 else ''} {' '.join(map(str, (parts[0], *parts[2:3])))}" for parts in parsed
        )
        return tuple(plain(name) for name in names)
    return tuple(part.strip() for part in plain(str(entry.get("authors") or "")).split(",") if part.strip())


def _listings(submitted: datetime, categories: tuple[str, ...]) -> tuple[Listing, ...]:
    """The mailing is not in the snapshot: the one that the submission was in time for stands for it, as a guess."""
    day = mailing_day(submitted)
    return tuple(
        Listing(day, code, "cross" if i else "new", None, approximate=True) for i, code in enumerate(categories)
    )
