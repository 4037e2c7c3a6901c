from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import pytest

from danlu.papers.sources.mailing import ZONE, latest_mailing, mailing_day, next_refresh


@pytest.mark.parametrize(
    ("submitted", "day"),
    [
        ("2024-01-16T13:59", "2024-01-17"),  # Tuesday, mailed that evening, dated Wednesday
        ("2024-01-16T14:00", "2024-01-18"),
        ("2024-01-18T13:59", "2024-01-19"),  # Thursday
        ("2024-01-18T14:00", "2024-01-22"),  # mailed on Sunday, dated Monday
        ("2024-01-19T13:59", "2024-01-22"),
        ("2024-01-19T14:00", "2024-01-23"),  # Friday afternoon
        ("2024-01-20T09:00", "2024-01-23"),
        ("2024-01-21T23:00", "2024-01-23"),
        ("2024-01-22T13:59", "2024-01-23"),
        ("2024-07-16T13:59", "2024-07-17"),  # daylight saving
    ],
)
def test_a_submission_belongs_to_the_mailing_that_it_is_in_time_for(submitted, day):
    local = datetime.fromisoformat(submitted).replace(tzinfo=ZONE)
    for moment in (local, local.astimezone(UTC)):
        assert mailing_day(moment) == date.fromisoformat(day)


def test_mailings_come_in_order_and_are_dated_by_weekdays():
    moment, before = datetime(2024, 1, 1, tzinfo=UTC), date(2024, 1, 1)
    for _ in range(24 * 60):
        moment += timedelta(minutes=60)
        day = mailing_day(moment)
        assert before <= day and day.weekday() < 5 and day > moment.astimezone(ZONE).date() - timedelta(days=1)
        before = day


def test_the_latest_mailing_is_that_of_the_last_weekday():
    assert latest_mailing(datetime(2024, 1, 21, 12, tzinfo=UTC)) == date(2024, 1, 19)
    assert latest_mailing(datetime(2024, 1, 16, 3, tzinfo=UTC)) == date(2024, 1, 15)
    assert latest_mailing(datetime(2024, 1, 16, 12, tzinfo=UTC)) == date(2024, 1, 16)


def test_the_feed_is_refreshed_after_midnight_in_the_east():
    assert next_refresh(datetime(2024, 1, 16, 12, tzinfo=UTC)) == datetime(2024, 1, 17, 5, 5, tzinfo=UTC)
    assert next_refresh(datetime(2024, 7, 16, 3, tzinfo=UTC)) == datetime(2024, 7, 16, 4, 5, tzinfo=UTC)
