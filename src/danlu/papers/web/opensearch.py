"""What browsers and robots are told: the search description and robots.txt."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from danlu.papers.web import security

router = APIRouter(include_in_schema=False)

#: Addresses that cost work, or of which there is no end.
_NOT_FOR_ROBOTS = (
    "/answers/", "/api/", "/arxiv/search", "/count/", "/export", "/feed/", "/health", "/rel/", "/settings", "/starred",
    "/venue/search",
)  # fmt: skip


@router.get("/opensearch.xml")
def description(request: Request) -> Response:
    """How to search this site from the address bar."""
    base = security.base(request)
    root = ET.Element("OpenSearchDescription", xmlns="http://a9.com/-/spec/opensearch/1.1/")
    ET.SubElement(root, "ShortName").text = "danlu papers"
    ET.SubElement(root, "Description").text = "Titles and abstracts of papers"
    ET.SubElement(root, "InputEncoding").text = "UTF-8"
    for kind, path in (("text/html", "/arxiv/search"), ("application/atom+xml", "/feed/search")):
        ET.SubElement(root, "Url", type=kind, template=f"{base}{path}?query={{searchTerms}}")
    ET.SubElement(
        root, "Url", type="application/opensearchdescription+xml", rel="self", template=f"{base}/opensearch.xml"
    )
    return Response(
        ET.tostring(root, encoding="utf-8", xml_declaration=True),
        media_type="application/opensearchdescription+xml",
        headers={"Cache-Control": "max-age=86400"},
    )


@router.get("/robots.txt")
def robots() -> Response:
    """What robots should leave alone."""
    lines = ["User-agent: *", *(f"Disallow: {path}" for path in _NOT_FOR_ROBOTS), "Crawl-delay: 10", ""]
    return PlainTextResponse("\n".join(lines), headers={"Cache-Control": "max-age=86400"})
