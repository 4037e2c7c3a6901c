"""Import of arXiv's metadata snapshot: rows a second and memory, beside a plain program on the same database.

    python benchmarks/papers_import.py

The lines are made up. Each measurement is a process of its own: papers into the tables, and papers into the tables
and the search index. The plain program reads each line with ``json``, checks nothing, writes the same columns to tables
with the same indexes, and fills an FTS5 table; it has no merging, no resuming and no clean-up of TeX.
"""

from __future__ import annotations

import argparse
import json
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGETS = {"danlu, tables": 10_000, "danlu, tables and index": 3_500}
MEMORY = 150


def write_lines(path: Path, count: int) -> None:
    from danlu.papers.synthetic import generate

    with path.open("w", encoding="utf-8") as file:
        for record in generate(count):
            entry = {
                "id": record.paper.identifier,
                "submitter": record.authors[0],
                "authors": ", ".join(record.authors),
                "title": record.title,
                "comments": "12 pages, 3 figures",
                "journal-ref": None,
                "doi": None,
                "report-no": None,
                "categories": " ".join(record.categories),
                "license": "http://arxiv.org/licenses/nonexclusive-distrib/1.0/",
                "abstract": f"  {record.abstract}\n",
                "versions": [{"version": "v1", "created": f"{record.submitted_at:%a, %d %b %Y %H:%M:%S} GMT"}],
                "update_date": str(record.submitted_at.date()),
                "authors_parsed": [[name.split()[1], name.split()[0], ""] for name in record.authors],
            }
            file.write(json.dumps(entry) + "\n")


def ours(lines: Path, folder: Path, indexed: bool) -> int:
    from danlu.papers.sources.importing import import_file
    from danlu.papers.store import Store

    store = Store(f"sqlite:///{folder / 'papers.db'}")
    count = import_file(store, lines, "snapshot").written.added
    if indexed:
        from danlu.papers.search import open_index

        index = open_index(folder / "index")
        assert index.update(store) == count
        index.close()
    store.close()
    return count


def plain(lines: Path, folder: Path, indexed: bool) -> int:
    database = sqlite3.connect(folder / "plain.db")
    database.executescript(
        """
        PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;
        CREATE TABLE paper (pk INTEGER PRIMARY KEY, source TEXT, ext_id TEXT, title TEXT, abstract TEXT, authors TEXT,
            categories TEXT, comment TEXT, doi TEXT, license TEXT, submitted TEXT, changed INTEGER,
            UNIQUE (source, ext_id));
        CREATE INDEX a ON paper (changed); CREATE INDEX b ON paper (doi);
        CREATE TABLE cat (cat TEXT, pk INTEGER, PRIMARY KEY (cat, pk)); CREATE INDEX c ON cat (pk);
        CREATE TABLE version (pk INTEGER, v TEXT, created TEXT, PRIMARY KEY (pk, v));
        CREATE TABLE listing (day TEXT, cat TEXT, pk INTEGER, PRIMARY KEY (day, cat, pk));
        CREATE INDEX d ON listing (pk);
        """
    )
    if indexed:
        database.execute("CREATE VIRTUAL TABLE text USING fts5 (title, abstract, authors, tokenize = 'porter')")
    batch: list[dict] = []
    count = 0

    def flush() -> None:
        nonlocal count
        papers, cats, versions, places, texts = [], [], [], [], []
        for entry in batch:
            count += 1
            names = [" ".join((first, last)) for last, first, *_ in entry["authors_parsed"]]
            title, abstract = " ".join(entry["title"].split()), " ".join(entry["abstract"].split())
            created = entry["versions"][0]["created"]
            papers.append(
                (count, "arxiv", entry["id"], title, abstract, json.dumps(names), entry["categories"],
                 entry["comments"], entry["doi"] or "", entry["license"], created, count // 1000)
            )  # fmt: skip
            versions += [(count, each["version"], each["created"]) for each in entry["versions"]]
            cats += [(cat, count) for cat in entry["categories"].split()]
            places += [(entry["update_date"], cat, count) for cat in entry["categories"].split()]
            texts.append((count, title, abstract, ", ".join(names)))
        with database:
            database.executemany(f"INSERT INTO paper VALUES ({', '.join('?' * 12)})", papers)
            database.executemany("INSERT INTO version VALUES (?, ?, ?)", versions)
            database.executemany("INSERT INTO cat VALUES (?, ?)", cats)
            database.executemany("INSERT INTO listing VALUES (?, ?, ?)", places)
            if indexed:
                database.executemany("INSERT INTO text (rowid, title, abstract, authors) VALUES (?, ?, ?, ?)", texts)
        batch.clear()

    with lines.open("rb") as file:
        for line in file:
            batch.append(json.loads(line))
            if len(batch) == 1000:
                flush()
    flush()
    database.close()
    return count


WAYS = {
    "danlu, tables": (ours, False),
    "plain program, tables": (plain, False),
    "danlu, tables and index": (ours, True),
    "plain program, tables and index": (plain, True),
}


def child(name: str, lines: Path) -> None:
    """One measurement, on standard output."""
    act, indexed = WAYS[name]
    if act is ours:
        import danlu.papers.search
        import danlu.papers.sources.importing  # noqa: F401
    with tempfile.TemporaryDirectory() as folder:
        begin, used = time.perf_counter(), time.process_time()
        count = act(lines, Path(folder), indexed)
        wall, cpu = time.perf_counter() - begin, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"rows": count, "wall": wall, "cpu": cpu, "peak": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--child", choices=WAYS)
    parser.add_argument("--lines", type=Path)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.lines)
        return
    found: dict[str, list[dict]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines.json"
        write_lines(lines, options.count)
        size = lines.stat().st_size / 2**20
        for _ in range(options.rounds):
            for name in WAYS:
                command = [sys.executable, __file__, "--child", name, "--lines", str(lines)]
                found[name].append(json.loads(subprocess.check_output(command)))
    text = [
        "# Import of a snapshot",
        "",
        f"{options.count} made-up lines of arXiv's metadata snapshot ({size:.0f} MiB), SQLite "
        f"{sqlite3.sqlite_version}, Python {sys.version.split()[0]}; {options.rounds} "
        "interleaved rounds, each in a process of its own.",
        "",
        "| program | rows/s | rows per CPU second | peak memory, MiB | target |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, runs in found.items():
        speed, worked = (statistics.median(run["rows"] / run[clock] for run in runs) for clock in ("wall", "cpu"))
        peak = max(run["peak"] for run in runs)
        target = f"{TARGETS[name]} rows/s, {MEMORY} MiB" if name in TARGETS else ""
        text.append(f"| {name} | {speed:.0f} | {worked:.0f} | {peak:.0f} | {target} |")
    table = "\n".join(text) + "\n"
    print(table)
    if options.count == parser.get_default("count"):
        Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
