"""PDFs written by hand: pages of text, and documents that mean harm."""

from __future__ import annotations

import zlib
from collections.abc import Sequence


def document(objects: Sequence[bytes]) -> bytes:
    """A PDF of numbered objects, the first of which is the catalogue."""
    out, places = bytearray(b"%PDF-1.4\n"), []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n" % number + body + b"\nendobj\n"
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % place for place in places)
    out += b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start)
    return bytes(out)


def stream(data: bytes, filters: str = "", length: int | None = None) -> bytes:
    """A stream object."""
    named = f" /Filter {filters}" if filters else ""
    return f"<< /Length {len(data) if length is None else length}{named} >>\nstream\n".encode() + data + b"\nendstream"


def content(lines: Sequence[str], x: int = 60, y: int = 760, size: int = 10) -> bytes:
    """The operators that show lines of Latin-1 text below each other."""
    shown = []
    for line in lines:
        text = line.encode("latin-1").replace(b"\\", b"\\\\").replace(b"(", b"\\(").replace(b")", b"\\)")
        shown.append(b"(" + text + b") Tj T*")
    return b"BT /F1 %d Tf 12 TL %d %d Td\n" % (size, x, y) + b"\n".join(shown) + b"\nET"


def text_pdf(pages: Sequence[Sequence[str]], pack: bool = True) -> bytes:
    """A PDF that shows the lines of each page."""
    return pages_pdf([stream(zlib.compress(content(p)), "/FlateDecode") if pack else stream(content(p)) for p in pages])


def pages_pdf(contents: Sequence[bytes]) -> bytes:
    """A PDF whose pages show these stream objects."""
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(contents)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(contents)} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    ]
    for number, body in enumerate(contents):
        objects += [
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R >> >> "
            b"/Contents %d 0 R >>" % (5 + 2 * number),
            body,
        ]
    return document(objects)


def _zeros(size: int) -> bytes:
    """As many zeros, packed; the packing of one block is repeated, so that it takes no time."""
    block = 2**24
    packer = zlib.compressobj(9)
    head = packer.compress(b"") + packer.flush(zlib.Z_FULL_FLUSH)
    body = packer.compress(b"\0" * block) + packer.flush(zlib.Z_FULL_FLUSH)
    end = zlib.compressobj(9, wbits=-15).flush()
    count = size // block
    return head + body * count + end + ((count * block % 65521) << 16 | 1).to_bytes(4, "big")


def flate_bomb(size: int = 2**31) -> bytes:
    """A page whose content unpacks to this many bytes."""
    return pages_pdf([stream(_zeros(size), "/FlateDecode")])


def nested_bomb(size: int = 2**31) -> bytes:
    """The same, packed twice: a few kilobytes."""
    return pages_pdf([stream(zlib.compress(_zeros(size), 9), "[/FlateDecode /FlateDecode]")])


def cyclic() -> bytes:
    """A tree of pages that comes back to its root."""
    return document(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            b"<< /Type /Pages /Parent 2 0 R /Kids [2 0 R] /Count 1 >>",
        ]
    )


def many_kids(count: int = 200_000) -> bytes:
    """One page that stands in the tree this many times."""
    return document(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [" + b"3 0 R " * count + b"] /Count %d >>" % count,
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R >>",
            stream(content(["x"])),
        ]
    )
