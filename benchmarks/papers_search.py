"""Search over made-up papers: FTS5 and Tantivy beside a search that walks the table with LIKE.

Builds each index from the same database, then asks the same queries of all in turn. A query asks for 1000 results, as
the site does. Words are rare, mixed or very common by their rank in the made-up language.

    python benchmarks/papers_search.py [--papers 100000] [--repeats 40] [--walks 4]
"""

from __future__ import annotations

import argparse
import platform
import random
import sqlite3
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from danlu.papers.search import open_index
from danlu.papers.store import Store
from danlu.papers.synthetic import generate

#: Kind of query: how many words, and from which ranks, the first word being the most common.
KINDS = {
    "2 rare words": (2, 3000, 20000),
    "3 mixed words": (3, 30, 3000),
    "2 very common words": (2, 1, 20),
    "OR of 10 keywords": (10, 200, 6000),
}
TARGETS = {"FTS5": 60.0, "Tantivy": 15.0}


def ranked_words(store: Store, papers: int = 20_000) -> list[str]:
    """Words of the database, the most common first."""
    counted: Counter[str] = Counter()
    with store.reading() as connection:
        for (abstract,) in connection.exec_driver_sql(f"SELECT abstract FROM paper LIMIT {papers}"):
            counted.update(abstract.lower().replace(".", "").split())
    return [word for word, _ in counted.most_common()]


def walk(connection: sqlite3.Connection, words: list[str]) -> int:
    """The baseline: every row is read, and those with most of the words come first."""
    found = " + ".join("(title LIKE ? OR abstract LIKE ?)" for _ in words)
    query = f"SELECT pk, {found} AS hits FROM paper WHERE hits ORDER BY hits DESC, pk DESC LIMIT 1000"
    values = [f"%{word}%" for word in words for _ in range(2)]
    return len(connection.execute(query, values).fetchall())


def milliseconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    work()
    return 1e3 * (clock() - start)


def megabytes(path: Path) -> float:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files) / 1e6


def p95(times: list[float]) -> float:
    return sorted(times)[round(0.95 * (len(times) - 1))]


def measure(folder: Path, papers: int, repeats: int, walks: int) -> str:
    store = Store(f"sqlite:///{folder / 'papers.db'}")
    stored = milliseconds(lambda: store.upsert(generate(papers))) / 1e3
    indexes, built = {}, {}
    for name in ("fts5", "tantivy"):
        shown = "FTS5" if name == "fts5" else "Tantivy"
        indexes[shown] = open_index(folder / name, name)
        built[shown] = milliseconds(lambda name=shown: indexes[name].rebuild(store)) / 1e3
    sizes = {shown: megabytes(index.path) for shown, index in indexes.items()}
    table = sqlite3.connect(folder / "papers.db")
    searches: dict[str, Callable[[list[str]], object]] = {
        shown: (lambda words, index=index: index.search(" ".join(words))) for shown, index in indexes.items()
    }
    searches["LIKE"] = lambda words: walk(table, words)
    vocabulary = ranked_words(store)
    times: dict[tuple[str, str], list[float]] = {(kind, name): [] for kind in KINDS for name in searches}
    draw = random.Random(0)
    for turn in range(-3, repeats):
        for kind, (count, low, high) in KINDS.items():
            words = [vocabulary[draw.randrange(low, min(high, len(vocabulary)))] for _ in range(count)]
            for name, search in searches.items():
                if name == "LIKE" and not 0 <= turn < walks:
                    continue
                # Time of this thread on the processor: what else the machine does must not count.
                spent = milliseconds(lambda search=search, words=words: search(words), time.thread_time)
                # The first turns only warm up.
                if turn >= 0:
                    times[kind, name].append(spent)
    database = sum(map(megabytes, folder.glob("papers.db*")))
    lines = [
        "# Search over papers: FTS5, Tantivy, and a walk through the table",
        "",
        f"{papers:,} made-up papers of about 170 words (written to SQLite in {stored:.0f} s, "
        f"{database:.0f} MB); SQLite {sqlite3.sqlite_version}, {platform.machine()}; {repeats} "
        f"queries of each kind, {walks} for the walk, in turn; 1000 results are asked for; processor time of "
        "the searching thread.",
        "",
        "| engine | build, s | index, MB |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {built[name]:.1f} | {sizes[name]:.0f} |" for name in indexes),
        "",
        "| query | engine | p50, ms | p95, ms | target of p95, ms | walk / engine, p50 |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for kind in KINDS:
        plain = statistics.median(times[kind, "LIKE"])
        for name in searches:
            middle, late = statistics.median(times[kind, name]), p95(times[kind, name])
            target = TARGETS.get(name)
            shown = "" if target is None else f"{target:.0f} ({'met' if late < target else 'missed'})"
            lines.append(f"| {kind} | {name} | {middle:.2f} | {late:.2f} | {shown} | {plain / middle:.0f} |")
    for index in indexes.values():
        index.close()
    table.close()
    store.close()
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--papers", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--walks", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = measure(Path(folder), options.papers, options.repeats, options.walks)
    print(table)
    if options.papers == parser.get_default("papers"):
        Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
