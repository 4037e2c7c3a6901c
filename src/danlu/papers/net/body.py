"""Reading the body of an answer within a limit: counted before it is inflated and while it is."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator

from danlu.papers.net.errors import BadContent, TooLarge, Unavailable


async def read_body(chunks: AsyncIterator[bytes], encoding: str, max_bytes: int) -> bytes:
    """Collect a body.

    Args:
        chunks: the bytes as they came over the wire.
        encoding: the Content-Encoding header; nothing, ``identity`` or one ``gzip``.
        max_bytes: limit of the body, packed and unpacked alike.

    Raises:
        TooLarge: more bytes than that.
        BadContent: another or a stacked encoding: a few bytes may hide gigabytes behind two of them.
        Unavailable: packed data that end too early.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return await _plain(chunks, max_bytes)
    if name not in ("gzip", "x-gzip"):
        raise BadContent(f"content encoding {encoding[:60]!r} is not accepted: only one gzip is")
    inflate = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    parts: list[bytes] = []
    packed = size = 0
    async for chunk in chunks:
        packed += len(chunk)
        _check(packed, max_bytes)
        try:
            # One byte more than allowed, so that a body of exactly the limit passes.
            part = inflate.decompress(chunk, max_bytes - size + 1)
        except zlib.error as error:
            raise BadContent(f"the body is not gzip: {error}") from error
        size += len(part)
        _check(size, max_bytes)
        parts.append(part)
        if inflate.unused_data:
            raise BadContent("the body goes on after its gzip data")
    if not inflate.eof:
        raise Unavailable("the body ended in the middle of its gzip data")
    return b"".join(parts)


async def _plain(chunks: AsyncIterator[bytes], max_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        _check(size, max_bytes)
        parts.append(chunk)
    return b"".join(parts)


def _check(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise TooLarge(f"the body has more than {max_bytes} bytes")
