"""What every search engine of the site can do."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from danlu.papers.rows import Paper
from danlu.papers.search.documents import latest_change
from danlu.papers.search.generations import Generations
from danlu.papers.search.keywords import Keyword, weigh
from danlu.papers.search.query import Query, parse_query, query_of
from danlu.papers.store import Store
from danlu.papers.tokens import query_words

Sort = Literal["relevance", "date"]
Branch = Literal["arxiv", "venue"]
#: Most results of a search.
LIMIT = 1000
#: Seconds that an update waits for another one.
WAIT = 10.0
#: Called with papers done and papers in all.
Progress = Callable[[int, int], None]
T = TypeVar("T")
logger = logging.getLogger("danlu.papers.search")


@dataclass(frozen=True)
class Hits:
    """Results of a search.

    Args:
        keys: of the papers found, best first.
        scores: of each, the greater the better; engines do not agree on them.
        partial: only the newest papers were looked at, because every word of the query is in very many.
    """

    keys: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    partial: bool = False

    @property
    def total(self) -> int:
        """How many were found, at most `LIMIT`."""
        return len(self.keys)


class Index(ABC):
    """A search index beside the database: derived from it, caught up with it, and built again at any time.

    A paper's branch is ``arxiv`` if it comes from there and ``venue`` if it was published at one; it may be in both.
    """

    #: Errors of a reader whose files have just been swapped.
    _gone: tuple[type[Exception], ...]

    def __init__(self, folder: Path) -> None:
        self._generations = Generations(folder)
        if self._generations.current() is None:
            with self._generations.turn(WAIT) as ours:
                if ours and self._generations.current() is None:
                    with self._generations.fresh() as made:
                        self._create(made)
        if self._generations.current() is None:
            raise OSError(f"another process has kept {folder} for {WAIT:.0f} seconds: try again when it is done")

    @property
    def path(self) -> Path:
        """The folder of the files as they are now; a rebuild moves to another."""
        found = self._generations.current()
        if found is None:
            raise FileNotFoundError(f"the index in {self._generations.folder} is gone: open it again")
        return found

    def update(self, store: Store, progress: Progress | None = None) -> int:
        """Catch up with the database; how many papers were read.

        Threads and processes take turns, and readers are not held up. Where another one is still at it after some
        seconds, this one leaves the work to it. An index that is ahead of the database belongs to another one, or to
        an earlier state of it, and is built again.
        """
        with self._generations.turn(WAIT) as ours:
            if not ours:
                logger.info("another process is catching up")
                return 0
            if self._change() > latest_change(store):
                logger.warning("the search index is ahead of the database: it is built again")
                return self._build(store, progress)
            return self._catch_up(self.path, store, progress)

    def rebuild(self, store: Store, progress: Progress | None = None) -> int:
        """Build again from nothing and swap at the end; how many papers were read.

        Raises:
            TimeoutError: another process is writing.
        """
        with self._generations.turn(6 * WAIT) as ours:
            if not ours:
                raise TimeoutError(f"another process writes the index in {self._generations.folder}: try again later")
            return self._build(store, progress)

    def _build(self, store: Store, progress: Progress | None) -> int:
        with self._generations.fresh() as made:
            self._create(made)
            return self._catch_up(made, store, progress, whole=True)

    @abstractmethod
    def _create(self, path: Path) -> None:
        """Make an empty index in an empty folder."""

    @abstractmethod
    def _catch_up(self, path: Path, store: Store, progress: Progress | None, whole: bool = False) -> int:
        """Read what has changed into the index in this folder; ``whole`` where nobody reads it yet."""

    @abstractmethod
    def _change(self) -> int:
        """Everything up to this change is indexed."""

    @abstractmethod
    def _search(
        self, query: Query, limit: int, sort: Sort, branch: Branch | None, within: Collection[int] | None
    ) -> Hits: ...

    @abstractmethod
    def _frozen(self, words: Sequence[str]) -> tuple[dict[str, int], int]:
        """In how many papers each word was at the last freeze, and of how many."""

    @abstractmethod
    def _count(self) -> int: ...

    @abstractmethod
    def close(self) -> None:
        """Give files and locks back."""

    def count(self) -> int:
        """Papers in the index."""
        return self._steady(self._count)

    def _steady(self, read: Callable[[], T]) -> T:
        """Read; again where a rebuild has taken the files away under the reader."""
        before: Any = None
        while True:
            current = self._generations.current()
            try:
                return read()
            except self._gone:
                if current == before or current is None:
                    raise
                before = current

    def search(
        self,
        query: str | Query,
        limit: int = LIMIT,
        sort: Sort = "relevance",
        branch: Branch | None = None,
        within: Collection[int] | None = None,
    ) -> Hits:
        """Find papers; any text is a query.

        Args:
            query: what a reader typed, or a query.
            limit: most results, 1 to 1000.
            sort: by relevance, or newest first.
            branch: only papers of arXiv, or of venues.
            within: only papers with these keys.

        Returns:
            The papers found, best first.
        """
        parsed = parse_query(query) if isinstance(query, str) else query
        if parsed.empty:
            return Hits()
        return self._steady(lambda: self._search(parsed, min(max(limit, 1), LIMIT), sort, branch, within))

    def keywords(self, paper: Paper, count: int = 10) -> list[Keyword]:
        """The words that tell a paper from others, heaviest first; the same until the index is frozen again."""
        return self._steady(lambda: weigh(paper.title, paper.abstract, self._frozen, count))

    def related(self, paper: Paper, limit: int = 100) -> Hits:
        """Papers that share the keywords of this one, in its branch, without itself."""
        found = [keyword.term for keyword in self.keywords(paper)]
        if not found:
            return Hits()
        branch: Branch = "arxiv" if paper.paper.source == "arxiv" else "venue"
        hits = self.search(query_of(found), limit + 1, branch=branch)
        kept = [(key, score) for key, score in zip(hits.keys, hits.scores, strict=True) if key != paper.pk][:limit]
        return Hits(tuple(key for key, _ in kept), tuple(score for _, score in kept), hits.partial)

    def rank(self, words: Sequence[str], keys: Sequence[int]) -> list[int]:
        """A list in the order of preference words; papers that match none keep their order at its end.

        Args:
            words: of preference, at most 32 are used.
            keys: of the list in its own order.
        """
        wanted = query_words(" ".join(words))
        if not wanted or not keys:
            return list(keys)
        # Every word counts and every match is wanted, be the list ever so long.
        found = self._steady(lambda: self._search(query_of(wanted), len(keys), "relevance", None, keys)).keys
        matched = set(found)
        return [*found, *(key for key in keys if key not in matched)]
