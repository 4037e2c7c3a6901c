"""The application: every route of a site, ready for any ASGI server."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.gzip import GZipMiddleware

from danlu.papers.web import (
    answers,
    api,
    assets,
    counting,
    errors,
    exports,
    feeds,
    health,
    home,
    lists,
    opensearch,
    related,
    rendering,
    searching,
    security,
    venues,
)
from danlu.papers.web.cache import Cache
from danlu.papers.web.state import Site


def create_app(site: Site) -> FastAPI:
    """Make the application of a site.

    Args:
        site: opened by `danlu.papers.web.state.open_site`; whoever opened it closes it.

    Returns:
        An ASGI application. It starts no worker: see `danlu.papers.serving`.
    """
    app = FastAPI(title="danlu papers", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.site = site
    app.state.cache = Cache(site.store)
    app.state.pages = rendering.Pages(site)
    security.install(app, site)
    app.add_middleware(GZipMiddleware, minimum_size=600, compresslevel=5)
    errors.install(app)
    assets.install(app)
    for part in (health, opensearch, api, feeds, exports, home, counting, answers, related, searching, venues, lists):
        app.include_router(part.router)
    return app
