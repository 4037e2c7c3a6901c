"""From text to bytes and back to places in the text: normalisation, safe cuts, alignment of characters."""

from __future__ import annotations

import unicodedata

import numpy as np

#: Forms of Unicode normalisation that a tokenizer may ask for; None takes text as it is.
NORMALIZATIONS = ("nfc", None)


def check_normalization(normalization: str | None) -> str | None:
    """The argument, or a ValueError."""
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be 'nfc' or None, got {normalization!r}")
    return normalization


def normalize(text: str, normalization: str | None) -> str:
    """The text in normal form."""
    return text if normalization is None or text.isascii() else unicodedata.normalize("NFC", text)


def to_utf8(text: str, what: str = "text") -> bytes:
    """The bytes of a text.

    Raises:
        ValueError: a lone surrogate, which has no UTF-8 form.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} must be encodable as UTF-8, got the lone surrogate {text[error.start]!r} at character "
            f"{error.start}: replace it, such as by text.encode('utf-8', 'replace').decode()"
        ) from None


def is_utf8(data: bytes) -> bool:
    """Whether bytes are whole characters."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def is_boundary(character: str) -> bool:
    """Whether normalisation never joins or reorders this character with what stands before it."""
    code = ord(character)
    if code < 0x300:
        return True
    return not (
        unicodedata.combining(character)
        or unicodedata.category(character).startswith("M")
        or 0x1160 <= code <= 0x11FF  # Hangul vowels and final consonants join the syllable before them
    )


def safe_cut(text: str) -> int:
    """The last place where the text can be cut so that both sides are normalised alone, whatever follows."""
    at = len(text) - 1
    while at > 0 and not is_boundary(text[at]):
        at -= 1
    return max(at, 0)


def character_spans(text: str, normalized: str) -> tuple[np.ndarray, np.ndarray]:
    """Where each character of the normalised text comes from.

    Args:
        text: the original.
        normalized: its normal form.

    Returns:
        First and one-past-last character of ``text`` for each character of ``normalized``, (characters,), int64 each.
        Where several characters became others, each of these spans all of those.
    """
    if text == normalized:
        places = np.arange(len(text), dtype=np.int64)
        return places, places + 1
    cuts = [i for i, character in enumerate(text) if i == 0 or is_boundary(character)] + [len(text)]
    starts, ends = [], []
    for begin, end in zip(cuts, cuts[1:], strict=False):
        size = len(unicodedata.normalize("NFC", text[begin:end]))
        starts += [begin] * size
        ends += [end] * size
    return np.array(starts, np.int64), np.array(ends, np.int64)


def character_offsets(data: np.ndarray, byte_offsets: np.ndarray) -> np.ndarray:
    """Spans of bytes as spans of the characters they touch.

    Args:
        data: UTF-8 bytes, (length,), uint8.
        byte_offsets: non-empty spans, (tokens, 2), int64.

    Returns:
        Spans of characters, (tokens, 2), int64; two tokens that share a character both span it.
    """
    begun = np.cumsum((data & 0xC0) != 0x80)  # characters begun up to and including each byte
    return np.stack([begun[byte_offsets[:, 0]] - 1, begun[byte_offsets[:, 1] - 1]], axis=1).astype(np.int64)
