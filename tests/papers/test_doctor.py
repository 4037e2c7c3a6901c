from __future__ import annotations

import sqlite3
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from danlu.papers import doctor, schema
from danlu.papers.jobs import ATTEMPTS, Queue
from danlu.papers.sample import load_sample
from danlu.papers.search import open_index
from danlu.papers.settings import load_settings
from danlu.papers.store import Store


@pytest.fixture
def settings(tmp_path):
    return load_settings(environment={}, data=tmp_path)


def _filled(settings):
    store = Store(settings.database_url)
    load_sample(store)
    return store


def _found(settings):
    return {finding.about: finding for finding in doctor.examine(settings)}


def _note_poll(store, **values):
    with store.writing() as connection:
        connection.execute(schema.poll.insert().values(source="rss", key="cs.AI", **values))


def test_an_installation_that_works_has_nothing_bad(settings):
    store = _filled(settings)
    index = open_index(settings.data / "search", "fts5")
    index.update(store)
    index.close()
    store.close()
    found = _found(settings)
    assert not [finding for finding in found.values() if finding.state == "bad"]
    assert found["SQLite"].text == sqlite3.sqlite_version and found["database"].text.startswith("44 papers")
    assert found["search index"].text == "fts5, 0 papers behind" and found["search index"].state == "ok"
    assert found["engine"].text == "extractive" and found["polling"].text.startswith("off")


def test_an_index_that_has_not_caught_up_is_noted(settings):
    _filled(settings).close()
    finding = _found(settings)["search index"]
    assert finding.state == "note" and "44 papers behind" in finding.text


def test_an_index_that_cannot_be_read_says_how_to_build_it_again(settings):
    _filled(settings).close()
    open_index(settings.data / "search", "fts5").close()
    for file in (settings.data / "search").rglob("*"):
        if file.is_file():
            file.write_bytes(b"this is no database, whatever its name says" * 100)
    finding = _found(settings)["search index"]
    assert finding.state == "bad" and "danlu papers reindex" in finding.text


def test_a_database_that_cannot_be_opened_is_the_last_finding(settings, tmp_path):
    (tmp_path / "papers.db").write_bytes(b"this is no database, whatever its name says" * 100)
    findings = list(doctor.examine(settings))
    assert findings[-1].about == "database" and findings[-1].state == "bad"
    assert "cannot be opened" in findings[-1].text and "\n" not in findings[-1].text


def test_a_password_is_not_shown(tmp_path):
    address = "postgresql://me:secret@127.0.0.1:1/papers"
    findings = list(doctor.examine(load_settings(environment={}, data=tmp_path, database=address)))
    assert findings[-1].state == "bad" and not any("secret" in finding.text for finding in findings)


@pytest.mark.parametrize(("hours", "state"), [(1, "ok"), (25, "ok"), (27, "bad"), (None, "bad")])
def test_a_source_that_has_been_silent_is_bad_on_a_weekday(settings, monkeypatch, hours, state):
    now = datetime(2024, 5, 16, 12, tzinfo=UTC)
    monkeypatch.setattr(doctor, "datetime", SimpleNamespace(now=lambda zone: now.astimezone(zone)))
    store = _filled(settings)
    last = None if hours is None else now.replace(tzinfo=None) - timedelta(hours=hours)
    _note_poll(store, last_ok=last, error="status 503" if hours is None else "")
    store.close()
    finding = _found(settings.model_copy(update={"follow": "cs.AI", "contact": "me@example.org"}))["rss cs.AI"]
    assert finding.state == state
    assert "status 503" in finding.text if hours is None else "last success 2024" in finding.text
    # Whoever follows nothing is not late.
    assert _found(settings)["rss cs.AI"].state == "ok"


def test_a_weekend_is_no_silence(settings, monkeypatch):
    now = datetime(2024, 5, 19, 12, tzinfo=UTC)
    monkeypatch.setattr(doctor, "datetime", SimpleNamespace(now=lambda zone: now.astimezone(zone)))
    store = _filled(settings)
    _note_poll(store, last_ok=now.replace(tzinfo=None) - timedelta(hours=40))
    store.close()
    found = _found(settings.model_copy(update={"follow": "cs.AI", "contact": "me@example.org"}))
    assert found["rss cs.AI"].state == "ok"


def test_failed_jobs_are_noted(settings):
    store = _filled(settings)
    queue = Queue(store)
    queue.put("answer", "a", {})
    queue.put("answer", "b", {})
    for _ in range(ATTEMPTS):
        queue.fail(queue.claim(["answer"], "w"), "x", "y", None)
        queue.put("answer", "a", {})
    store.close()
    finding = _found(settings)["jobs: answer"]
    assert finding.state == "note" and "3 failed" in finding.text


def test_a_full_disk_is_bad(settings, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**29))
    assert _found(settings)["disk"].state == "bad" and "0.5 GiB" in _found(settings)["disk"].text
