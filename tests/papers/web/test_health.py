"""Health tells whether the site is up to date, and when somebody should look."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta

import pytest
from starlette.testclient import TestClient
from tests.papers.web.scene import Scripted, make_site, record

from danlu.papers import schema
from danlu.papers.web.app import create_app
from danlu.papers.web.health import ALARM, examine, weekday_hours

#: A Wednesday.
NOW = datetime(2024, 5, 15, 12, tzinfo=UTC)
CONTACT = "site@example.org"


def polled(site, source, key, ago=None, **values):
    """Note a poll so many hours before `NOW`."""
    moment = None if ago is None else (NOW - timedelta(hours=ago)).replace(tzinfo=None)
    with site.store.writing() as connection:
        connection.execute(schema.poll.insert().values(source=source, key=key, last_ok=moment, **values))


def following(folder, follow="cs.AI", **settings):
    return make_site(folder, Scripted(), follow=follow, contact=CONTACT, **settings)


@pytest.mark.parametrize(
    ("since", "now", "hours"),
    [
        # Wednesday noon to Thursday noon.
        ("2024-05-15T12:00", "2024-05-16T12:00", 24),
        # Friday noon to Monday noon: half of Friday and half of Monday, in the calendar of New York.
        ("2024-05-17T16:00", "2024-05-20T16:00", 24),
        # All of it on a weekend.
        ("2024-05-18T05:00", "2024-05-20T03:59", 0),
        # In UTC it is Saturday already, in New York still Friday.
        ("2024-05-18T02:00", "2024-05-18T04:00", 2),
        # In UTC it is Monday, in New York still Sunday.
        ("2024-05-20T00:00", "2024-05-20T04:00", 0),
        # Two weeks and a weekend.
        ("2024-05-15T12:00", "2024-05-29T12:00", 240),
        # Over the end of summer time, whose hour falls on a Sunday.
        ("2024-11-01T12:00", "2024-11-04T12:00", 23),
        ("2024-05-15T12:00", "2024-05-15T12:00", 0),
        # A clock that was set back.
        ("2024-05-15T12:00", "2024-05-15T11:00", 0),
    ],
)
def test_hours_of_weekdays_are_those_of_the_source(since, now, hours):
    moments = [datetime.fromisoformat(text).replace(tzinfo=UTC) for text in (since, now)]
    assert weekday_hours(*moments) == pytest.approx(hours)


def test_a_source_is_late_after_26_hours(tmp_path):
    site = following(tmp_path)
    polled(site, "rss", "cs.AI", ALARM)
    found = examine(site, NOW)
    assert (found.state, found.alarms, found.sources[0].late) == ("ok", [], False)
    assert found.sources[0].hours == 26 and found.sources[0].last_ok == NOW - timedelta(hours=26)
    found = examine(site, NOW + timedelta(hours=0.1))
    assert found.state == "alarm" and found.sources[0].late
    assert found.alarms == ["rss cs.AI has not been read for 26 hours of weekdays"]


def test_a_weekend_is_no_alarm(tmp_path):
    site = following(tmp_path)
    friday = datetime(2024, 5, 17, 12, tzinfo=UTC)
    polled(site, "rss", "cs.AI", (NOW - friday).total_seconds() / 3600)
    assert examine(site, datetime(2024, 5, 20, 12, tzinfo=UTC)).state == "ok"
    assert examine(site, datetime(2024, 5, 21, 12, tzinfo=UTC)).state == "alarm"


def test_what_was_never_read_is_an_alarm_and_every_part_of_the_expression_counts(tmp_path):
    site = following(tmp_path, "cs.AI+hep-th-cs.CY")
    polled(site, "rss", "cs.AI", 1)
    found = examine(site, NOW)
    assert found.alarms == ["rss hep-th has never been read"] and found.state == "alarm"
    assert [(each.key, each.hours) for each in found.sources] == [("cs.AI", 1), ("hep-th", None)]


def test_a_source_that_fails_is_late_although_it_is_asked_again_and_again(tmp_path):
    site = following(tmp_path)
    tried = (NOW - timedelta(minutes=5)).replace(tzinfo=None)
    polled(site, "rss", "cs.AI", 40, last_try=tried, error="Refused: 503")
    source = examine(site, NOW).sources[0]
    assert source.late and source.error == "Refused: 503" and source.last_try == NOW - timedelta(minutes=5)


def test_the_interface_and_the_archive_are_watched_too(tmp_path):
    site = following(tmp_path, "hep-th")
    polled(site, "rss", "hep-th", 1)
    polled(site, "api", "hep-th", 30)
    polled(site, "oai", "physics:hep-th", 50)
    found = {(each.source, each.key): each.late for each in examine(site, NOW).sources}
    assert found == {("rss", "hep-th"): False, ("api", "hep-th"): True, ("oai", "physics:hep-th"): True}


def test_sources_that_the_site_no_longer_follows_raise_no_alarm(tmp_path):
    site = following(tmp_path, "cs.AI")
    polled(site, "rss", "cs.AI", 1)
    polled(site, "rss", "math.NA", 1000)
    polled(site, "oai", "math", 1000)
    found = examine(site, NOW)
    assert found.state == "ok" and [each.late for each in found.sources] == [False] * 3


def test_a_site_that_follows_nothing_is_well(site):
    polled(site, "rss", "cs.AI", 10_000)
    found = examine(site, NOW)
    assert found.state == "ok" and found.follow == ""


def test_the_state_of_database_search_and_queue(site):
    from danlu.papers.jobs import HISTORY, TODAY

    site.store.upsert([record("2405.00800", "Not indexed yet"), record("2405.00801", "Nor this")])
    for number, prio in enumerate((HISTORY, TODAY, TODAY)):
        site.queue.put("answer", f"key{number}", {}, prio)
    site.queue.claim(["answer"], "worker")
    found = examine(site, NOW)
    assert found.queue == {"answer": {"queued": 2, "running": 1}}
    assert found.index_lag == 2 and found.papers == site.index.count() + 2
    assert str(found.latest_day) == "2024-05-17"
    site.index.update(site.store)
    assert examine(site, NOW).index_lag == 0


def test_gaps_and_warnings_are_shown_as_text(tmp_path):
    site = following(tmp_path)
    polled(site, "rss", "cs.AI", 1, expected_n=132, got_n=122, warning="<b>3 entries</b> could not be read")
    client = TestClient(create_app(site))
    found = client.get("/health", headers={"Accept": "application/json"}).json()
    assert found["sources"][0]["expected"] == 132 and found["sources"][0]["got"] == 122
    page = client.get("/health", headers={"Accept": "text/html,*/*"})
    assert page.headers["Content-Type"].startswith("text/html") and page.headers["Vary"].startswith("Accept")
    assert "122 of 132" in page.text and "&lt;b&gt;3 entries&lt;/b&gt;" in page.text
    assert "Alarm:" in page.text and "rss cs.AI has not been read" in page.text


def test_a_monitor_sees_the_state_in_the_status(tmp_path):
    site = following(tmp_path)
    client = TestClient(create_app(site))
    for accept in ("application/json", "text/html", "*/*"):
        assert client.get("/health", headers={"Accept": accept}).status_code == 503
    assert client.get("/api/v1/health").status_code == 200
    with site.store.writing() as connection:
        now = datetime.now(UTC).replace(tzinfo=None)
        connection.execute(schema.poll.insert().values(source="rss", key="cs.AI", last_ok=now))
    answer = client.get("/health")
    assert answer.status_code == 200 and answer.json()["state"] == "ok"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.json() == client.get("/api/v1/health").json()


def test_a_database_that_cannot_be_read_is_said_without_its_name(tmp_path):
    site = make_site(tmp_path, Scripted())
    client = TestClient(create_app(site))
    assert client.get("/health").status_code == 200
    site.store.close()
    for path in tmp_path.glob("papers.db*"):
        path.unlink()
    (tmp_path / "papers.db").write_bytes(b"this is no database, but text that is longer than its header" * 100)
    answer = client.get("/health")
    assert answer.status_code == 503 and answer.json()["state"] == "down"
    assert str(tmp_path) not in answer.text and "papers.db" not in answer.text
    shutil.rmtree(tmp_path)
