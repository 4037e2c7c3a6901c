"""What protects readers and the site: response headers, form tokens, and limits of what one reader may ask for.

A form's token says that the page was loaded from here and when; that the browser sends it from a page of this site,
and not of another, say the headers that browsers add themselves. No cookie is needed, and nothing about a reader is
kept but how much of a limit is left, in memory.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Callable
from urllib.parse import parse_qsl, urlsplit

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from danlu.papers.ids import SOURCES
from danlu.papers.web.limits import Limiter, Proxies, network
from danlu.papers.web.state import Site

#: Of the form field with the token.
FIELD = "csrf_token"
#: How long a token holds: a tab may stay open for some days.
LASTING = 7 * 24 * 3600
#: Bytes of a form.
MOST_FORM = 16_384
_HOST = re.compile(r"(?:[A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?\Z")
_FORM = "danlu.form"


def policy() -> str:
    """The Content-Security-Policy: scripts, styles and fonts of this site alone, and PDF files from their sources."""
    hosts = sorted({f"https://{host}" for source in SOURCES.values() for host in source.hosts})
    rules = {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' data:",
        "font-src": "'self'",
        "connect-src": " ".join(["'self'", *hosts]),
        "worker-src": "'self' blob:",
        "manifest-src": "'self'",
        "frame-ancestors": "'none'",
        "base-uri": "'none'",
        "form-action": "'self'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def headers() -> dict[str, str]:
    """The headers of every response."""
    unused = (
        "accelerometer camera display-capture geolocation gyroscope magnetometer microphone midi payment usb".split()
    )
    return {
        "Content-Security-Policy": policy(),
        "X-Content-Type-Options": "nosniff",
        # Not "no-referrer": browsers would then hide where forms of this very site come from.
        "Referrer-Policy": "same-origin",
        "Permissions-Policy": ", ".join(f"{name}=()" for name in unused),
        "Cross-Origin-Opener-Policy": "same-origin",
    }


class Guard:
    """What the protection of a site remembers.

    Args:
        site: its secret, limits, proxies and admin token.
        clock: gives seconds since 1970, for tokens.
        ticks: gives seconds that never go back, for limits.

    Raises:
        ValueError: a trusted proxy that is no address.
    """

    def __init__(
        self, site: Site, clock: Callable[[], float] = time.time, ticks: Callable[[], float] = time.monotonic
    ) -> None:
        self.site, self.clock = site, clock
        self.proxies = Proxies(site.settings.trusted_proxies)
        self.limiter = Limiter(site.settings.limits, ticks)
        self._secret = site.store.secret("forms").encode()

    def sign(self, moment: int) -> str:
        """The token of a moment."""
        mark = hmac.new(self._secret, f"form:{moment}".encode(), hashlib.sha256).hexdigest()
        return f"{moment}.{mark}"

    def holds(self, token: str) -> bool:
        """Whether this is a token of this site that has not run out."""
        moment, _, _ = token.partition(".")
        if not (moment.isascii() and moment.isdigit() and len(moment) < 13):
            return False
        age = self.clock() - int(moment)
        return hmac.compare_digest(self.sign(int(moment)).encode(), token.encode()) and -60 <= age <= LASTING


class _Headers:
    """Adds the headers to every response, and turns down requests whose host is none."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.headers = app, headers()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if not all(_HOST.match(host) for host in hosts):
            await PlainTextResponse("the Host header is no name of a host", 400)(scope, receive, sending)
            return
        await self.app(scope, receive, sending)


def install(app: FastAPI, site: Site) -> None:
    """Protect an application: headers on every response, and what `token`, `require` and `limit` need."""
    app.state.guard = Guard(site)
    app.add_middleware(_Headers)


def token(request: Request) -> str:
    """The token for the forms of a page; it is the same for an hour, so that pages are."""
    guard: Guard = request.app.state.guard
    now = int(guard.clock())
    return guard.sign(now - now % 3600)


async def require(request: Request) -> None:
    """Let only forms and scripts of this site's own pages through.

    Raises:
        HTTPException: 403, the request comes from elsewhere or has no token that holds; 413, the form is too long.
    """
    guard: Guard = request.app.state.guard
    if not _from_here(request, guard.site.settings.public_url):
        raise HTTPException(403, "This request comes from a page of another site.")
    given = request.headers.get("X-CSRF-Token") or (await form(request)).get(FIELD, "")
    if not guard.holds(given):
        raise HTTPException(403, "The page is too old or not from here. Load it again, and repeat what you did.")


def _from_here(request: Request, public_url: str) -> bool:
    """Whether a page of this site sends the request, as far as a browser says: programs say nothing."""
    where = request.headers.get("Sec-Fetch-Site")
    if where is not None:
        return where in ("same-origin", "none")
    origin = request.headers.get("Origin")
    if origin is None:
        return True
    own = {request.headers.get("Host", "").lower()} | ({urlsplit(public_url).netloc.lower()} if public_url else set())
    scheme, _, host = origin.lower().partition("://")
    return scheme in ("http", "https") and host in own


async def form(request: Request) -> dict[str, str]:
    """The fields of a form that was sent URL-encoded, the last of each name; it can be read again.

    Raises:
        HTTPException: 413, it is longer than `MOST_FORM`.
    """
    if _FORM not in request.scope:
        body = b""
        if request.headers.get("Content-Type", "").partition(";")[0].strip() == "application/x-www-form-urlencoded":
            async for part in request.stream():
                body += part
                if len(body) > MOST_FORM:
                    raise HTTPException(413, f"A form has at most {MOST_FORM} bytes.")
        request.scope[_FORM] = dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))
    fields: dict[str, str] = request.scope[_FORM]
    return fields


def client(request: Request) -> str:
    """The address of the reader; a proxy's word is taken only where the operator trusts the proxy."""
    peer = request.client.host if request.client else ""
    guard: Guard = request.app.state.guard
    return guard.proxies.reader(peer, request.headers.getlist("X-Forwarded-For"))


def is_admin(request: Request) -> bool:
    """Whether the request carries the operator's token; how long the comparison takes tells nothing about it."""
    held = request.app.state.guard.site.settings.admin_token.get_secret_value()
    given = request.headers.get("X-Admin-Token", "")
    return bool(held) and hmac.compare_digest(held.encode(), given.encode())


def limit(request: Request, kind: str) -> None:
    """Take one of what this reader may ask for; the operator may ask for everything.

    Args:
        request: of the reader.
        kind: ``ask``, ``search``, ``fetch`` or ``count``.

    Raises:
        HTTPException: 429 with Retry-After, the reader or its network has used everything up.
        KeyError: an unknown kind.
    """
    if is_admin(request):
        return
    guard: Guard = request.app.state.guard
    address = client(request)
    wait = guard.limiter.take(kind, address, network(address))
    if wait:
        message = f"That was much in a short time. Please try again in {wait} seconds."
        raise HTTPException(429, message, {"Retry-After": str(wait)})


def base(request: Request) -> str:
    """The address under which readers reach the site, without a slash at its end."""
    public: str = request.app.state.guard.site.settings.public_url
    return (public or str(request.base_url)).rstrip("/")
