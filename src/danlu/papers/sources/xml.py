"""Reading XML of others: no document types, no entities, and an error that says so when a page came instead."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from defusedxml import ElementTree
from defusedxml.common import DefusedXmlException


class BadDocument(ValueError):
    """A document that is not what its source promises: it must never count as an empty one."""


def parse_xml(body: bytes, what: str) -> Element:
    """The root of an XML document.

    Args:
        body: as fetched.
        what: it should be, for the error.

    Raises:
        BadDocument: no XML, a document type or an entity, or a web page.
    """
    start = body.lstrip()[:300].lower()
    if not start:
        raise BadDocument(f"expected {what}, got nothing")
    if start.startswith((b"<!doctype html", b"<html")):
        raise BadDocument(f"expected {what}, got a web page: the source may ask whether a person is reading")
    try:
        return ElementTree.fromstring(body, forbid_dtd=True, forbid_entities=True, forbid_external=True)
    except DefusedXmlException as error:
        raise BadDocument(f"expected {what}, got a document type or entity, which are refused: {error}") from error
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise BadDocument(f"expected {what}, got something that is not XML: {error}") from error


def text_of(element: Element | None) -> str:
    """All text inside an element, with white space folded."""
    return "" if element is None else " ".join("".join(element.itertext()).split())
