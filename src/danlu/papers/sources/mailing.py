"""arXiv's calendar: which mailing a submission belongs to. No holiday is known here: what was mailed, the feed says."""

from __future__ import annotations

from datetime import date, datetime, time, timedelta
from zoneinfo import ZoneInfo

ZONE = ZoneInfo("America/New_York")
_CUTOFF = time(14)


def mailing_day(submitted: datetime) -> date:
    """The date that the feed gives to the mailing of a submission, where nobody held it back.

    Submissions of a weekday until 14:00 US Eastern are mailed at 20:00, those of Friday on Sunday evening; the feed
    dates a mailing by the midnight after it.

    Args:
        submitted: with zone.
    """
    local = submitted.astimezone(ZONE)
    day = local.date() + timedelta(days=local.time() >= _CUTOFF)
    while day.weekday() >= 5:
        day += timedelta(days=1)
    # Of Friday's submissions the mailing is on Sunday evening, and its date that of Monday.
    return day + timedelta(days=3 if day.weekday() == 4 else 1)


def latest_mailing(now: datetime) -> date:
    """The date of the latest mailing where no holiday was kept.

    Args:
        now: with zone.
    """
    day = now.astimezone(ZONE).date()
    while day.weekday() >= 5:
        day -= timedelta(days=1)
    return day


def next_refresh(now: datetime) -> datetime:
    """When the feed is next refreshed: a little after midnight US Eastern.

    Args:
        now: with zone.
    """
    local = now.astimezone(ZONE)
    following = datetime.combine(local.date() + timedelta(days=1), time(0, 5), ZONE)
    return following.astimezone(now.tzinfo)
