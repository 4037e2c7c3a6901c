from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from tests.papers.contents import contents, digest
from tests.papers.sources.documents import ACL, CSV, JSONL, PMLR, V1, V2, dump
from tests.papers.sources.snapshots import line

from danlu.lab.papers_arxiv import PAGE
from danlu.papers.ids import parse_id
from danlu.papers.lists import find, papers
from danlu.papers.sources import importing
from danlu.papers.sources.importing import guess_format, import_file
from danlu.papers.sources.polls import poll_row
from danlu.papers.store import Store

FILES = {
    "x.xml": ("acl", ACL, 2, 1),
    "x.json": ("openreview", dump(V2, V1), 2, 0),
    "x.bib": ("pmlr", PMLR, 2, 0),
    "y.bib": ("bibtex", b"@misc{a, title={T}}", 1, 0),
    "x.csv": ("csv", CSV, 2, 4),
    "x.jsonl": ("jsonl", JSONL, 2, 3),
    "arxiv-metadata-oai-snapshot.json": ("snapshot", line() + b"broken\n" + line(id="0704.0002"), 2, 1),
    "part.json": ("snapshot", line(), 1, 0),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_by_its_form_and_reading_it_again_changes_nothing(name, store, tmp_path):
    form, body, added, bad = FILES[name]
    path = tmp_path / name
    path.write_bytes(body)
    assert guess_format(path) == form
    seen = []
    report = import_file(store, path, venue="ICML" if form == "pmlr" else "", progress=lambda *step: seen.append(step))
    assert (report.written.added, report.bad, len(report.reasons)) == (added, bad, bad)
    assert seen[-1] == (len(body), len(body))
    before = contents(store)
    again = import_file(store, path, form, venue="ICML" if form == "pmlr" else "")
    assert again.written.added == again.written.changed == 0 and contents(store) == before


def test_what_cannot_be_told_or_read_is_refused(tmp_path):
    path = tmp_path / "x.dat"
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match="cannot be told"):
        guess_format(path)
    with pytest.raises(ValueError, match="format must be one of snapshot, .*, got 'word'"):
        import_file(Store(), path, "word")
    with pytest.raises(FileNotFoundError):
        import_file(Store(), tmp_path / "none")
    path.write_bytes(PAGE)
    with pytest.raises(ValueError, match="a web page"):
        import_file(Store(), path, "acl")


def test_a_file_too_large_to_be_read_at_once_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.csv"
    path.write_bytes(CSV)
    monkeypatch.setattr(importing, "FILE_BYTES", 100)
    with pytest.raises(ValueError, match="more than the 100"):
        import_file(Store(), path)


def test_an_import_links_what_is_one_work_with_what_is_there(store, tmp_path):
    title = b"A title that is long enough to tell"
    (tmp_path / "a.csv").write_bytes(b"id,title,authors\n2401.00001@arXiv," + title + b",Ann Lee\n")
    (tmp_path / "b.csv").write_bytes(b"id,title,authors\nx1@OpenReview," + title + b",A. Lee\n")
    import_file(store, tmp_path / "a.csv")
    import_file(store, tmp_path / "b.csv")
    assert len(contents(store)["duplicate"]) == 1


def test_characters_that_a_database_refuses_do_not_stop_an_import(store, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b'{"id": "a", "title": "x \\u0000 \\ud800 y", "authors": ["\\udfff Ann\\u0000"], "doi": "10.1/\\u0000"}\n'
    )
    assert import_file(store, path).written.added == 1
    key = find(store, [parse_id("a@Local")])[parse_id("a@Local")]
    assert papers(store, [key])[0].title == "x y" and papers(store, [key])[0].authors == ("Ann",)


def snapshot(path, count, seed=0):
    """Lines of a snapshot with a broken one here and there, and the papers of some twice."""
    numbers = random.Random(seed)
    lines = [
        line(id=f"0704.{1 + i % (count - 20):04d}", title=f"Paper {i} on things", doi=f"10.1/{i}") for i in range(count)
    ]
    for i in range(0, count, 97):
        lines[i] = lines[i][: numbers.randrange(40)] + b"\n"
    path.write_bytes(b"".join(lines))


def test_an_interrupted_import_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "_BATCH", 100)
    path = tmp_path / "arxiv-metadata.json"
    snapshot(path, 350)
    whole = Store()
    expected = import_file(whole, path)

    class Stop(Exception):
        pass

    for stops in ((1,), (2,), (1, 1, 1)):
        store = Store()
        for count in stops:

            def stop(done, size, left=[count]):  # noqa: B006
                left[0] -= 1
                if left[0] == 0:
                    raise Stop

            with pytest.raises(Stop):
                import_file(store, path, progress=stop)
        offset = int(poll_row(store, "snapshot", importing._mark(path))["cursor"])
        rest = import_file(store, path)
        assert 0 < offset < path.stat().st_size and rest.written.added < expected.written.added
        assert digest(store) == digest(whole)


SCRIPT = """
import sys
from pathlib import Path
from danlu.papers.store import Store
from danlu.papers.sources import importing
importing._BATCH = 100
store = Store(sys.argv[1])
print("begin", flush=True)
importing.import_file(store, Path(sys.argv[2]), progress=lambda *step: print("step", flush=True))
print("end", flush=True)
"""


def test_killed_at_any_point_and_started_again_an_import_gives_the_same_tables(tmp_path):
    path = tmp_path / "arxiv-metadata.json"
    snapshot(path, 3000, seed=1)
    whole = Store()
    import_file(whole, path)
    url, killed = f"sqlite:///{tmp_path / 'papers.db'}", 0
    numbers = random.Random(2)
    for attempt in range(6):
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, url, str(path)], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"begin\n"
        if attempt < 5:
            for _ in range(numbers.randrange(5)):
                process.stdout.readline()
            time.sleep(numbers.uniform(0, 0.03))
            os.kill(process.pid, signal.SIGKILL)
        ended = process.stdout.read().endswith(b"end\n")
        process.wait()
        killed += not ended
        if ended:
            break
    assert ended and killed >= 4
    store = Store(url)
    assert digest(store) == digest(whole)
