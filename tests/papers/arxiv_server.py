"""A server that plays arXiv on this machine: one scripted behaviour after another, then the plain truth."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Callable, Iterable
from contextlib import asynccontextmanager
from datetime import date

from danlu.lab.papers_arxiv import PAGE, Arxiv, api, api_error, atom
from danlu.papers.net.fetch import Fetcher
from danlu.papers.net.policy import Policy

HOSTS = ("rss.arxiv.org", "export.arxiv.org", "oaipmh.arxiv.org", "arxiv.org")
#: Three quick tries: the waits themselves are tested where they are made.
QUICK = Policy(attempts=3, deadline=900.0, wait_initial=0.0, wait_max=0.0, jitter=0.0)

#: What may come in place of an answer, by name: status line, headers and body made of the true body.
QUIRKS: dict[str, Callable[[bytes], bytes]] = {
    "429": lambda body: reply(b"", 429, "Retry-After: 0"),
    "503": lambda body: reply(b"", 503, "Retry-After: 0"),
    "reset": lambda body: b"",
    "truncated": lambda body: reply(body)[:-40],
    "cut": lambda body: reply(body[: len(body) // 2]),
    "stacked": lambda body: reply(gzip.compress(gzip.compress(body)), 200, "Content-Encoding: gzip, gzip"),
    "dtd": lambda body: reply(
        body.replace(b'<?xml version="1.0" encoding="UTF-8"?>', b'<!DOCTYPE x [<!ENTITY a "b">]>')
    ),
    "page": lambda body: reply(PAGE),
    "error": lambda body: reply(api_error("too many requests")),
    "empty page": lambda body: reply(api([], 1000)),
    "empty feed": lambda body: reply(atom([], date(2024, 1, 16))),
}


def reply(body: bytes, status: int = 200, *headers: str) -> bytes:
    """One answer."""
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Served:
    """A running server.

    Args:
        arxiv: what it knows; to be replaced at any time.
        script: for each host the names of quirks that come first, one a request.
    """

    def __init__(self, arxiv: Arxiv) -> None:
        self.arxiv = arxiv
        self.script: dict[str, list[str]] = {}
        self.packed = self.marked = False
        self.base = ""

    def fetcher(self, store) -> Fetcher:
        """One that asks this server alone."""
        paces = dict.fromkeys(HOSTS, ("arxiv", 0.0))
        mirrors = dict.fromkeys(HOSTS, self.base)
        return Fetcher(store, "me@example.org", QUICK, mirrors, random=lambda: 0.0, paces=paces)

    def play(self, host: str, quirks: Iterable[str]) -> None:
        """Let the next requests to a host go wrong."""
        self.script[host] = list(quirks)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split(" ")[1]
        headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
        host = headers["host"]
        status, body = self.arxiv.answer(f"https://{host}{path}")
        script = self.script.get(host)
        if script:
            answer = QUIRKS[script.pop(0)](body)
        elif self.marked and host == "rss.arxiv.org":
            tag = f'"{len(body)}"'
            answer = reply(b"", 304) if headers.get("if-none-match") == tag else reply(body, status, f"ETag: {tag}")
        elif self.packed:
            answer = reply(gzip.compress(body), status, "Content-Encoding: gzip")
        else:
            answer = reply(body, status)
        writer.write(answer)
        await writer.drain()
        writer.close()


@asynccontextmanager
async def served(arxiv: Arxiv):
    """A server on a free port of this machine."""
    found = Served(arxiv)
    server = await asyncio.start_server(found._handle, "127.0.0.1", 0)
    async with server:
        found.base = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield found
