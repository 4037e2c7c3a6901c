"""What protects readers and the site: headers, tokens of forms, and limits on what one reader may ask for."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Literal
from urllib.parse import parse_qs

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from danlu.papers.ids import SOURCES
from danlu.papers.settings import LimitSettings
from danlu.papers.web.state import Site

Limited = Literal["ask", "search", "fetch", "count"]
COOKIE, HEADER, FIELD = "danlu_form", "x-csrf-token", "csrf_token"
#: A network of addresses may do so many times what one address may.
NETWORK = 4
#: Buckets kept: the ones that were not used longest go first.
_BUCKETS = 20_000
_BODY = 64 * 1024


def policy(hosts: list[str]) -> str:
    """The Content-Security-Policy: nothing but our own files, and PDFs from the sources' own hosts."""
    sources = " ".join(f"https://{host}" for host in hosts)
    return "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self' data: blob:",
            "font-src 'self'",
            f"connect-src 'self' {sources}",
            "worker-src 'self' blob:",
            "manifest-src 'self'",
            "form-action 'self'",
            "base-uri 'none'",
            "frame-ancestors 'none'",
            "object-src 'none'",
        )
    )


def install(app: FastAPI, site: Site) -> None:
    """Let every answer carry the headers, and give forms their tokens and readers their limits."""
    app.state.guard = Guard(site.store.secret("forms"), site.settings.limits, frozenset(site.settings.trusted_proxies))
    app.state.admin_token = site.settings.admin_token.get_secret_value()
    hosts = sorted({host for source in SOURCES.values() for host in source.hosts})
    app.add_middleware(_Headers, policy=policy(hosts))


@dataclass
class _Bucket:
    tokens: float
    moment: float


@dataclass
class Guard:
    """Tokens of forms, and buckets of readers.

    Args:
        secret: of the installation.
        limits: for one reader.
        proxies: addresses whose word about the reader's address is believed.
        clock: monotonic seconds.
    """

    secret: str
    limits: LimitSettings
    proxies: frozenset[str] = frozenset()
    clock: Callable[[], float] = time.monotonic
    _buckets: OrderedDict[tuple[str, str], _Bucket] = field(default_factory=OrderedDict)
    _lock: Lock = field(default_factory=Lock)

    def sign(self, visit: str) -> str:
        """The token that goes with a visit."""
        return hmac.new(self.secret.encode(), visit.encode(), hashlib.sha256).hexdigest()

    def allow(self, kind: Limited, client: str) -> float:
        """Take one from the buckets of a reader and of its network; seconds to wait where there is none, else 0."""
        amount, period = self._rate(kind)
        waits = []
        with self._lock:
            now = self.clock()
            pair = ((client, 1), (network(client), NETWORK))
            buckets = [self._bucket((kind, name), factor * amount, period, now) for name, factor in pair]
            for bucket, (_, factor) in zip(buckets, pair, strict=True):
                if bucket.tokens < 1:
                    waits.append((1 - bucket.tokens) * period / (factor * amount))
            if not waits:
                for bucket in buckets:
                    bucket.tokens -= 1
        return max(waits, default=0.0)

    def _bucket(self, key: tuple[str, str], size: float, period: float, now: float) -> _Bucket:
        bucket = self._buckets.setdefault(key, _Bucket(size, now))
        bucket.tokens = min(size, bucket.tokens + (now - bucket.moment) * size / period)
        bucket.moment = now
        self._buckets.move_to_end(key)
        while len(self._buckets) > _BUCKETS:
            self._buckets.popitem(last=False)
        return bucket

    def _rate(self, kind: Limited) -> tuple[int, float]:
        return {
            "ask": (self.limits.asks_per_hour, 3600.0),
            "search": (self.limits.searches_per_minute, 60.0),
            "fetch": (self.limits.fetches_per_hour, 3600.0),
            "count": (self.limits.counts_per_minute, 60.0),
        }[kind]


def client(request: Request) -> str:
    """The address of the reader: the one that connects, or the one that a trusted proxy names."""
    peer = request.client.host if request.client else "unknown"
    proxies = request.app.state.guard.proxies
    if peer in proxies:
        # From the right: what stands further left may have been written by the reader.
        for part in reversed(request.headers.get("x-forwarded-for", "").split(",")):
            name = part.strip()
            if name and name not in proxies:
                return name if _is_address(name) else peer
    return peer


def network(address: str) -> str:
    """The network that an address belongs to: its first 24 bits, or 48 of IPv6."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((parsed, 24 if parsed.version == 4 else 48), strict=False))


def limit(request: Request, kind: Limited) -> None:
    """Refuse a reader who asks for too much; whoever holds the admin token is let through.

    Raises:
        HTTPException: 429, with the seconds to wait.
    """
    if is_admin(request):
        return
    wait = request.app.state.guard.allow(kind, client(request))
    if wait > 0:
        raise HTTPException(
            429, "That was too much at once. Please wait a little.", {"Retry-After": str(int(wait) + 1)}
        )


def is_admin(request: Request) -> bool:
    """Whether the request carries the admin token, compared in constant time."""
    wanted = request.app.state.admin_token
    given = request.headers.get("x-admin-token", "")
    return bool(wanted) and hmac.compare_digest(wanted.encode(), given.encode())


def token(request: Request) -> str:
    """The token for the forms of a page; the visit that it belongs to is kept in a cookie."""
    visit = request.cookies.get(COOKIE, "")
    if not _is_visit(visit):
        visit = request.scope.setdefault("danlu_visit", secrets.token_hex(16))
    return request.app.state.guard.sign(visit)


async def require(request: Request) -> None:
    """Refuse a change that does not come from a page of this site.

    Raises:
        HTTPException: 403.
    """
    visit = request.cookies.get(COOKIE, "")
    given = request.headers.get(HEADER, "") or await _field(request)
    origin = request.headers.get("sec-fetch-site", "same-origin")
    expected = request.app.state.guard.sign(visit)
    if origin not in ("same-origin", "none") or not _is_visit(visit) or not hmac.compare_digest(expected, given):
        raise HTTPException(403, "This did not come from a page of this site, or the page is old: load it again.")


async def _field(request: Request) -> str:
    if not request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        return ""
    length = request.headers.get("content-length", "")
    if not length.isdigit() or int(length) > _BODY:
        return ""
    values = parse_qs((await request.body()).decode("utf-8", "replace"))
    return values.get(FIELD, [""])[0]


def _is_visit(text: str) -> bool:
    return len(text) == 32 and all(character in "0123456789abcdef" for character in text)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


class _Headers:
    """Adds the headers to every answer, and the cookie of a visit where a page has made one."""

    def __init__(self, app: ASGIApp, policy: str) -> None:
        self.app = app
        self.headers = [
            (b"content-security-policy", policy.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"strict-origin-when-cross-origin"),
            (b"permissions-policy", b"camera=(), geolocation=(), microphone=(), payment=(), usb=()"),
            (b"cross-origin-opener-policy", b"same-origin"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers: list[Any] = message.setdefault("headers", [])
                there = {name.lower() for name, _ in headers}
                headers += [(name, value) for name, value in self.headers if name not in there]
                if "danlu_visit" in scope:
                    secure = "; Secure" if scope.get("scheme") == "https" else ""
                    cookie = f"{COOKIE}={scope['danlu_visit']}; Path=/; HttpOnly; SameSite=Strict{secure}"
                    headers.append((b"set-cookie", cookie.encode()))
            await send(message)

        await self.app(scope, receive, answer)
