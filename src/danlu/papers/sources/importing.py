"""Filling a store from a file, with progress, and going on after an interruption where it was."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from danlu.papers.records import PaperRecord
from danlu.papers.sources import venues
from danlu.papers.sources.arxiv_snapshot import open_lines, read_snapshot
from danlu.papers.sources.duplicates import link
from danlu.papers.sources.polls import note_poll, poll_row
from danlu.papers.store import Store, Written

Format = Literal["snapshot", "acl", "openreview", "pmlr", "bibtex", "csv", "jsonl"]
FORMATS: tuple[str, ...] = get_args(Format)
#: Called with bytes done and bytes in all.
Progress = Callable[[int, int], None]
_BATCH = 1000
_SHOWN = 20
#: Largest file that is read at once; the snapshot is read as a stream.
FILE_BYTES = 512 * 2**20


@dataclass
class ImportReport:
    """What an import brought.

    Args:
        written: what changed in the store.
        bad: entries that could not be read.
        reasons: of the first of them.
    """

    written: Written = field(default_factory=Written)
    bad: int = 0
    reasons: list[str] = field(default_factory=list)

    def refuse(self, reason: str) -> None:
        """Count an entry that could not be read."""
        self.bad += 1
        if len(self.reasons) < _SHOWN:
            self.reasons.append(reason)


def guess_format(path: Path) -> Format:
    """The format of a file by its name and first characters.

    Raises:
        ValueError: it cannot be told.
    """
    name = path.name.lower()
    if "arxiv-metadata" in name or name.endswith(".zip"):
        return "snapshot"
    with path.open("rb") as file:
        start = file.read(4096).lstrip()
    if name.endswith(".xml") or start.startswith(b"<?xml") or b"<collection" in start:
        return "acl"
    if name.endswith(".bib"):
        return "pmlr" if b"proceedings.mlr.press" in start or b"pmlr" in start.lower() else "bibtex"
    if name.endswith((".csv", ".tsv")):
        return "csv"
    if b'"authors_parsed"' in start or (b'"submitter"' in start and b'"categories"' in start):
        return "snapshot"
    if b'"notes"' in start or b'"venueid"' in start:
        return "openreview"
    if name.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    raise ValueError(f"the format of {path.name} cannot be told: name one of {', '.join(FORMATS)}")


def import_file(
    store: Store,
    path: Path,
    format: Format | None = None,
    venue: str = "",
    year: int | None = None,
    progress: Progress | None = None,
) -> ImportReport:
    """Write the papers of a file into a store; writing them again changes nothing.

    Args:
        store: to write to.
        path: of the file.
        format: of it; guessed unless given.
        venue: name of the venue, for formats that do not say it.
        year: of the venue, likewise.
        progress: called with bytes done and bytes in all.

    Returns:
        Counts, and why entries were refused. An interrupted import of a snapshot goes on where it was.

    Raises:
        ValueError: an unknown format, or a document that is not of it.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    kind = format or guess_format(path)
    if kind not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {kind!r}")
    report = ImportReport()
    if kind == "snapshot":
        _snapshot(store, path, report, progress)
        link(store)
        return report
    size = path.stat().st_size
    if size > FILE_BYTES:
        raise ValueError(f"{path.name} has {size} bytes, more than the {FILE_BYTES} that are read at once: split it")
    body = path.read_bytes()
    found = {
        "acl": lambda: venues.read_acl(body),
        "openreview": lambda: venues.read_openreview(body, venue),
        "pmlr": lambda: venues.read_bibtex(body, "PMLR", venue, year),
        "bibtex": lambda: venues.read_bibtex(body, "Local", venue, year),
        "csv": lambda: venues.read_csv(body, "Local", venue, year),
        "jsonl": lambda: venues.read_jsonl(body, "Local", venue, year),
    }[kind]()
    report.written = store.upsert(_good(found, report))
    link(store)
    if progress:
        progress(size, size)
    return report


def _good(found: Iterable[venues.Found], report: ImportReport) -> Iterator[PaperRecord]:
    for each in found:
        if isinstance(each, PaperRecord):
            yield each
        else:
            report.refuse(f"{each.place}: {each.reason}")


def _snapshot(store: Store, path: Path, report: ImportReport, progress: Progress | None) -> None:
    """Lines in batches; the place behind a batch is noted once the batch is written."""
    key = _mark(path)
    offset = int(poll_row(store, "snapshot", key)["cursor"] or 0)
    with _few_collections(), open_lines(path) as (lines, size):
        batch: list[PaperRecord] = []
        place = offset
        for place, record in read_snapshot(lines, offset):
            if record is None:
                report.refuse(f"the line that ends at byte {place}")
            else:
                batch.append(record)
            if len(batch) >= _BATCH:
                report.written += store.upsert(batch)
                batch = []
                note_poll(store, "snapshot", key, datetime.now(UTC), cursor=str(place))
                if progress:
                    progress(place, size)
        report.written += store.upsert(batch)
        note_poll(store, "snapshot", key, datetime.now(UTC), cursor=str(place))
        if progress:
            progress(size, size)


@contextmanager
def _few_collections() -> Iterator[None]:
    """Records come and go in great numbers and never in circles: looking for circles would take a tenth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _mark(path: Path) -> str:
    """What tells a snapshot from another: its size and its first and last bytes, wherever it lies."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(65_536))
        file.seek(max(0, size - 65_536))
        digest.update(file.read())
    return digest.hexdigest()
