"""What a vocabulary is made of, in numbers and examples."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from danlu.tokens.unicode import is_utf8

if TYPE_CHECKING:
    from danlu.tokens.bytepiece import BytePiece

_LIMITS = (1, 2, 3, 4, 6, 9, 13, 19)


@dataclass(frozen=True)
class LengthClass:
    """Pieces of similar length.

    Args:
        shortest: bytes.
        longest: bytes.
        pieces: how many.
        share: of the bytes of the training text that they wrote, by count * length.
        examples: the most frequent ones.
    """

    shortest: int
    longest: int
    pieces: int
    share: float
    examples: tuple[bytes, ...]


@dataclass(frozen=True)
class VocabularyFacts:
    """Facts about a tokenizer.

    Args:
        vocab_size: ids, special tokens included.
        special_tokens: their names.
        normalization: ``"nfc"`` or None.
        multi_byte: pieces of two bytes or more; the rest are the 256 single bytes.
        with_space: of these, those that hold a space.
        with_line_feed: of these, those that end in a line feed.
        not_utf8: of these, those that are no valid UTF-8 on their own.
        longest: the longest pieces, longest first.
        lowest_score: log probability of the rarest piece.
        highest_score: of the most frequent.
        uses: sum of all counts.
        bytes_per_use: mean length of a piece over the training text.
        classes: pieces by length.
        note: how the vocabulary came about.
    """

    vocab_size: int
    special_tokens: tuple[str, ...]
    normalization: str | None
    multi_byte: int
    with_space: int
    with_line_feed: int
    not_utf8: int
    longest: tuple[bytes, ...]
    lowest_score: float
    highest_score: float
    uses: int
    bytes_per_use: float
    classes: tuple[LengthClass, ...]
    note: str


def vocabulary_facts(tokenizer: BytePiece, *, examples: int = 8) -> VocabularyFacts:
    """Facts about the vocabulary of a tokenizer.

    Args:
        tokenizer: what is described.
        examples: pieces named for each length class, and as the longest.
    """
    pieces, counts = tokenizer.vocabulary.pieces, tokenizer.vocabulary.counts
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    scores = tokenizer.vocabulary.scores
    written = lengths.astype(np.float64) * counts
    multi = [piece for piece in pieces if len(piece) > 1]
    classes = []
    for low, high in pairwise((*_LIMITS, int(lengths.max()) + 1)):
        inside = np.flatnonzero((lengths >= low) & (lengths < high))
        if inside.size:
            top = inside[np.argsort(-counts[inside], kind="stable")][:examples]
            share = float(written[inside].sum() / written.sum())
            named = tuple(pieces[i] for i in top)
            classes.append(LengthClass(low, int(lengths[inside].max()), inside.size, share, named))
    return VocabularyFacts(
        vocab_size=tokenizer.vocab_size,
        special_tokens=tokenizer.special_tokens,
        normalization=tokenizer.normalization,
        multi_byte=len(multi),
        with_space=sum(b" " in piece for piece in multi),
        with_line_feed=sum(piece.endswith(b"\n") for piece in multi),
        not_utf8=sum(not is_utf8(piece) for piece in multi),
        longest=longest_pieces(tokenizer, examples),
        lowest_score=float(scores.min()),
        highest_score=float(scores.max()),
        uses=int(counts.sum()),
        bytes_per_use=float(written.sum() / counts.sum()),
        classes=tuple(classes),
        note=tokenizer.vocabulary.note,
    )


def longest_pieces(tokenizer: BytePiece, number: int = 8) -> tuple[bytes, ...]:
    """The longest pieces, of equal ones the more frequent first."""
    pairs = zip(tokenizer.vocabulary.pieces, tokenizer.vocabulary.counts.tolist(), strict=True)
    ranked = sorted(pairs, key=lambda pair: (-len(pair[0]), -pair[1], pair[0]))
    return tuple(piece for piece, _ in ranked[:number])


def readable(piece: bytes) -> str:
    """A piece for the eye: spaces as ``▁``, control characters and broken bytes as escapes.

    It is not meant to be read back, as a piece may hold ``▁`` itself.
    """
    text = piece.replace(b"\\", b"\\\\").decode(errors="backslashreplace")
    names = {" ": "▁", "\n": r"\n", "\r": r"\r", "\t": r"\t"}
    return "".join(names.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)
