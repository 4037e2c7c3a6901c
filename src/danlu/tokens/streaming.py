"""Encoding text that arrives in parts, and decoding ids that do, in bounded memory and equal to the whole at once."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from danlu.tokens import unicode
from danlu.tokens.sampling import Sampler, random_states
from danlu.tokens.storage import RESERVED

if TYPE_CHECKING:
    from danlu.tokens.bytepiece import BytePiece, Text

#: A line longer than this is encoded before its end, as far as it is settled.
PATIENCE = 1 << 20


def stream(
    tokenizer: BytePiece, source: Iterable[Text], *, alpha: float | None = None, seed: int | None = None
) -> Iterator[np.ndarray]:
    """Encode a text that arrives in parts.

    A part is cut anywhere, also within a character or a combining sequence. Lines leave as they are finished. Of a line
    longer than a megabyte, what no further byte can change leaves before: where the best paths to all places near the
    end meet. Memory is bounded by the part, a line's last megabyte, and any longer stretch in which they do not meet,
    which text does not have (a run of one repeated byte can).

    Args:
        tokenizer: what encodes.
        source: parts of one text, all ``str`` or all ``bytes``.
        alpha: as for ``BytePiece.encode``; lines leave only whole when it is given.
        seed: as for ``BytePiece.encode``.

    Yields:
        Arrays of ids, int32, that are joined the ids of the whole text.

    Raises:
        TypeError: a part is neither, or not of the kind of the first.
        ValueError: as for ``BytePiece.encode``.
    """
    sampler = tokenizer.sampler(alpha)
    state = random_states(seed, 1)
    return _stream(tokenizer, _as_bytes(tokenizer, source), sampler, state)


def _as_bytes(tokenizer: BytePiece, source: Iterable[Text]) -> Iterator[bytes]:
    """The parts as normalised UTF-8; the last characters wait until what follows cannot change their normal form."""
    held = ""
    kind: type | None = None
    for part in source:
        kind = kind or (str if isinstance(part, str) else bytes)
        if isinstance(part, str) != (kind is str):
            raise TypeError(f"source must be all str or all bytes, got {type(part).__name__} after {kind.__name__}")
        if not isinstance(part, str):
            yield tokenizer.to_array(part, "source").tobytes()
            continue
        held += part
        cut = unicode.safe_cut(held)
        yield tokenizer.to_array(held[:cut], "source").tobytes()
        held = held[cut:]
    yield tokenizer.to_array(held, "source").tobytes()


def _stream(
    tokenizer: BytePiece, parts: Iterable[bytes], sampler: Sampler | None, state: np.ndarray
) -> Iterator[np.ndarray]:
    engine = tokenizer.engine
    pending = bytearray()
    # The score so far of a line whose beginning has left keeps sums, and so ties, what they are in the whole.
    score, limit = 0.0, PATIENCE

    def segment(end: int) -> np.ndarray:
        array = np.frombuffer(bytes(pending[:end]), np.uint8)
        del pending[:end]
        ids = engine.segment(array, score) if sampler is None else sampler.segment(array, state)[0]
        return ids + len(RESERVED)

    for part in parts:
        pending += part
        if (end := _last_start(pending)) > 0:
            yield segment(end)
            score, limit = 0.0, PATIENCE
        if len(pending) >= limit and sampler is None:
            size, pieces, score = engine.segment_open(np.frombuffer(bytes(pending), np.uint8), score)
            yield pieces + len(RESERVED)
            del pending[:size]
            limit = max(PATIENCE, 2 * len(pending))
    if pending:
        yield segment(len(pending))


def _last_start(data: bytearray) -> int:
    """Where the last line begins: after the last line feed that is followed by something else; 0 without one."""
    end = len(data.rstrip(b"\n"))
    return data.rfind(b"\n", 0, end) + 1


def decode_stream(tokenizer: BytePiece, ids: Iterable[int], *, errors: str = "replace") -> Iterator[str]:
    """Decode ids as they arrive; the bytes of an unfinished character are held back.

    Args:
        tokenizer: what decodes.
        ids: integers, special tokens are left out.
        errors: as for ``BytePiece.decode``.

    Yields:
        Non-empty parts of the text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    for identifier in ids:
        if part := decoder.decode(tokenizer.decode_bytes([identifier])):
            yield part
    if part := decoder.decode(b"", final=True):
        yield part
