"""Words of a text, as search, keywords and answers all see them.

Letters and digits after NFKC and case folding, accents removed; hyphenated parts apart; scripts that write no spaces
(Chinese, Japanese, Korean) as overlapping pairs of characters.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from importlib import resources

_WORD = re.compile(r"[^\W_]+")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0002fa1f]+")

#: Words of a query that are looked at.
QUERY_WORDS = 32


def fold(text: str) -> str:
    """Case and accents removed, compatible characters made one."""
    if text.isascii():
        return text.lower()
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    kept = "".join(c for c in decomposed if not unicodedata.combining(c))
    return unicodedata.normalize("NFC", kept).casefold()


def words(text: str) -> list[str]:
    """The words of a text in their order."""
    if text.isascii():
        # Most texts, at a fifth of the time.
        return _WORD.findall(text.lower())
    found: list[str] = []
    for match in _WORD.finditer(fold(text)):
        found.extend(_pieces(match.group()))
    return found


def query_words(text: str) -> list[str]:
    """The words of a query, each once, at most `QUERY_WORDS`."""
    return list(dict.fromkeys(words(text)))[:QUERY_WORDS]


@cache
def stop_words() -> frozenset[str]:
    """Words that say nothing about a subject."""
    text = (resources.files("danlu.papers") / "data" / "stop_words.txt").read_text(encoding="utf-8")
    return frozenset(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))


def _pieces(word: str) -> list[str]:
    """A word, or the pairs of characters where it is of a script without spaces."""
    pieces, place = [], 0
    for match in _CJK.finditer(word):
        if match.start() > place:
            pieces.append(word[place : match.start()])
        run = match.group()
        pieces.extend([run] if len(run) == 1 else [run[i : i + 2] for i in range(len(run) - 1)])
        place = match.end()
    if place < len(word):
        pieces.append(word[place:])
    return pieces
