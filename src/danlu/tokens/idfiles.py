"""Text files to ids and back: line by line, or whole, as one long array for training. Memory is bounded in all."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from danlu.files import replacing
from danlu.tokens.sampling import random_states

if TYPE_CHECKING:
    from danlu.tokens.bytepiece import BytePiece

_BLOCK = 1 << 20
#: Endings of files of ids: ``.npy`` says itself what it holds, ``.bin`` is the bare numbers, low byte first.
SUFFIXES = (".npy", ".bin")


def id_type(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds every id: 16 bits up to 65,536 ids, else 32; unsigned, low byte first."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def text_parts(file: BinaryIO, what: str, *, raw: bool = False) -> Iterator[str | bytes]:
    """A file as parts of about a megabyte.

    Args:
        file: open for reading bytes.
        what: its name, for errors.
        raw: yield bytes as they are instead of text.

    Raises:
        ValueError: it is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    read = 0
    while True:
        block = file.read(_BLOCK)
        if raw:
            if not block:
                return
            yield block
            continue
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise ValueError(_not_utf8(what, error, read - held)) from None
        read += len(block)
        if text:
            yield text
        if not block:
            return


def encode_lines(
    tokenizer: BytePiece,
    file: BinaryIO,
    what: str,
    *,
    raw: bool = False,
    alpha: float | None = None,
    seed: int | None = None,
    add_bos: bool = False,
    add_eos: bool = False,
    threads: int | None = None,
) -> Iterator[tuple[list[int], bool]]:
    r"""Encode every line on its own, without its line feed.

    Only ``\n`` ends a line, so that joining the decoded lines gives the file back.

    Args:
        tokenizer: what encodes.
        file: open for reading bytes.
        what: its name, for errors.
        raw: take the bytes as they are, without asking for UTF-8 and without normalisation.
        alpha: as for ``BytePiece.encode``.
        seed: of all draws; each line gets random numbers of its own.
        add_bos: put ``<bos>`` in front of each line.
        add_eos: put ``<eos>`` behind each line.
        threads: None is all cores.

    Yields:
        Ids of a line, and whether a line feed followed it.

    Raises:
        ValueError: a line is not UTF-8, or as for ``BytePiece.encode``.
    """
    number, seeds = 0, seeds_of(seed)
    while block := file.readlines(_BLOCK):
        bare = [line.removesuffix(b"\n") for line in block]
        texts: Sequence[str | bytes] = bare if raw else [_decoded(x, what, number + i + 1) for i, x in enumerate(bare)]
        own = list(islice(seeds, len(block)))
        rows = tokenizer.encode_batch(texts, alpha=alpha, seed=own, add_bos=add_bos, add_eos=add_eos, threads=threads)
        yield from ((row, line.endswith(b"\n")) for row, line in zip(rows, block, strict=True))
        number += len(block)


def decode_lines(tokenizer: BytePiece, file: BinaryIO, what: str) -> Iterator[bytes]:
    """The bytes of every line of ids, with a line feed where the line of ids has one.

    Raises:
        ValueError: a line holds something else than ids of the tokenizer.
    """
    for number, line in enumerate(file, 1):
        yield _decode_words(tokenizer, line.split(), f"line {number} of {what}") + b"\n" * line.endswith(b"\n")


def decode_whole(tokenizer: BytePiece, file: BinaryIO, what: str) -> Iterator[bytes]:
    """The bytes of ids that white space separates; line breaks mean nothing.

    Raises:
        ValueError: the file holds something else than ids of the tokenizer.
    """
    held = b""
    while block := file.read(_BLOCK):
        # What follows the last white space may be half a number.
        words = (held + block).split()
        held = words.pop() if words and not block[-1:].isspace() else b""
        yield _decode_words(tokenizer, words, what)
    yield _decode_words(tokenizer, held.split(), what)


def stream_ids(
    tokenizer: BytePiece,
    files: Iterable[tuple[BinaryIO, str]],
    *,
    raw: bool = False,
    alpha: float | None = None,
    seed: int | None = None,
    add_bos: bool = False,
    add_eos: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Iterator[np.ndarray]:
    """Encode files one after another, each as a whole; nothing is joined across two of them.

    Args:
        tokenizer: what encodes.
        files: each open for reading bytes, with its name.
        raw: take the bytes as they are, without asking for UTF-8 and without normalisation.
        alpha: as for ``BytePiece.encode``.
        seed: of all draws.
        add_bos: put ``<bos>`` in front of each file.
        add_eos: put ``<eos>`` behind each file.
        progress: called with the number of bytes read from the current file so far.

    Yields:
        Arrays of ids, int32.

    Raises:
        ValueError: a file is not UTF-8, or as for ``BytePiece.encode``.
    """
    before, behind = [np.array([i], np.int32) for i in (tokenizer.bos_id, tokenizer.eos_id)]
    for (file, what), own in zip(files, seeds_of(seed), strict=False):
        if add_bos:
            yield before
        parts: Iterator[Any] = _counted(text_parts(file, what, raw=raw), progress)
        yield from tokenizer.stream(parts, alpha=alpha, seed=own)
        if add_eos:
            yield behind


def write_ids(tokenizer: BytePiece, files: Iterable[tuple[BinaryIO, str]], path: str | Path, **options: Any) -> int:
    """Encode files one after another into one array of ids, for training.

    Args:
        tokenizer: what encodes.
        files: each open for reading bytes, with its name.
        path: ends in ``.npy`` or ``.bin``, see ``SUFFIXES``; written whole or not at all. The type is ``id_type``'s.
        options: of :func:`stream_ids`.

    Returns:
        The number of ids.

    Raises:
        ValueError: another ending, or as for :func:`stream_ids`.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"a file of ids must end in {' or '.join(SUFFIXES)}, got {path.name}")
    kind, written = id_type(tokenizer.vocab_size), 0
    with replacing(path) as temporary, temporary.open("wb") as out:
        if path.suffix == ".npy":
            _write_header(out, kind, 0)
        for ids in stream_ids(tokenizer, files, **options):
            out.write(ids.astype(kind).tobytes())
            written += ids.size
        if path.suffix == ".npy":
            out.seek(0)
            _write_header(out, kind, written)
    return written


def read_ids(path: str | Path, vocab_size: int) -> np.ndarray:
    """A file of ids as an array that is read where it is used.

    Args:
        path: ends in ``.npy`` or ``.bin``.
        vocab_size: of the tokenizer that wrote it, which says what a ``.bin`` holds.

    Returns:
        The ids, one dimension, unsigned.

    Raises:
        ValueError: the file is damaged or holds something else.
    """
    path = Path(path)
    if path.suffix == ".npy":
        try:
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is not an array that numpy reads: {error}") from error
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"{path} must hold whole numbers in one dimension, got {ids.dtype} of shape {ids.shape}")
        return ids
    kind = id_type(vocab_size)
    size = path.stat().st_size
    if size % kind.itemsize:
        raise ValueError(f"{path} must hold numbers of {kind.itemsize} bytes, got {size} bytes")
    return np.memmap(path, kind, "r") if size else np.zeros(0, kind)


def decode_ids(tokenizer: BytePiece, ids: np.ndarray) -> Iterator[bytes]:
    """The bytes of a long array of ids, in parts.

    Raises:
        ValueError: an id out of range.
    """
    for start in range(0, ids.size, _BLOCK):
        yield tokenizer.decode_bytes(ids[start : start + _BLOCK].tolist())


def seeds_of(seed: int | None) -> Iterator[int]:
    """A seed of its own for each of any number of files or lines, all from one.

    Raises:
        TypeError: not an integer.
        ValueError: out of range.
    """
    base = int(random_states(seed, 1)[0])
    return ((base + number) % 2**64 for number in count())


def _counted(parts: Iterable[Any], progress: Callable[[int], None] | None) -> Iterator[Any]:
    read = 0
    for part in parts:
        yield part
        read += len(part) if isinstance(part, bytes) else len(part.encode())
        if progress:
            progress(read)


def _write_header(out: BinaryIO, kind: np.dtype[Any], count: int) -> None:
    # numpy leaves room for the shape to grow, so the header of an empty array can be replaced by that of a full one.
    description = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(out, description)


def _decode_words(tokenizer: BytePiece, words: Sequence[bytes], what: str) -> bytes:
    try:
        return tokenizer.decode_bytes([int(word) for word in words])
    except ValueError as error:
        wrong = next((word for word in words if not word.isdigit()), None)
        if wrong is None:
            raise ValueError(f"{what}: {error}") from None
        raise ValueError(f"{what} must hold ids, got {wrong.decode(errors='replace')[:40]!r}") from None


def _decoded(line: bytes, what: str, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(f"line {number} of {what}", error, 0)) from None


def _not_utf8(what: str, error: UnicodeDecodeError, offset: int) -> str:
    place = f"byte 0x{error.object[error.start]:02x} at offset {offset + error.start}"
    return f"{what} is not UTF-8 ({place}): convert it, or take its bytes as they are (raw=True, --bytes)"
