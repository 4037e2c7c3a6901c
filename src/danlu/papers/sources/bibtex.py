"""Reading BibTeX: entries with braced, quoted and joined values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from danlu.papers.sources.latex import plain, without_braces

_START = re.compile(r"@\s*([A-Za-z]+)\s*[{(]")
_NAME = re.compile(r"\s*([A-Za-z][\w+:.-]*)\s*=\s*")
#: What matters inside a value: escapes, braces, quotes, and a line that begins the next entry.
_MARKS = re.compile(r'\\.|[{}"]|^@\s*[A-Za-z]+\s*[{(]', re.DOTALL | re.MULTILINE)
_AND, _COMMA = re.compile(r"[{}]|\s+and\s+"), re.compile(r"[{},]")
_JOIN = re.compile(r"\s*#")
_SPACE = re.compile(r"\s*")
_SEPARATORS = re.compile(r"[\s,]*")
_KEY = re.compile(r"[^,})\n]*")
#: Longest value: names of strings joined again and again would grow without end.
_LONGEST = 2**20
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
    """An entry that does not end, or has no value where one must be.

    Attributes:
        resume: the place where the next entry may be looked for, or None at the end of the text.
    """

    def __init__(self, message: str, resume: int | None) -> None:
        super().__init__(message)
        self.resume = resume


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
            # Nothing ends an entry that runs into the end, nor those inside it.
            place = error.resume if error.resume is not None else len(text)
            continue
        if kind == "string":
            strings.update(entry.fields)
        else:
            yield entry


def names(field: str) -> tuple[str, ...]:
    """Authors of a field: joined by "and", each as "First Last" or "Last, First" or "Last, Jr, First"."""
    found = []
    for part in _split(_AND, " ".join(field.split())):
        pieces = [plain(without_braces(plain(piece))).strip() for piece in _split(_COMMA, part)]
        if len(pieces) == 2:
            pieces = [pieces[1], pieces[0]]
        elif len(pieces) >= 3:
            pieces = [pieces[2], pieces[0], pieces[1]]
        name = " ".join(piece for piece in pieces if piece)
        if name and name.lower() != "others":
            found.append(name)
    return tuple(found)


def _split(mark: re.Pattern[str], text: str) -> list[str]:
    """Parts of a text between marks; those inside braces do not part it."""
    parts, depth, start = [], 0, 0
    for match in mark.finditer(text):
        sign = match.group()
        if sign in "{}":
            depth += 1 if sign == "{" else -1
        elif depth <= 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]


def _entry(text: str, place: int, kind: str, strings: dict[str, str]) -> tuple[Entry, int]:
    key = ""
    if kind != "string":
        found = _KEY.match(text, place)
        assert found is not None
        key, place = found.group().strip(), found.end()
    fields: dict[str, str] = {}
    while True:
        place = _after(_SEPARATORS, text, place)
        if place >= len(text):
            raise BadEntry(f"entry {key[:60]!r} does not end", None)
        if text[place] in "})":
            return Entry(kind, key, fields), place + 1
        name = _NAME.match(text, place)
        if name is None:
            raise BadEntry(f"expected a field in entry {key[:60]!r}, got {text[place : place + 20]!r}", place)
        value, place = _value(text, name.end(), strings)
        fields.setdefault(name.group(1).lower(), value)


def _after(pattern: re.Pattern[str], text: str, place: int) -> int:
    match = pattern.match(text, place)
    return match.end() if match else place


def _value(text: str, place: int, strings: dict[str, str]) -> tuple[str, int]:
    parts = []
    while True:
        place = _after(_SPACE, text, place)
        if place >= len(text):
            raise BadEntry("a value is missing at the end", None)
        if text[place] in '{"':
            part, place = _delimited(text, place)
        else:
            bare = _BARE.match(text, place)
            if bare is None:
                raise BadEntry(f"expected a value, got {text[place : place + 20]!r}", place)
            part, place = strings.get(bare.group(1).lower(), bare.group(1)), bare.end()
        parts.append(part)
        if sum(map(len, parts)) > _LONGEST:
            raise BadEntry(f"a value has more than {_LONGEST} characters", place)
        following = _JOIN.match(text, place)
        if following is None:
            return "".join(parts), place
        place = following.end()


def _delimited(text: str, place: int) -> tuple[str, int]:
    closing = "}" if text[place] == "{" else '"'
    start, depth = place + 1, 0
    for mark in _MARKS.finditer(text, start):
        sign = mark.group()
        if sign == closing and depth <= 0:
            return text[start : mark.start()], mark.end()
        if sign[0] == "@":
            raise BadEntry(f"a value does not end before the next entry: {text[start : start + 40]!r}", mark.start())
        depth += (sign == "{") - (sign == "}")
    raise BadEntry(f"a value does not end: {text[start : start + 40]!r}", None)
