"""Search: one interface, with SQLite's FTS5 by default and Tantivy for millions of papers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from danlu.papers.search.index import Hits, Index
from danlu.papers.search.keywords import Keyword
from danlu.papers.search.query import Query, parse_query

__all__ = ["Hits", "Index", "Keyword", "Query", "open_index", "parse_query"]


def open_index(folder: Path, engine: Literal["fts5", "tantivy"] = "fts5") -> Index:
    """Open the index of a site, or make an empty one.

    Args:
        folder: beside the database.
        engine: ``fts5`` needs nothing; ``tantivy`` needs the package of that name.

    Raises:
        ValueError: an unknown engine.
        ImportError: the package is missing.
    """
    if engine == "fts5":
        from danlu.papers.search.fts5 import FTS5Index

        return FTS5Index(folder)
    if engine == "tantivy":
        from danlu.papers.search.tantivy import TantivyIndex

        return TantivyIndex(folder)
    raise ValueError(f"engine must be fts5 or tantivy, got {engine!r}")
