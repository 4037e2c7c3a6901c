"""Search with Tantivy, for millions of papers. The words are ours; queries are built term by term and never parsed."""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from danlu.papers.categories import parse_expression
from danlu.papers.search import ledger
from danlu.papers.search.documents import Document, changed, count_changed, key_at, placed
from danlu.papers.search.index import Branch, Hits, Index, Progress, Sort
from danlu.papers.search.query import Days, Query, Term
from danlu.papers.store import Store

#: Of the fields below: an index of another format is left alone, and a new one is made.
FORMAT = 2
_HEAP = 64 * 2**20
#: Papers between two commits.
_COMMIT = 50_000
_LAST_DAY = 4_000_000
_TEXTS = ("title", "abstract", "authors")
_NAMES = ("branches", "categories", "venues")


def _import() -> Any:
    try:
        import tantivy
    except ImportError as error:
        raise ImportError('search = "tantivy" needs the package: pip install "danlu[papers-scale]"') from error
    return tantivy


class TantivyIndex(Index):
    """An index in ``<folder>/tantivy-<format>``; its place in the database and frequencies of words lie beside it.

    Args:
        folder: beside the database.
    """

    # The package raises ValueError for whatever goes wrong inside.
    _gone = (ValueError, OSError, sqlite3.Error)

    def __init__(self, folder: Path) -> None:
        self._tantivy = _import()
        self._schema = _schema(self._tantivy)
        self._guard = threading.Lock()
        self._held: tuple[Path, Any] | None = None
        super().__init__(folder / f"tantivy-{FORMAT}")

    def close(self) -> None:
        """Let go of the files."""
        with self._guard:
            self._held = None

    def _searcher(self) -> Any:
        """A view of the index as it is now."""
        path = self.path
        with self._guard:
            if self._held is None or self._held[0] != path:
                self._held = (path, self._opened(path))
            index = self._held[1]
            index.reload()
            return index.searcher()

    def _opened(self, path: Path) -> Any:
        return self._tantivy.Index(self._schema, path=str(path / "index"))

    def _count(self) -> int:
        return int(self._searcher().num_docs)

    def _change(self) -> int:
        with closing(_ledger(self.path)) as held:
            return ledger.state(held, "change")

    def _frozen(self, words: Sequence[str]) -> tuple[dict[str, int], int]:
        with closing(_ledger(self.path)) as held:
            return ledger.frozen(held, words)

    def _create(self, path: Path) -> None:
        (path / "index").mkdir()
        self._opened(path)
        with closing(_ledger(path, "rwc")) as held:
            held.executescript(ledger.TABLES)

    def _catch_up(self, path: Path, store: Store, progress: Progress | None, whole: bool = False) -> int:
        """The place in the database is noted after each commit, so that a kill loses nothing."""
        index = self._opened(path)
        with closing(_ledger(path)) as held:
            after = ledger.state(held, "change")
            # Frequencies of a first filling are counted on the way; later ones take a reading of their own.
            counted: Counter[str] | None = Counter() if after == 0 else None
            total = count_changed(store, after) if progress else 0
            done = uncommitted = 0
            writer = index.writer(heap_size=_HEAP, num_threads=1)
            try:
                for documents in changed(store, after):
                    for document in documents:
                        writer.delete_documents_by_term("pk", document.pk)
                        writer.add_document(_document(self._tantivy, document))
                    if counted is not None:
                        _count_words(counted, documents)
                    done += len(documents)
                    uncommitted += len(documents)
                    after = documents[-1].changed
                    if uncommitted >= _COMMIT:
                        writer.commit()
                        # One change may fill several batches: only one that is known to be over is ticked off.
                        ledger.note(held, change=after - 1)
                        uncommitted = 0
                    if progress:
                        progress(done, max(total, done))
                writer.commit()
                ledger.note(held, change=after)
            except BaseException:
                writer.rollback()
                raise
            finally:
                # Ends the writer's threads and gives its lock back.
                writer.wait_merging_threads()
                del writer
            index.reload()
            ledger.note(held, count=int(index.searcher().num_docs))
            if ledger.is_due(held):
                ledger.freeze(held, (counted if counted is not None else _counted(store)).items())
        return done

    def _search(
        self, query: Query, limit: int, sort: Sort, branch: Branch | None, within: Collection[int] | None
    ) -> Hits:
        searcher = self._searcher()
        built = self._built(query, branch, within)
        if sort == "date" or not (query.should or query.must):
            order = self._tantivy.Order.Desc
            found = searcher.search(built, limit, count=False, order_by_field="place", order=order).hits
            return Hits(tuple(key_at(place) for place, _ in found), (0.0,) * len(found))
        hits = searcher.search(built, limit, count=False).hits
        places = searcher.fast_field_values("place", [address for _, address in hits])
        ranked = sorted(((float(score), place) for (score, _), place in zip(hits, places, strict=True)), reverse=True)
        return Hits(tuple(key_at(place) for _, place in ranked), tuple(score for score, _ in ranked))

    def _built(self, query: Query, branch: Branch | None, within: Collection[int] | None) -> Any:
        make, occur = self._tantivy.Query, self._tantivy.Occur
        parts: list[tuple[Any, Any]] = []
        should = [self._term(term) for term in query.should]
        if should and not query.must:
            parts.append((occur.Must, make.boolean_query([(occur.Should, each) for each in should])))
        else:
            parts += [(occur.Should, each) for each in should]
        parts += [(occur.Must, self._term(term)) for term in query.must]
        parts += [(occur.MustNot, self._term(term)) for term in query.must_not]
        if branch is not None:
            parts.append((occur.Must, self._one_of("branches", [branch])))
        if query.categories:
            parts.append((occur.Must, self._matching(query.categories)))
        if query.not_categories:
            parts.append((occur.MustNot, self._matching(query.not_categories)))
        if query.venues:
            parts.append((occur.Must, self._one_of("venues", query.venues)))
        if query.not_venues:
            parts.append((occur.MustNot, self._one_of("venues", query.not_venues)))
        if query.first_day is not None or query.last_day is not None:
            parts.append((occur.Must, self._stretch((query.first_day, query.last_day))))
        parts += [(occur.MustNot, self._stretch(days)) for days in query.not_days]
        if within is not None:
            keys = make.term_set_query(self._schema, "pk", sorted(within))
            parts.append((occur.Must, make.const_score_query(keys, 0.0)))
        return make.boolean_query(parts)

    def _term(self, term: Term) -> Any:
        make, occur = self._tantivy.Query, self._tantivy.Occur
        fields = _TEXTS if term.field == "any" else (term.field,)
        if len(term.words) == 1:
            each = [make.term_query(self._schema, field, term.words[0]) for field in fields]
        else:
            each = [make.phrase_query(self._schema, field, list(term.words)) for field in fields]
        return each[0] if len(each) == 1 else make.boolean_query([(occur.Should, part) for part in each])

    def _one_of(self, field: str, names: Collection[str]) -> Any:
        make = self._tantivy.Query
        return make.const_score_query(make.term_set_query(self._schema, field, sorted(names)), 0.0)

    def _matching(self, expressions: Collection[str]) -> Any:
        make, occur = self._tantivy.Query, self._tantivy.Occur
        alternatives = []
        for text in expressions:
            wanted, unwanted = parse_expression(text).codes()
            both = [(occur.Must, self._one_of("categories", wanted))]
            if unwanted:
                both.append((occur.MustNot, self._one_of("categories", unwanted)))
            alternatives.append((occur.Should, make.boolean_query(both)))
        return make.boolean_query(alternatives)

    def _stretch(self, days: Days) -> Any:
        make = self._tantivy.Query
        # Papers of unknown day are in no stretch of days.
        first = placed(days[0].toordinal() if days[0] else 1)
        last = placed(days[1].toordinal() + 1 if days[1] else _LAST_DAY) - 1
        found = make.range_query(self._schema, "place", self._tantivy.FieldType.Integer, first, last)
        return make.const_score_query(found, 0.0)


def _schema(tantivy: Any) -> Any:
    builder = tantivy.SchemaBuilder()
    builder.add_integer_field("pk", stored=False, indexed=True)
    builder.add_integer_field("place", stored=False, indexed=True, fast=True)
    for name in _TEXTS:
        builder.add_text_field(name, stored=False, tokenizer_name="whitespace", index_option="position")
    for name in _NAMES:
        builder.add_text_field(name, stored=False, tokenizer_name="raw", index_option="basic")
    return builder.build()


def _document(tantivy: Any, document: Document) -> Any:
    made = tantivy.Document()
    made.add_integer("pk", document.pk)
    made.add_integer("place", document.place)
    for name in _TEXTS:
        made.add_text(name, getattr(document, name))
    for name in _NAMES:
        for value in getattr(document, name):
            made.add_text(name, value)
    return made


def _ledger(path: Path, mode: str = "rw") -> sqlite3.Connection:
    address = f"{(path / 'ledger.sqlite').absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(address, uri=True, timeout=60, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    return connection


def _counted(store: Store) -> Counter[str]:
    counted: Counter[str] = Counter()
    for documents in changed(store, 0):
        _count_words(counted, documents)
    return counted


def _count_words(counted: Counter[str], documents: Iterable[Document]) -> None:
    for document in documents:
        counted.update({*document.title.split(" "), *document.abstract.split(" "), *document.authors.split(" ")} - {""})
