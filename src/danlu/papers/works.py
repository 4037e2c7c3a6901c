"""Telling whether two records may be one work: the same title by the same first author."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from hashlib import blake2b

#: Shorter titles, such as "Preface", are borne by many works.
_LETTERS = 20
_REST = re.compile(r"[\W_]+")


def fingerprint(title: str, authors: Sequence[str]) -> int | None:
    """A number that is the same for records of one work, up to case, accents, signs and first names.

    Args:
        title: of the record.
        authors: full names, the first of them first.

    Returns:
        A number of 63 bits, or None where the record does not say enough.
    """
    letters = _letters(title)
    if len(letters) < _LETTERS or not authors:
        return None
    names = authors[0].partition(",")[0].split()
    text = f"{letters} {_letters(names[-1]) if names else ''}"
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()) >> 1


def _letters(text: str) -> str:
    folded = text.casefold()
    if not folded.isascii():
        folded = "".join(each for each in unicodedata.normalize("NFKD", folded) if not unicodedata.combining(each))
    return _REST.sub("", folded)
