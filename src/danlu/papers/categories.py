"""Subject categories of arXiv, and the expressions that combine them: ``cs.AI+cs.LG-cs.CY``.

An expression is a union of categories less a union of others. A name of a group (``cs``, ``math``, ``physics``) stands
for itself and everything under it. Some categories have two names: a paper in one is in the other.

Source: arXiv's category taxonomy; Scientific Spaces archives 9920 and 9978.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources

#: Second names, and the one that is shown.
ALIASES = {
    "cs.NA": "math.NA",
    "cs.SY": "eess.SY",
    "math.IT": "cs.IT",
    "math.MP": "math-ph",
    "q-fin.EC": "econ.GN",
    "stat.TH": "math.ST",
}
#: The wider set of archives that arXiv files under physics; ``physics`` alone means physics and physics.*.
PHYSICS_GROUP = "physics-group"

_OPERATORS = ",+-"


@dataclass(frozen=True)
class Category:
    """One name of the vocabulary: its group, its archive, what it is called, and whether it still takes papers."""

    group: str
    archive: str
    code: str
    name: str
    active: bool


class InvalidExpression(ValueError):
    """A subject expression that cannot be read.

    Attributes:
        rest: the part of the expression from the place that cannot be read.
    """

    def __init__(self, message: str, rest: str) -> None:
        super().__init__(message)
        self.rest = rest


@cache
def vocabulary() -> dict[str, Category]:
    """Every category by its code, in the order in which the source lists them."""
    text = (resources.files("danlu.papers") / "data" / "categories.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return {
        row["category"]: Category(row["group"], row["archive"], row["category"], row["name"], row["active"] == "1")
        for row in rows
    }


@cache
def members(name: str) -> frozenset[str]:
    """The codes that a name stands for, second names included: those under which a stored paper belongs to it."""
    if name == PHYSICS_GROUP:
        found = {code for code, category in vocabulary().items() if category.group == PHYSICS_GROUP}
    else:
        found = {code for code in vocabulary() if code == name or code.startswith(name + ".")}
    pairs = {**ALIASES, **{shown: second for second, shown in ALIASES.items()}}
    return frozenset(found | {pairs[code] for code in found if code in pairs})


def belongs(categories: Iterable[str], name: str) -> bool:
    """Whether a paper of these categories is in the category or group ``name``."""
    return not members(name).isdisjoint(categories)


def shown(categories: Iterable[str]) -> tuple[str, ...]:
    """Categories as a reader sees them: one name for those that have two, each once, in their order."""
    return tuple(dict.fromkeys(ALIASES.get(code, code) for code in categories))


def split_codes(entries: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Separate the categories in a category field from the ACM and MSC codes that authors write there."""
    categories: list[str] = []
    codes: list[str] = []
    for entry in entries:
        (categories if entry in vocabulary() else codes).append(entry)
    return tuple(dict.fromkeys(categories)), tuple(dict.fromkeys(codes))


@dataclass(frozen=True)
class Expression:
    """Categories that are wanted and categories that are not: sorted, each once, in shown names."""

    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "+".join(self.include) + "".join("-" + name for name in self.exclude)

    def codes(self) -> tuple[frozenset[str], frozenset[str]]:
        """Codes of the wanted and the unwanted categories: a paper needs one of the first, none of the second."""
        return (
            frozenset().union(*(members(name) for name in self.include)),
            frozenset().union(*(members(name) for name in self.exclude)),
        )

    def matches(self, categories: Iterable[str]) -> bool:
        """Whether a paper of these categories is in the set."""
        wanted, unwanted = self.codes()
        own = frozenset(categories)
        return not own.isdisjoint(wanted) and own.isdisjoint(unwanted)


def parse_expression(text: str) -> Expression:
    """Read a subject expression.

    Args:
        text: categories or groups joined by ``,`` or ``+`` (or) and ``-`` (not in), such as ``cs.AI+cs.LG-cs.CY``.
            Names are the longest that fit, because they contain hyphens themselves.

    Returns:
        The expression in its canonical form: ``str()`` of it is the same for all that mean the same.

    Raises:
        InvalidExpression: empty, an unknown name, a missing or doubled operator; with the rest from there.
    """
    if len(text) > 2000:
        raise InvalidExpression("a subject expression has at most 2000 characters", text[2000:2040])
    include: set[str] = set()
    exclude: set[str] = set()
    target, place = include, 0
    while True:
        name = _longest_name(text, place)
        if name is None:
            rest = text[place:]
            raise InvalidExpression(
                f"expected a category such as cs.AI at {rest[:40]!r}" if rest else "a category is missing at the end",
                rest,
            )
        target.add(ALIASES.get(name, name))
        place += len(name)
        if place == len(text):
            return Expression(tuple(sorted(include)), tuple(sorted(exclude)))
        target = exclude if text[place] == "-" else include
        place += 1


def _longest_name(text: str, place: int) -> str | None:
    """The longest name of the vocabulary at this place that an operator or the end follows."""
    for name in _by_length():
        after = place + len(name)
        if text.startswith(name, place) and (after == len(text) or text[after] in _OPERATORS):
            return name
    return None


@cache
def _by_length() -> tuple[str, ...]:
    return tuple(sorted((*vocabulary(), PHYSICS_GROUP), key=len, reverse=True))
