"""Label sentences: published templates by name, and the filling in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

__all__ = ["TEMPLATES", "Position", "Template", "find_template", "label_sentences"]

#: Whether the label sentence comes before the text or behind it.
Position = Literal["prefix", "suffix"]


class Template(NamedTuple):
    """A sentence with ``{}`` where the label goes, and its side of the text."""

    text: str
    position: Position = "prefix"


#: Full sentences from the source. Bare labels (``{}``) are worse in general; for DBpedia they were best.
TEMPLATES = {
    "news-zh": Template("这是一则{}新闻"),
    "app-zh": Template("这是一款{}类软件"),
    "paper-zh": Template("这是一篇{}类论文"),
    "purchase-zh": Template("这次买的东西{}"),
    "news-en": Template("The above news is about {}"),
    "film-en": Template("After watching this movie, I think it's {}"),
    "product-en": Template("I think it is {}"),
    "opinion-en": Template("That is {}", "suffix"),
    "topic-en": Template("{}", "suffix"),
}


def find_template(template: str, position: Position | None = None) -> Template:
    """A template by its text, or by its name in ``TEMPLATES``.

    Args:
        template: a sentence with ``{}`` where the label goes, or a name.
        position: side of the label sentence; None is that of the named template, or ``prefix``.

    Returns:
        Text and side.

    Raises:
        ValueError: no ``{}`` and no known name, or an unknown side.
    """
    if position is not None and position not in get_args(Position):
        raise ValueError(f"position must be prefix or suffix, got {position!r}")
    found = TEMPLATES.get(template)
    if found is None and "{}" not in template:
        raise ValueError(
            f"template must hold {{}} where the label goes, or be one of {', '.join(TEMPLATES)}, got {template!r}"
        )
    found = found or Template(template)
    return found if position is None else found._replace(position=position)


def label_sentences(
    labels: Sequence[str] | Mapping[str, str], template: Template, fewest: int = 2
) -> tuple[list[str], list[str]]:
    """Names of the labels, and the sentence of each.

    Args:
        labels: names, which also go into the template; or name to what goes into the template in its place.
        template: where they go.
        fewest: how many there must be.

    Returns:
        Names and sentences.

    Raises:
        ValueError: too few labels, empty ones, or two that are equal.
    """
    if isinstance(labels, str):
        raise ValueError(f"labels must be a list of strings, got the string {labels!r}")
    names = list(labels)
    words = [labels[name] for name in names] if isinstance(labels, Mapping) else names
    if len(names) < fewest:
        raise ValueError(f"labels must be at least {fewest}, got {len(names)}: {names}")
    for what, values in (("labels", names), ("label words", words)):
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(f"{what} must differ, got {twice[0]!r} more than once")
        if not all(value.strip() for value in values):
            raise ValueError(f"{what} must not be empty, got {values}")
    return names, [template.text.replace("{}", word) for word in words]
