"""Search with Tantivy, for millions of papers. The words are ours; queries are built term by term and never parsed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from danlu.papers.categories import parse_expression
from danlu.papers.search.documents import Document, changed, count_changed
from danlu.papers.search.index import Branch, Hits, Index, Progress, Sort
from danlu.papers.search.query import Query, Term
from danlu.papers.store import Store

FORMAT = 1
_HEAP = 64 * 2**20
_TEXTS = ("title", "abstract", "authors")


def _import() -> Any:
    try:
        import tantivy
    except ImportError as error:
        raise ImportError('search = "tantivy" needs the package: pip install "danlu[papers-scale]"') from error
    return tantivy


class TantivyIndex(Index):
    """An index in ``<folder>/tantivy``; frequencies for keywords and the place in the database lie beside it.

    Args:
        folder: beside the database.
    """

    def __init__(self, folder: Path) -> None:
        self._tantivy = _import()
        self.path = folder / "tantivy"
        self.path.mkdir(parents=True, exist_ok=True)
        self._schema = _schema(self._tantivy)
        self._open()

    def _open(self) -> None:
        self._index = self._tantivy.Index(self._schema, path=str(self.path))
        state = _read_state(self.path)
        if state["format"] != FORMAT:
            raise ValueError(f"{self.path} has format {state['format']}, this version reads {FORMAT}: reindex")

    def close(self) -> None:
        """Nothing is held open between searches."""

    def count(self) -> int:
        """Papers in the index."""
        self._index.reload()
        return int(self._index.searcher().num_docs)

    def update(self, store: Store, progress: Progress | None = None) -> int:
        """Catch up with the database; how many papers were read."""
        return _catch_up(self._tantivy, self._index, self.path, store, progress)

    def rebuild(self, store: Store, progress: Progress | None = None) -> int:
        """Build a new folder and put it in the place of the old one."""
        fresh = self.path.with_name("tantivy.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        count = _catch_up(self._tantivy, self._tantivy.Index(self._schema, path=str(fresh)), fresh, store, progress)
        old = self.path.with_name("tantivy.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(self.path, old)
        os.replace(fresh, self.path)
        shutil.rmtree(old, ignore_errors=True)
        self._open()
        return count

    def _search(
        self, query: Query, limit: int, sort: Sort, branch: Branch | None, within: Collection[int] | None
    ) -> Hits:
        self._index.reload()
        searcher = self._index.searcher()
        built = self._built(query, branch, within)
        if sort == "date" or not (query.should or query.must):
            order = self._tantivy.Order.Desc
            found = searcher.search(built, limit, order_by_field="day", order=order).hits
            keys = tuple(int(searcher.doc(address)["pk"][0]) for _, address in found)
            return Hits(keys, (0.0,) * len(keys))
        hits = searcher.search(built, limit).hits
        ranked = sorted(((-float(score), int(searcher.doc(address)["pk"][0])) for score, address in hits))
        return Hits(tuple(key for _, key in ranked), tuple(-score for score, _ in ranked))

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

        def one_of(field: str, names: Collection[str]) -> Any:
            return make.const_score_query(make.term_set_query(self._schema, field, list(names)), 0.0)

        if branch is not None:
            parts.append((occur.Must, one_of("branches", [branch])))
        if query.categories:
            alternatives = []
            for text in query.categories:
                wanted, unwanted = parse_expression(text).codes()
                both = [(occur.Must, one_of("categories", wanted))]
                if unwanted:
                    both.append((occur.MustNot, one_of("categories", unwanted)))
                alternatives.append((occur.Should, make.boolean_query(both)))
            parts.append((occur.Must, make.boolean_query(alternatives)))
        if query.venues:
            parts.append((occur.Must, one_of("venues", query.venues)))
        if query.first_day is not None or query.last_day is not None:
            first = query.first_day.toordinal() if query.first_day else 1
            last = query.last_day.toordinal() if query.last_day else 4_000_000
            days = make.range_query(self._schema, "day", self._tantivy.FieldType.Integer, first, last)
            parts.append((occur.Must, make.const_score_query(days, 0.0)))
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

    def _frozen(self, words: Sequence[str]) -> tuple[dict[str, int], int]:
        state = _read_state(self.path)
        self._index.reload()
        searcher = self._index.searcher()
        make = self._tantivy.Query
        last = make.range_query(self._schema, "pk", self._tantivy.FieldType.Integer, 0, state["frozen_pk"])
        found = {}
        for word in words:
            both = [(self._tantivy.Occur.Must, self._term(Term((word,)))), (self._tantivy.Occur.Must, last)]
            found[word] = int(searcher.search(make.boolean_query(both), 1, count=True).count or 0)
        return found, state["frozen"]


def _schema(tantivy: Any) -> Any:
    builder = tantivy.SchemaBuilder()
    builder.add_integer_field("pk", stored=True, indexed=True, fast=True)
    builder.add_integer_field("day", stored=False, indexed=True, fast=True)
    for name in _TEXTS:
        builder.add_text_field(name, stored=False, tokenizer_name="whitespace", index_option="position")
    for name in ("branches", "categories", "venues"):
        builder.add_text_field(name, stored=False, tokenizer_name="raw", index_option="basic")
    return builder.build()


def _catch_up(tantivy: Any, index: Any, path: Path, store: Store, progress: Progress | None) -> int:
    """Read what has changed; the place in the database is noted after each commit, so that a kill loses nothing."""
    state = _read_state(path)
    total = count_changed(store, state["change"]) if progress else 0
    done = 0
    try:
        writer = index.writer(heap_size=_HEAP, num_threads=1)
    except ValueError:
        # Another process holds the lock and is catching up already.
        return 0
    for documents in changed(store, state["change"]):
        for document in documents:
            writer.delete_documents_by_term("pk", document.pk)
            writer.add_document(_document(tantivy, document))
        done += len(documents)
        state["change"] = documents[-1].changed - 1
        if done % 50_000 < len(documents):
            writer.commit()
            _write_state(path, state)
        last = documents[-1].changed
        if progress:
            progress(done, max(total, done))
    if done:
        state["change"] = last
    writer.commit()
    writer.wait_merging_threads()
    index.reload()
    count = int(index.searcher().num_docs)
    if count and count >= 1.25 * state["frozen"]:
        state["frozen"], state["frozen_pk"] = count, 2**62
    _write_state(path, state)
    return done


def _document(tantivy: Any, document: Document) -> Any:
    made = tantivy.Document()
    made.add_integer("pk", document.pk)
    made.add_integer("day", document.day)
    for name in _TEXTS:
        made.add_text(name, getattr(document, name))
    for name in ("branches", "categories", "venues"):
        for value in getattr(document, name):
            made.add_text(name, value)
    return made


def _read_state(path: Path) -> dict[str, int]:
    try:
        return dict(json.loads((path / "danlu.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {"format": FORMAT, "change": 0, "frozen": 0, "frozen_pk": 0}


def _write_state(path: Path, state: dict[str, int]) -> None:
    temporary = path / "danlu.json.new"
    temporary.write_text(json.dumps(state), encoding="utf-8")
    os.replace(temporary, path / "danlu.json")
