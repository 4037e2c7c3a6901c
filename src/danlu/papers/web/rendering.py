"""Pages from templates: everything is escaped once, by the template."""

from __future__ import annotations

from datetime import date, datetime
from typing import TYPE_CHECKING, Any

import jinja2
from starlette.requests import Request
from starlette.responses import HTMLResponse

from danlu.papers.web import assets, security
from danlu.papers.web.formulas import has_formulas, to_html
from danlu.papers.web.views import address, papers_url, web_address

if TYPE_CHECKING:
    from danlu.papers.web.state import Site


class Pages:
    """The templates of a site.

    Args:
        site: whose settings every page knows.
    """

    def __init__(self, site: Site) -> None:
        self.environment = jinja2.Environment(
            loader=jinja2.PackageLoader("danlu.papers.web", "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self.environment.globals.update(
            settings=site.settings,
            can_ask=site.engine is not None,
            math=to_html,
            has_formulas=has_formulas,
            asset=assets.address,
            address=address,
            papers_url=papers_url,
            web_address=web_address,
        )
        self.environment.filters.update(day=_day, minute=_minute)

    def render(self, request: Request, name: str, status: int = 200, **values: Any) -> HTMLResponse:
        """A page, or a fragment of one where the browser asks for the next part of a list."""
        template = self.environment.get_template(name)
        text = template.render(request=request, csrf=security.token(request), **values)
        return HTMLResponse(text, status, {"Vary": "HX-Request", "Cache-Control": "no-cache"})


def is_fragment(request: Request) -> bool:
    """Whether a script of the page asks, which needs no frame around the answer."""
    return request.headers.get("HX-Request") == "true"


def _day(value: date | None) -> str:
    return "" if value is None else value.isoformat()


def _minute(value: datetime | None) -> str:
    return "" if value is None else f"{value:%Y-%m-%d %H:%M}"
