"""The process that reads one PDF: ``python pdf_worker.py FILE READER LIMITS``. It imports nothing of this package.

It prints JSON: the text of each page, and how many pages there are.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from collections.abc import Iterator
from typing import Any


def main() -> None:
    """Set the limits, read, print."""
    path, reader, limits = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory"], limits["memory"]))
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu"], limits["cpu"] + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A document can bring a reader to complain for ever, and whoever waits for this process keeps what it says.
    logging.disable(logging.CRITICAL)
    try:
        total, pages = _pdfium(path) if reader == "pdfium" else _pypdf(path)
        found: list[str] = []
        left = limits["text"]
        for page in pages:
            if len(found) >= limits["pages"] or left <= 0:
                break
            found.append(page[:left])
            left -= len(page)
        answer = json.dumps({"pages": found, "total": total})
    except MemoryError:
        sys.exit("it needs more memory than allowed")
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}"[:200])
    sys.stdout.write(answer)


def _pypdf(path: str) -> tuple[int, Iterator[str]]:
    from pypdf import PdfReader

    document: Any = PdfReader(path)
    if document.is_encrypted:
        document.decrypt("")
    return len(document.pages), (page.extract_text() or "" for page in document.pages)


def _pdfium(path: str) -> tuple[int, Iterator[str]]:
    import pypdfium2

    document: Any = pypdfium2.PdfDocument(path)
    return len(document), (document[number].get_textpage().get_text_range() for number in range(len(document)))


if __name__ == "__main__":
    main()
