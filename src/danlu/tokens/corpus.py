"""Training text as shards: blocks of normalised UTF-8 bytes that can be read in any order, any number of times.

Files are read in blocks that end only between a line feed and a character that is not one. Neither the normal form nor
the chunks of training look across such a place, so the blocks hold what the whole file would give. A file without line
feeds is one block. Carriage returns and byte order marks are text like any other.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from danlu.tokens import unicode

_WINDOW = 1 << 16
_LINE_FEED = 10


@dataclass(frozen=True)
class Shard:
    """Texts one after another.

    Args:
        data: UTF-8 bytes, (size,), uint8.
        ends: where each text ends, (texts,), int64. Text 0 begins at 0.
    """

    data: np.ndarray
    ends: np.ndarray


class Corpus:
    """Shards by number.

    Args:
        source: where the bytes come from.
        size: bytes in all; of files, before normalisation.
    """

    def __init__(self, source: _Files | _Spool, size: int):
        self._source = source
        self.size = size

    def __len__(self) -> int:
        return len(self._source.shards)

    def read(self, index: int) -> Shard:
        """Shard ``index``; safe to call from several threads.

        Raises:
            ValueError: a file is not UTF-8, or it changed since the corpus was opened.
            OSError: a file cannot be read any more.
        """
        return self._source.read(index)

    def fingerprint(self) -> str:
        """A hash of all bytes and of how they fall into shards; reads everything once."""
        digest = hashlib.blake2b(digest_size=16)
        for index in range(len(self)):
            for text in self._source.raw(index):
                digest.update(len(text).to_bytes(8, "little"))
                digest.update(text)
            digest.update(b"\xff" * 8)
        return digest.hexdigest()


@dataclass(frozen=True)
class _Segment:
    """A block of a file, from byte ``start`` to ``stop``."""

    file: int
    start: int
    stop: int


@dataclass
class _Files:
    paths: list[Path]
    stamps: list[tuple[int, int]]
    shards: list[list[_Segment]]
    normalization: str | None

    def raw(self, index: int) -> Iterator[bytes]:
        for segment in self.shards[index]:
            path = self.paths[segment.file]
            with path.open("rb") as file:
                if _stamp(file) != self.stamps[segment.file]:
                    raise ValueError(f"file {path} changed while it was read: train again when nothing writes to it")
                file.seek(segment.start)
                yield file.read(segment.stop - segment.start)

    def read(self, index: int) -> Shard:
        texts = bytearray()
        ends = []
        for segment, content in zip(self.shards[index], self.raw(index), strict=True):
            try:
                texts += _normalised_bytes(content, self.normalization)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"file {self.paths[segment.file]} is not UTF-8: byte 0x{content[error.start]:02x} at offset "
                    f"{segment.start + error.start} ({error.reason}); convert it to UTF-8 first"
                ) from None
            ends.append(len(texts))
        return Shard(np.frombuffer(texts, np.uint8), np.array(ends, np.int64))


@dataclass
class _Spool:
    """Normalised documents in one file, written once."""

    path: Path
    shards: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def raw(self, index: int) -> Iterator[bytes]:
        shard = self.read(index)
        start = 0
        for end in shard.ends.tolist():
            yield shard.data[start:end].tobytes()
            start = end

    def read(self, index: int) -> Shard:
        start, ends = self.shards[index]
        return Shard(np.fromfile(self.path, np.uint8, int(ends[-1]), offset=start), ends)


def files(paths: Sequence[str | os.PathLike[str]], *, normalization: str | None, shard_bytes: int) -> Corpus:
    """A corpus of plain UTF-8 text files; each file is one document.

    Args:
        paths: the files.
        normalization: ``"nfc"``, or None to take the bytes as they are.
        shard_bytes: size of a shard, about.

    Raises:
        ValueError: there is no file, or no byte in any.
        OSError: a file cannot be opened; the message names it.
    """
    opened = _Files([Path(path) for path in paths], [], [], normalization)
    current: list[_Segment] = []
    held = total = 0
    for number, path in enumerate(opened.paths):
        with path.open("rb") as file:
            stamp = _stamp(file)
            opened.stamps.append(stamp)
            total += stamp[0]
            start = 0
            while start < stamp[0]:
                stop = _safe_cut(file, start + shard_bytes - held, stamp[0])
                current.append(_Segment(number, start, stop))
                held += stop - start
                start = stop
                if held >= shard_bytes:
                    opened.shards.append(current)
                    current, held = [], 0
    if current:
        opened.shards.append(current)
    if total == 0:
        raise ValueError(f"corpus must hold text, got {len(opened.paths)} files without a byte")
    return Corpus(opened, total)


def _stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _safe_cut(file: BinaryIO, target: int, size: int) -> int:
    """The first place from ``target`` on, or the end, that follows a line feed and precedes another character."""
    if target >= size:
        return size
    position = target - 1
    file.seek(position)
    after_feed = False
    while window := file.read(_WINDOW):
        values = np.frombuffer(window, np.uint8)
        feeds = values == _LINE_FEED
        cuts = ~feeds
        cuts[1:] &= feeds[:-1]
        cuts[0] &= after_feed
        if cuts.any():
            return position + int(cuts.argmax())
        after_feed = bool(feeds[-1])
        position += len(window)
    return size


def _normalised_bytes(content: bytes, normalization: str | None) -> bytes:
    return content if content.isascii() else unicode.normalize(content.decode(), normalization).encode()


def documents(texts: Iterable[str], *, normalization: str | None, shard_bytes: int, folder: Path) -> Corpus:
    """A corpus of documents, which are consumed once and kept in a file; an iterator will do.

    Args:
        texts: one document each.
        normalization: ``"nfc"``, or None to take the text as it is.
        shard_bytes: size of a shard, about; a longer document is split where a file would be.
        folder: where the file goes.

    Raises:
        TypeError: a document is not ``str``.
        ValueError: a document holds a lone surrogate, or there is no text at all.
    """
    spool = _Spool(folder / "corpus.bin")
    ends = array("q")
    shard_start = size = 0
    with spool.path.open("wb") as file:
        for number, text in enumerate(texts):
            content = _encoded(text, number, normalization)
            start = 0
            while start < len(content):
                stop = _safe_cut_of(content, start + shard_bytes - (size - shard_start))
                file.write(content[start:stop])
                size += stop - start
                start = stop
                ends.append(size - shard_start)
                if size - shard_start >= shard_bytes:
                    spool.shards.append((shard_start, np.array(ends, np.int64)))
                    shard_start, ends = size, array("q")
    if ends:
        spool.shards.append((shard_start, np.array(ends, np.int64)))
    if size == 0:
        raise ValueError("corpus must hold text, got no document with a character: an iterator may be used up already")
    return Corpus(spool, size)


def _safe_cut_of(content: bytes, target: int) -> int:
    feed = content.find(b"\n", target - 1) if target < len(content) else -1
    if feed < 0:
        return len(content)
    stop = feed + 1
    while stop < len(content) and content[stop] == _LINE_FEED:
        stop += 1
    return stop


def _encoded(text: Any, number: int, normalization: str | None) -> bytes:
    if not isinstance(text, str):
        fix = "decode it first" if isinstance(text, bytes) else "pass str documents, or pathlib.Path objects for files"
        raise TypeError(f"corpus must hold str documents, got {type(text).__name__} as document {number}: {fix}")
    return unicode.to_utf8(unicode.normalize(text, normalization), f"document {number}")


def open_corpus(corpus: Any, *, normalization: str | None, shard_bytes: int, folder: Path) -> Corpus:
    """The corpus that a user means: paths are files, strings are documents.

    Args:
        corpus: an iterable of ``pathlib.Path`` (any ``os.PathLike``), or of ``str`` documents, not of both.
        normalization: ``"nfc"`` or None.
        shard_bytes: size of a shard, about.
        folder: where documents are kept while training lasts.

    Raises:
        TypeError: ``corpus`` is a single string, bytes or path, or holds anything else.
        ValueError: there is no text; a text is not valid; the strings name existing files.
    """
    if isinstance(corpus, str | bytes | os.PathLike):
        raise TypeError(
            f"corpus must be an iterable of documents or of pathlib.Path files, got one {type(corpus).__name__}: "
            "put it in a list"
        )
    if not isinstance(corpus, Iterable):
        raise TypeError(
            f"corpus must be an iterable of str documents or of pathlib.Path files, got {type(corpus).__name__}"
        )
    items = iter(corpus)
    first = next(items, None)
    if first is None:
        raise ValueError("corpus must hold text, got an empty iterable: an iterator may be used up already")
    if isinstance(first, os.PathLike):
        paths = [first, *items]
        wrong = next((path for path in paths if not isinstance(path, os.PathLike)), None)
        if wrong is not None:
            raise TypeError(f"corpus must not mix files and documents, got {type(wrong).__name__} after a path")
        return files(paths, normalization=normalization, shard_bytes=shard_bytes)
    if (
        isinstance(first, str)
        and "\n" not in first
        and 0 < len(first) < 1024
        and "\0" not in first
        and os.path.isfile(first)
    ):
        raise ValueError(
            f"corpus holds documents, and the first, {first!r}, names a file: pass pathlib.Path({first!r}) to train on "
            "its content, or use train_files"
        )
    return documents(chain([first], items), normalization=normalization, shard_bytes=shard_bytes, folder=folder)
