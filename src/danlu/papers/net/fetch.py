"""Fetching: every request passes the gate of its host, and comes back whole, within its limits, or as a typed error."""

from __future__ import annotations

import asyncio
import logging
import random as random_module
import socket
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib.metadata import version
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx2
import stamina

from danlu.papers.ids import Source
from danlu.papers.net.body import read_body
from danlu.papers.net.errors import (
    BadContent,
    CircuitOpen,
    FetchError,
    NotFound,
    Refused,
    Rejected,
    TooLarge,
    Unavailable,
)
from danlu.papers.net.gate import RateGate
from danlu.papers.net.guard import check_addresses, check_url
from danlu.papers.net.policy import SOURCES, Policy, parse_retry_after
from danlu.papers.store import Store

logger = logging.getLogger("danlu.papers.net")

FEED_BYTES, PDF_BYTES = 32 * 2**20, 64 * 2**20
TOTAL_SECONDS = 60.0
REDIRECTS = 5
_RETRY_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
#: Calls that had to try again are at most a tenth of the calls of five minutes, and three are always allowed.
_BUDGET_SECONDS, _BUDGET_SHARE, _BUDGET_FLOOR = 300.0, 0.1, 3
#: Hosts that count together under a source's rules, and the seconds between two requests.
PACES = {
    "arxiv.org": ("arxiv", 3.0),
    "export.arxiv.org": ("arxiv", 3.0),
    "rss.arxiv.org": ("arxiv", 3.0),
    "oaipmh.arxiv.org": ("arxiv", 3.0),
}
_OTHER_INTERVAL = 1.0


@dataclass(frozen=True)
class Fetched:
    """What a request brought.

    Args:
        status: 200, or 304 where nothing has changed.
        body: unpacked.
        url: the address that answered, after redirects.
        content_type: as sent, in lower case and without parameters.
        etag: to be sent with the next request.
        last_modified: likewise.
    """

    status: int
    body: bytes
    url: str
    content_type: str = ""
    etag: str = ""
    last_modified: str = ""

    @property
    def not_modified(self) -> bool:
        """Whether nothing has changed since the last request."""
        return self.status == 304


async def _resolve(host: str) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Fetcher:
    """Requests to the sources of a site.

    Args:
        store: whose database holds the gates.
        contact: an address that requests carry, so that a source can complain.
        policy: when to try again.
        mirrors: base addresses of the operator's own that stand for hosts, such as a cache in the same network; what is
            asked of them need not be public or https.
        resolve: gives the addresses of a host.
        random: gives numbers in 0..1 for the jitter.
        paces: name and interval in seconds by host; `PACES` unless given.
    """

    def __init__(
        self,
        store: Store,
        contact: str = "",
        policy: Policy = SOURCES,
        mirrors: Mapping[str, str] | None = None,
        resolve: Callable[[str], Any] = _resolve,
        random: Callable[[], float] = random_module.random,
        paces: Mapping[str, tuple[str, float]] | None = None,
    ) -> None:
        self.store, self.policy, self.mirrors = store, policy, dict(mirrors or {})
        self.resolve, self.random, self.paces = resolve, random, PACES if paces is None else paces
        about = f" ({contact})" if contact else ""
        self.user_agent = f"danlu/{version('danlu')}{about}"
        self._gates: dict[str, RateGate] = {}
        self._history: dict[str, deque[tuple[float, bool]]] = {}

    def gate(self, host: str) -> RateGate:
        """The gate that requests to a host pass."""
        name, interval = self.paces.get(host, (host, _OTHER_INTERVAL))
        if name not in self._gates:
            self._gates[name] = RateGate(self.store, name, interval)
        return self._gates[name]

    async def get(
        self,
        url: str,
        source: Source,
        etag: str = "",
        last_modified: str = "",
        max_bytes: int = FEED_BYTES,
        accept: tuple[str, ...] = (),
        prio: int = 1,
    ) -> Fetched:
        """Ask for an address of a source.

        Args:
            url: built from an identifier by a template of the source; never one that a reader or a paper gave.
            source: whose hosts alone may be asked, redirects included.
            etag: of the last answer; the source may then say that nothing has changed.
            last_modified: likewise.
            max_bytes: limit of the body.
            accept: content types that the caller can read, such as ``application/pdf``; empty: any.
            prio: place in the queue of the gate, 0 first.

        Returns:
            The answer with its whole body.

        Raises:
            FetchError: of a kind in `danlu.papers.net.errors`, with the tries made, the time waited and, where a later
                request may help, its earliest time.
        """
        check_url(url, source.hosts)
        state = _Attempts(self, urlsplit(url).hostname or "")
        headers = {"User-Agent": self.user_agent, "Accept-Encoding": "gzip"}
        if accept:
            headers["Accept"] = ", ".join(accept)
        headers.update(
            {name: value for name, value in (("If-None-Match", etag), ("If-Modified-Since", last_modified)) if value}
        )
        try:
            # Waits and limits are the policy's; the loop, the context and its instrumentation are stamina's.
            async for attempt in stamina.retry_context(on=state.wait_after, attempts=None, timeout=None):
                with attempt:
                    state.attempts += 1
                    if state.attempts <= 2:
                        self._remember(state.host, state.attempts == 2)
                    return await self._follow(url, source, headers, max_bytes, accept, prio)
        except FetchError as error:
            state.describe(error)
            raise
        raise RuntimeError("unreachable")  # pragma: no cover

    async def _follow(
        self, url: str, source: Source, headers: dict[str, str], max_bytes: int, accept: tuple[str, ...], prio: int
    ) -> Fetched:
        """One try: the address, and where it redirects to; each of them a request that passes the gate."""
        for _ in range(REDIRECTS + 1):
            host = check_url(url, source.hosts).hostname or ""
            gate = self.gate(host)
            try:
                async with gate.permit(prio):
                    answer = await self._in_time(self._request(url, host, headers, max_bytes), host)
            except FetchError as error:
                if error.retryable:
                    gate.failed()
                raise
            gate.succeeded()
            if isinstance(answer, str):
                url = urljoin(url, answer)
                continue
            if not answer.not_modified and accept and answer.content_type not in accept:
                raise BadContent(
                    f"expected {' or '.join(accept)} from {host}, got {answer.content_type or 'no type'!r}"
                )
            return replace(answer, url=url)
        raise Refused(f"more than {REDIRECTS} redirects from {url[:200]}")

    @staticmethod
    async def _in_time(request: Awaitable[Fetched | str], host: str) -> Fetched | str:
        try:
            return await asyncio.wait_for(request, TOTAL_SECONDS)
        except TimeoutError as error:
            raise Unavailable(f"{host} took more than {TOTAL_SECONDS:.0f} s") from error

    async def _request(self, url: str, host: str, headers: dict[str, str], max_bytes: int) -> Fetched | str:
        """One request; a redirect gives its target."""
        target, extensions = await self._target(url, host)
        sent = {**headers, "Host": host}
        try:
            async with (
                httpx2.AsyncClient(verify=_tls(), timeout=30.0, trust_env=False, follow_redirects=False) as client,
                client.stream("GET", target, headers=sent, extensions=extensions) as response,
            ):
                return await _read(response, host, max_bytes)
        except (httpx2.TransportError, OSError) as error:
            if isinstance(error.__cause__, ssl.SSLCertVerificationError) or isinstance(
                error, ssl.SSLCertVerificationError
            ):
                raise Rejected(f"the certificate of {host} is not valid: {error}") from error
            raise Unavailable(f"{host} cannot be reached: {type(error).__name__} {error}".strip()) from error

    async def _target(self, url: str, host: str) -> tuple[str, dict[str, Any]]:
        """Where to connect: the checked address itself, so that a second look-up cannot give another one."""
        parts = urlsplit(url)
        rest = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if host in self.mirrors:
            return self.mirrors[host].rstrip("/") + rest, {}
        try:
            addresses = await self.resolve(host)
        except OSError as error:
            raise Unavailable(f"{host} cannot be resolved: {error}") from error
        address = check_addresses(host, addresses)
        literal = f"[{address}]" if ":" in address else address
        return f"https://{literal}{rest}", {"sni_hostname": host}

    def _remember(self, host: str, again: bool) -> None:
        self._history.setdefault(host, deque(maxlen=4096)).append((time.monotonic(), again))

    def may_retry(self, host: str) -> bool:
        """Whether the calls that had to try again in the last minutes leave room for one more."""
        since = time.monotonic() - _BUDGET_SECONDS
        recent = [again for moment, again in self._history.get(host, ()) if moment >= since]
        return sum(recent) < max(_BUDGET_FLOOR, _BUDGET_SHARE * (len(recent) - sum(recent)))


class _Attempts:
    """What one call of `Fetcher.get` has tried and waited."""

    def __init__(self, fetcher: Fetcher, host: str) -> None:
        self.fetcher, self.host = fetcher, host
        self.attempts, self.waited = 0, 0.0

    def wait_after(self, error: Exception) -> bool | float:
        """Seconds until the next try, or False where there is none."""
        policy = self.fetcher.policy
        if not isinstance(error, FetchError) or not error.retryable or self.attempts >= policy.attempts:
            return False
        wait = policy.wait(self.attempts, self.fetcher.random) if error.retry_after is None else error.retry_after
        if self.waited + wait > policy.deadline:
            return False
        if self.attempts == 1 and not self.fetcher.may_retry(self.host):
            return False
        self.waited += wait
        logger.warning("%s: try %d failed (%s), next in %.1f s", self.host, self.attempts, error, wait)
        return wait

    def describe(self, error: FetchError) -> None:
        """Tell the caller what was tried, and when a new request makes sense."""
        error.attempts, error.waited = self.attempts, self.waited
        if error.retryable or isinstance(error, CircuitOpen):
            wait = error.retry_after if error.retry_after is not None else self.fetcher.policy.wait_max
            error.retry_at = datetime.now(UTC).replace(tzinfo=None) + timedelta(seconds=wait)
        error.add_note(f"after {self.attempts} tries and {self.waited:.1f} s of waiting")


async def _read(response: httpx2.Response, host: str, max_bytes: int) -> Fetched | str:
    status, headers = response.status_code, response.headers
    content_type = headers.get("content-type", "").split(";")[0].strip().lower()
    marks = {"etag": headers.get("etag", ""), "last_modified": headers.get("last-modified", "")}
    if status == 304:
        return Fetched(304, b"", "", content_type, **marks)
    if status in (301, 302, 303, 307, 308) and "location" in headers:
        return str(headers["location"])
    if status in (404, 410):
        raise NotFound(f"{host} has no such page (status {status})")
    if status in _RETRY_STATUSES:
        wait = parse_retry_after(headers.get("retry-after"), datetime.now(UTC), SOURCES.retry_after_cap)
        raise Unavailable(f"{host} answered with status {status}", retry_after=wait)
    if status != 200:
        raise Rejected(f"{host} answered with status {status}")
    declared = headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared) > max_bytes:
        raise TooLarge(f"the body of {host} has {declared} bytes, more than {max_bytes}")
    encoding = ", ".join(headers.get_list("content-encoding"))
    return Fetched(200, await read_body(response.aiter_raw(), encoding, max_bytes), "", content_type, **marks)


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
