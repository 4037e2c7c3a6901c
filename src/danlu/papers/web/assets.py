"""Static files: under an address with the hash of them all they never change, so that browsers keep them."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(str(resources.files("danlu.papers.web"))) / "static"


@cache
def digest() -> str:
    """A hash of every static file."""
    total = hashlib.sha256()
    for path in sorted(FOLDER.rglob("*")):
        if path.is_file():
            total.update(path.relative_to(FOLDER).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:12]


def address(path: str) -> str:
    """Where a static file is served."""
    return f"/static/{digest()}/{path}"


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        first, _, rest = path.partition("/")
        response = await super().get_response(rest if first == digest() else path, scope)
        response.headers["Cache-Control"] = (
            "public, max-age=31536000, immutable" if first == digest() else "public, max-age=300"
        )
        return response


def install(app: FastAPI) -> None:
    """Serve the static files below ``/static``."""
    # Some systems know no type for modules and fonts, and a browser refuses a module of another type.
    import mimetypes

    for kind, suffix in (("text/javascript", ".mjs"), ("text/javascript", ".js"), ("font/woff2", ".woff2")):
        mimetypes.add_type(kind, suffix)
    app.mount("/static", _Files(directory=FOLDER))
