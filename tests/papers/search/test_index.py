"""An index beside its database: catching up, kills, several writers, rebuilding under readers."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from tests.papers.search.conftest import LIBRARY, fill, make

from danlu.papers.lists import papers
from danlu.papers.search import documents as read
from danlu.papers.search import index as base
from danlu.papers.search import open_index
from danlu.papers.store import Store


@pytest.fixture
def store(tmp_path):
    opened = Store(f"sqlite:///{tmp_path / 'papers.db'}")
    fill(opened)
    yield opened
    opened.close()


@pytest.fixture
def fresh(engine, tmp_path):
    opened = open_index(tmp_path / "search", engine)
    yield opened
    opened.close()


def test_an_index_catches_up_with_what_is_new_and_what_has_changed(store, fresh):
    assert fresh.update(store) == 6 and fresh.count() == 6
    assert fresh.update(store) == 0
    store.upsert([make(7, "Rotary phone")])
    store.upsert([replace(LIBRARY[1], origin="oai", title="Curved flow")])
    assert fresh.update(store) == 2 and fresh.count() == 7
    assert set(fresh.search("rotary").keys) == {1, 7}
    assert fresh.search("ti:rectified").keys == () and set(fresh.search("curved").keys) == {2}


def test_a_changed_day_venue_and_category_are_seen(store, fresh):
    fresh.update(store)
    before = LIBRARY[2]
    moved = make(3, before.title, before.abstract, LIBRARY[4].submitted_at.date(), ("cs.CL",))
    store.upsert([replace(moved, origin="oai", venues=(make(1, "", venues=[("TMLR", 2025)]).venues))])
    fresh.update(store)
    assert 3 in fresh.search("cat:cs.CL").keys and 3 in fresh.search("venue:tmlr").keys
    assert fresh.search("matching").keys == (3,) and fresh.count() == 6
    assert 3 in fresh.search("matching", branch="venue").keys


def test_another_opening_sees_what_was_written(store, fresh, engine, tmp_path):
    fresh.update(store)
    other = open_index(tmp_path / "search", engine)
    assert other.search("rotary").keys == (1,) and other.count() == 6
    store.upsert([make(7, "Rotary phone")])
    fresh.update(store)
    assert set(other.search("rotary").keys) == {1, 7}
    other.close()


@pytest.mark.parametrize("one_change", [False, True])
def test_an_update_that_is_cut_off_loses_nothing(one_change, fresh, monkeypatch):
    from danlu.papers.search import tantivy

    monkeypatch.setattr(read, "_BATCH", 3)
    monkeypatch.setattr(tantivy, "_COMMIT", 3)
    store = Store()
    # All papers of one write have one change, which here fills several batches.
    store.upsert([make(n, f"paper p{n}") for n in range(1, 11)], batch=100 if one_change else 2)

    def cut(done, total):
        assert total == 10
        if done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fresh.update(store, cut)
    assert fresh.count() < 10
    fresh.update(store)
    assert fresh.count() == 10
    assert [fresh.search(f"p{n}").keys for n in range(1, 11)] == [(n,) for n in range(1, 11)]
    assert fresh.update(store) == 0


_UPDATE_AND_DIE = """
import os, pathlib, sys
from danlu.papers.search import open_index
from danlu.papers.store import Store

folder, url, engine = sys.argv[1:]
open_index(pathlib.Path(folder), engine).update(Store(url), lambda done, total: os._exit(9))
"""


def test_a_killed_process_holds_up_nobody(store, fresh, engine, tmp_path):
    arguments = [sys.executable, "-c", _UPDATE_AND_DIE, str(tmp_path / "search"), str(store.url), engine]
    assert subprocess.run(arguments, timeout=120).returncode == 9
    fresh.update(store)
    assert fresh.count() == 6 and fresh.search("rotary").keys == (1,)


def test_two_writers_take_turns(store, fresh, engine, tmp_path, monkeypatch):
    other = open_index(tmp_path / "search", engine)
    inside, go_on = threading.Event(), threading.Event()

    def hold(done, total):
        inside.set()
        assert go_on.wait(30)

    counts = {}
    first = threading.Thread(target=lambda: counts.update(first=fresh.update(store, hold)))
    first.start()
    assert inside.wait(30)
    monkeypatch.setattr(base, "WAIT", 0.05)
    # Who waits in vain leaves the work to the other one.
    assert other.update(store) == 0
    monkeypatch.setattr(base, "WAIT", 30.0)
    second = threading.Thread(target=lambda: counts.update(second=other.update(store)))
    second.start()
    go_on.set()
    first.join(60)
    second.join(60)
    assert counts == {"first": 6, "second": 0}
    assert other.count() == 6 and other.search("rotary").keys == (1,)
    other.close()


def test_a_rebuild_is_swapped_whole_under_readers(store, fresh, engine, tmp_path):
    fresh.update(store)
    other = open_index(tmp_path / "search", engine)
    wrong, searches, done = [], [0], threading.Event()

    def read_on():
        while not done.is_set():
            try:
                for opened in (fresh, other):
                    found = opened.search("flow rectified").keys
                    if set(found) != {2, 3, 6} or opened.count() != 6:
                        wrong.append(found)
                searches[0] += 1
            except Exception as error:
                wrong.append(error)
                return

    readers = [threading.Thread(target=read_on) for _ in range(2)]
    for reader in readers:
        reader.start()
    paths = set()
    for _ in range(5):
        assert fresh.rebuild(store) == 6
        paths.add(fresh.path)
    done.set()
    for reader in readers:
        reader.join(60)
    assert wrong == [] and searches[0] > 0
    assert len(paths) == 5 and other.path == fresh.path
    # Nothing of the old ones is left.
    assert [path for path in fresh.path.parent.iterdir() if path.is_dir()] == [fresh.path]
    other.close()


def test_a_rebuild_that_fails_leaves_the_index_as_it_was(store, fresh):
    fresh.update(store)
    before = fresh.path

    def fail(done, total):
        raise RuntimeError("full")

    with pytest.raises(RuntimeError):
        fresh.rebuild(store, fail)
    assert fresh.path == before and fresh.search("rotary").keys == (1,)
    assert [path for path in before.parent.iterdir() if path.is_dir()] == [before]


def test_a_rebuild_beside_another_writer_is_refused(store, fresh, monkeypatch):
    monkeypatch.setattr(base, "WAIT", 0.01)
    with fresh._generations.turn(1) as ours:
        assert ours
        with pytest.raises(TimeoutError, match="try again later"):
            fresh.rebuild(store)


def test_an_index_ahead_of_its_database_is_built_again(store, fresh):
    fresh.update(store)
    earlier = Store()
    earlier.upsert([make(8, "Another beginning")])
    assert fresh.update(earlier) == 1
    assert fresh.count() == 1 and fresh.search("rotary").keys == () and fresh.search("beginning").keys == (1,)


def test_frequencies_stay_frozen_until_the_index_has_grown_by_a_quarter(fresh):
    store = Store()
    # One change each, so that what is read again is what was written.
    for n in range(1, 41):
        store.upsert([make(n, f"word{n % 7} word{n % 5} shared", "some text of it")])
    fresh.update(store)
    first = papers(store, [1])[0]
    before = fresh.keywords(first)
    assert before and fresh._frozen(["shared", "word1", "nowhere"]) == ({"shared": 40, "word1": 12}, 40)
    for n in range(41, 50):
        store.upsert([make(n, f"word{n % 7} shared")])
    fresh.update(store)
    assert fresh.count() == 49 and fresh.keywords(first) == before
    store.upsert([make(50, "word1 other")])
    fresh.update(store)
    assert fresh._frozen(["shared"]) == ({"shared": 49}, 50) and fresh.keywords(first) != before


def test_both_engines_and_a_rebuild_give_the_same_keywords(store, tmp_path):
    first, second = (open_index(tmp_path / name, name) for name in ("fts5", "tantivy"))
    first.update(store)
    second.update(store)
    everything = papers(store, list(range(1, 7)))
    found = [first.keywords(paper) for paper in everything]
    assert found == [second.keywords(paper) for paper in everything] and all(found)
    first.rebuild(store)
    second.rebuild(store)
    assert found == [first.keywords(paper) for paper in everything] == [second.keywords(paper) for paper in everything]
    first.close()
    second.close()


def test_threads_that_are_gone_leave_no_connection_behind(store, tmp_path):
    import gc

    opened = open_index(tmp_path / "search")
    opened.update(store)
    for _ in range(5):
        thread = threading.Thread(target=opened.search, args=("flow",))
        thread.start()
        thread.join(30)
    gc.collect()
    assert len(opened._all) <= 1
    opened.close()
