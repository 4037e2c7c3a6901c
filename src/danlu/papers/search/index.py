"""What every search engine of the site can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from danlu.papers.rows import Paper
from danlu.papers.search.keywords import Keyword, weigh
from danlu.papers.search.query import Query, parse_query, query_of
from danlu.papers.store import Store

Sort = Literal["relevance", "date"]
Branch = Literal["arxiv", "venue"]
#: Most results of a search.
LIMIT = 1000
#: Called with papers done and papers in all.
Progress = Callable[[int, int], None]


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

    @abstractmethod
    def update(self, store: Store, progress: Progress | None = None) -> int:
        """Catch up with the database; how many papers were read. Processes take turns, readers are not held up."""

    @abstractmethod
    def rebuild(self, store: Store, progress: Progress | None = None) -> int:
        """Build again from nothing and swap at the end; how many papers were read."""

    @abstractmethod
    def _search(
        self, query: Query, limit: int, sort: Sort, branch: Branch | None, within: Collection[int] | None
    ) -> Hits: ...

    @abstractmethod
    def _frozen(self, words: Sequence[str]) -> tuple[dict[str, int], int]:
        """In how many papers each word was at the last freeze, and of how many."""

    @abstractmethod
    def count(self) -> int:
        """Papers in the index."""

    @abstractmethod
    def close(self) -> None:
        """Give files and locks back."""

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
        return self._search(parsed, min(max(limit, 1), LIMIT), sort, branch, within)

    def keywords(self, paper: Paper, count: int = 10) -> list[Keyword]:
        """The words that tell a paper from others, heaviest first; the same until the index is frozen again."""
        return weigh(paper.title, paper.abstract, self._frozen, count)

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
        from danlu.papers.tokens import query_words

        wanted = query_words(" ".join(words))
        if not wanted or not keys:
            return list(keys)
        found = self.search(query_of(wanted), LIMIT, within=keys).keys
        matched = set(found)
        return [*found, *(key for key in keys if key not in matched)]
