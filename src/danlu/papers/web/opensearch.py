"""What browsers and crawlers ask a site for: its search description, and where they may go."""

from __future__ import annotations

from xml.etree.ElementTree import Element, SubElement, tostring

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

router = APIRouter()

_ROBOTS = """User-agent: *
Disallow: /answers/
Disallow: /arxiv/search
Disallow: /venue/search
Disallow: /rel/
Disallow: /export
Disallow: /starred
Disallow: /settings
Disallow: /api/
"""


@router.get("/opensearch.xml")
def description(request: Request) -> Response:
    """How a browser searches this site from its address bar."""
    base = (request.app.state.site.settings.public_url or str(request.base_url)).rstrip("/")
    root = Element("OpenSearchDescription", {"xmlns": "http://a9.com/-/spec/opensearch/1.1/"})
    SubElement(root, "ShortName").text = "danlu papers"
    SubElement(root, "Description").text = "Search the papers of this site"
    SubElement(root, "InputEncoding").text = "UTF-8"
    SubElement(root, "Url", {"type": "text/html", "template": f"{base}/arxiv/search?query={{searchTerms}}"})
    feed = f"{base}/feed/search?query={{searchTerms}}"
    SubElement(root, "Url", {"type": "application/atom+xml", "template": feed})
    body = b'<?xml version="1.0" encoding="utf-8"?>\n' + tostring(root, encoding="utf-8")
    return Response(body, media_type="application/opensearchdescription+xml")


@router.get("/robots.txt")
def robots() -> Response:
    """Where crawlers may not go: what costs something, and what is a reader's own."""
    return PlainTextResponse(_ROBOTS)
