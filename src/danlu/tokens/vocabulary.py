"""The pieces of a byte-level unigram model with their counts, checked once where they enter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Pieces and how often each is used; all 256 single bytes are among them.

    Args:
        pieces: distinct non-empty byte strings. Published files order them by length, then by bytes.
        counts: one per piece, at least 1, int64.
        note: one sentence on how the vocabulary came about, such as why it is smaller than asked for.

    Raises:
        TypeError: a piece is not ``bytes``, or a count is not a whole number.
        ValueError: a piece is empty or occurs twice, a single byte is missing, a count is below 1, or the numbers
            differ.

    Source: Scientific Spaces archive 9752.
    """

    pieces: tuple[bytes, ...]
    counts: np.ndarray
    note: str = field(default="")

    def __post_init__(self) -> None:
        object.__setattr__(self, "pieces", tuple(self.pieces))
        object.__setattr__(self, "counts", _counts(self.counts))
        _check(self.pieces, self.counts)

    @classmethod
    def sorted(cls, items: Iterable[tuple[bytes, int]], note: str = "") -> Vocabulary:
        """From (piece, count) pairs in any order, by length, then by bytes."""
        ordered = sorted(items, key=lambda item: (len(item[0]), item[0]))
        return cls(tuple(piece for piece, _ in ordered), np.array([count for _, count in ordered]), note)

    def __len__(self) -> int:
        return len(self.pieces)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Vocabulary)
            and self.pieces == other.pieces
            and bool(np.array_equal(self.counts, other.counts))
        )

    __hash__ = None  # type: ignore[assignment]  # arrays are compared, not hashed

    @property
    def scores(self) -> np.ndarray:
        """Log probability of each piece, log(count) - log(sum of counts), float64."""
        return np.log(self.counts) - np.log(self.counts.sum())


def _counts(counts: Any) -> np.ndarray:
    array = np.asarray(counts)
    if array.size and array.dtype.kind not in "iu":
        bad = next((item for item in np.asarray(counts, object).tolist() if not isinstance(item, int)), array.dtype)
        raise TypeError(f"counts must be whole numbers that fit 64 bits, got {bad!r}")
    return array.astype(np.int64)


def _check(pieces: Sequence[bytes], counts: np.ndarray) -> None:
    wrong = next((piece for piece in pieces if not isinstance(piece, bytes)), None)
    if wrong is not None:
        raise TypeError(
            f"pieces must be bytes, got {wrong!r} of type {type(wrong).__name__}: encode text as UTF-8 first"
        )
    if len(pieces) != len(counts) or counts.ndim != 1:
        raise ValueError(f"counts must hold one number per piece, {len(pieces)}, got shape {counts.shape}")
    distinct = set(pieces)
    if b"" in distinct:
        raise ValueError(f"pieces must not be empty, got b'' at index {pieces.index(b'')}: remove it")
    if len(distinct) < len(pieces):
        seen: set[bytes] = set()
        twice = next(piece for piece in pieces if piece in seen or seen.add(piece))  # type: ignore[func-returns-value]
        raise ValueError(f"pieces must be distinct, got {twice!r} twice: add up their counts")
    missing = [byte for byte in range(256) if bytes([byte]) not in distinct]
    if missing:
        shown = ", ".join(f"0x{byte:02x}" for byte in missing[:4]) + (", ..." if len(missing) > 4 else "")
        raise ValueError(
            f"pieces must hold all 256 single bytes, {len(missing)} are missing: {shown}; add them with count 1"
        )
    if counts.min() < 1:
        at = int(counts.argmin())
        raise ValueError(f"counts must be at least 1, got {counts[at]} for piece {pieces[at]!r}")
