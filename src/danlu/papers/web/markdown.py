"""Answers in Markdown as HTML that is safe to show, whoever wrote them.

Formulas are taken out first and put back last, because Markdown would eat their underscores and backslashes. Raw HTML
and images are off, since the address of an image carries data away; links keep http and https alone, and say where
they lead. A sanitiser with an allow-list has the last word.
"""

from __future__ import annotations

import re
from functools import cache
from urllib.parse import urlsplit

import nh3
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from danlu.papers.web.formulas import element, pieces

_TAGS = frozenset("p br hr em strong s code pre blockquote ul ol li a span h5 h6 table thead tbody tr th td".split())
_ATTRIBUTES = {"a": {"href"}, "span": {"class"}, "ol": {"start"}}
#: Characters for private use stand for formulas; a text that has them itself loses them.
_OPEN, _CLOSE = "\ue000", "\ue001"
_PLACE = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")


def to_html(text: str) -> Markup:
    """Render Markdown that nobody vouches for."""
    formulas: list[Markup] = []
    protected: list[str] = []
    for kind, part in pieces(text.replace(_OPEN, "").replace(_CLOSE, "").replace("\x00", "")):
        if kind == "text":
            protected.append(part)
        else:
            protected.append(f"{_OPEN}{len(formulas)}{_CLOSE}")
            formulas.append(element(kind, part))
    parser = _parser()
    tokens = parser.parse("".join(protected))
    _tame(tokens)
    html = nh3.clean(
        parser.renderer.render(tokens, parser.options, {}),
        tags=set(_TAGS),
        attributes={tag: set(names) for tag, names in _ATTRIBUTES.items()},
        attribute_filter=_allowed,
        url_schemes={"http", "https"},
        link_rel="noopener noreferrer nofollow",
    )
    return Markup(_PLACE.sub(lambda match: str(formulas[int(match.group(1))]), html))


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "linkify": False})
    return parser.enable(["table", "strikethrough"]).disable("image")


def _allowed(tag: str, name: str, value: str) -> str | None:
    if name == "href":
        return value if _host(value) else None
    if name == "class":
        return value if value == "host" else None
    return value


def _host(address: str) -> str:
    """The host of an absolute http or https address; empty where it is none."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return ""
    return (parts.hostname or "") if parts.scheme in ("http", "https") else ""


def _tame(tokens: list[Token]) -> None:
    """Headings below those of the page, and the host behind every link."""
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = "h5" if token.tag in ("h1", "h2", "h3") else "h6"
        if token.children:
            token.children = _with_hosts(token.children)


def _with_hosts(tokens: list[Token]) -> list[Token]:
    found: list[Token] = []
    host = ""
    for token in tokens:
        found.append(token)
        if token.type == "link_open":
            host = _host(str(token.attrGet("href") or ""))
        elif token.type == "link_close" and host:
            opening = Token("host_open", "span", 1, attrs={"class": "host"})
            found += [opening, Token("text", "", 0, content=f" [{host}]"), Token("host_close", "span", -1)]
    return found
