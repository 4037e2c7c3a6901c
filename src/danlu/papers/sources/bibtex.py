"""Reading BibTeX: entries with braced, quoted and joined values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from danlu.papers.sources.latex import plain, without_braces

_START = re.compile(r"@\s*([A-Za-z]+)\s*[{(]")
_NAME = re.compile(r"\s*([A-Za-z][\w+:.-]*)\s*=\s*")
_BARE = re.compile(r"\s*([\w.:+-]+)")
_MONTHS = {name: name for name in "jan feb mar apr may jun jul aug sep oct nov dec".split()}
_IGNORED = frozenset({"comment", "preamble"})


@dataclass(frozen=True)
class Entry:
    """An entry: its kind and key, and its fields by lower-case name, as written."""

    kind: str
    key: str
    fields: dict[str, str]

    def text(self, name: str) -> str:
        """A field as plain text: accents as letters, braces gone, white space folded; empty where it is absent."""
        return plain(without_braces(plain(self.fields.get(name, ""))))


class BadEntry(ValueError):
    """An entry that does not end, or has no value where one must be."""


def parse_bibtex(text: str) -> Iterator[Entry | BadEntry]:
    """The entries of a file in order; those that cannot be read come as errors, and the next one is looked for.

    Args:
        text: of the file.
    """
    strings = dict(_MONTHS)
    place = 0
    while match := _START.search(text, place):
        kind = match.group(1).lower()
        place = match.end()
        if kind in _IGNORED:
            continue
        try:
            entry, place = _entry(text, place, kind, strings)
        except BadEntry as error:
            yield error
            continue
        if kind == "string":
            strings.update(entry.fields)
        else:
            yield entry


def names(field: str) -> tuple[str, ...]:
    """Authors of a field: joined by "and", each as "First Last" or "Last, First" or "Last, Jr, First"."""
    found = []
    for part in re.split(r"\s+and\s+", " ".join(field.split())):
        pieces = [plain(without_braces(plain(piece))).strip() for piece in _split_commas(part)]
        if len(pieces) == 2:
            pieces = [pieces[1], pieces[0]]
        elif len(pieces) >= 3:
            pieces = [pieces[2], pieces[0], pieces[1]]
        name = " ".join(piece for piece in pieces if piece)
        if name and name.lower() != "others":
            found.append(name)
    return tuple(found)


def _split_commas(text: str) -> list[str]:
    """Parts of a name: commas inside braces do not part them."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    return [*parts, current]


def _entry(text: str, place: int, kind: str, strings: dict[str, str]) -> tuple[Entry, int]:
    key = ""
    if kind != "string":
        end = re.compile(r"[,})]").search(text, place)
        if end is None:
            raise BadEntry(f"an entry of kind {kind!r} does not end")
        key, place = text[place : end.start()].strip(), end.start()
    fields: dict[str, str] = {}
    while True:
        place = _skip(text, place)
        if place >= len(text):
            raise BadEntry(f"entry {key!r} does not end")
        if text[place] in "})":
            return Entry(kind, key, fields), place + 1
        name = _NAME.match(text, place)
        if name is None:
            raise BadEntry(f"expected a field in entry {key!r}, got {text[place : place + 20]!r}")
        value, place = _value(text, name.end(), strings)
        fields.setdefault(name.group(1).lower(), value)


def _skip(text: str, place: int) -> int:
    while place < len(text) and (text[place].isspace() or text[place] == ","):
        place += 1
    return place


def _value(text: str, place: int, strings: dict[str, str]) -> tuple[str, int]:
    parts = []
    while True:
        while place < len(text) and text[place].isspace():
            place += 1
        if place >= len(text):
            raise BadEntry("a value is missing at the end")
        if text[place] in '{"':
            part, place = _delimited(text, place)
        else:
            bare = _BARE.match(text, place)
            if bare is None:
                raise BadEntry(f"expected a value, got {text[place : place + 20]!r}")
            part, place = strings.get(bare.group(1).lower(), bare.group(1)), bare.end()
        parts.append(part)
        following = re.compile(r"\s*#").match(text, place)
        if following is None:
            return "".join(parts), place
        place = following.end()


def _delimited(text: str, place: int) -> tuple[str, int]:
    closing = "}" if text[place] == "{" else '"'
    start, depth = place + 1, 0
    place += 1
    while place < len(text):
        character = text[place]
        if character == "\\":
            place += 2
            continue
        if character == closing and depth == 0:
            return text[start:place], place + 1
        depth += (character == "{") - (character == "}")
        place += 1
    raise BadEntry(f"a value does not end: {text[start : start + 40]!r}")
