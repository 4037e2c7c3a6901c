"""What is wrong with a request, as a page that names it."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from danlu.papers.web.models import Problem

#: Paths for programs: they get a problem document (RFC 9457).
_PROGRAMS = ("/api/", "/health")
_TITLES = {
    400: "This cannot be read",
    403: "Not allowed",
    404: "Not found",
    405: "Not allowed",
    429: "Too many requests",
}


class BadRequest(Exception):
    """Something in the address that cannot be read.

    Attributes:
        token: the offending part.
    """

    def __init__(self, message: str, token: str = "") -> None:
        super().__init__(message)
        self.token = token


class Unknown(Exception):
    """Something that the site does not have.

    Attributes:
        links: where else to look: text and address.
    """

    def __init__(self, message: str, links: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.links = links


def install(app: FastAPI) -> None:
    """Let the application answer errors with pages, and with JSON where a program asks."""

    def bad(request: Request, error: Exception) -> Response:
        return _answer(request, 400, str(error), getattr(error, "token", ""))

    def unknown(request: Request, error: Exception) -> Response:
        return _answer(request, 404, str(error), links=getattr(error, "links", ()))

    def other(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        message = str(error.detail)
        if error.status_code == 404 and message == "Not Found":
            message = f"There is no page {request.url.path[:200]}."
        return _answer(request, error.status_code, message, headers=dict(error.headers or {}))

    def invalid(request: Request, error: Exception) -> Response:
        if not isinstance(error, RequestValidationError):
            raise error
        first = error.errors()[0]
        given = first.get("input")
        place = ".".join(str(part) for part in first["loc"][1:])
        return _answer(request, 400, f"{place}: {first['msg']}", "" if given is None else str(given)[:200])

    app.add_exception_handler(BadRequest, bad)
    app.add_exception_handler(Unknown, unknown)
    app.add_exception_handler(HTTPException, other)
    app.add_exception_handler(RequestValidationError, invalid)


def _answer(
    request: Request,
    status: int,
    message: str,
    token: str = "",
    links: tuple[tuple[str, str], ...] = (),
    headers: dict[str, str] | None = None,
) -> Response:
    if request.url.path.startswith(_PROGRAMS):
        problem = Problem(title=_TITLES.get(status, "Error"), status=status, detail=message, token=token[:200])
        return JSONResponse(problem.model_dump(), status, headers, "application/problem+json")
    response = request.app.state.pages.render(
        request, "error.html", status, title=_TITLES.get(status, "Error"), message=message, token=token, links=links
    )
    response.headers.update(headers or {})
    return response
