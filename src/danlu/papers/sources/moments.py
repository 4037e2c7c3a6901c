"""Times as sources write them, in UTC: one without zone means UTC, never the zone of this machine."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from danlu.papers.records import utc

#: Years that papers may come from: others are slips.
_YEARS = range(1970, 2200)
_VERSION = re.compile(r"v?([1-9][0-9]{0,3})\Z")
_MONTHS = {name: i + 1 for i, name in enumerate("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split())}
#: The one form in which arXiv writes the times of versions; the general reader takes four times as long.
_GMT = re.compile(r"[A-Z][a-z]{2}, ([0-9]{1,2}) ([A-Z][a-z]{2}) ([0-9]{4}) ([0-9]{2}):([0-9]{2}):([0-9]{2}) GMT\Z")


def iso(text: str) -> datetime:
    """A date or time of ISO 8601 in UTC.

    Raises:
        ValueError: it is none.
    """
    return _in_utc(datetime.fromisoformat(text.strip()), text)


def rfc2822(text: str) -> datetime:
    """A time of e-mail headers in UTC.

    Raises:
        ValueError: it is none.
    """
    match = _GMT.match(text)
    if match:
        day, month, year, hour, minute, second = match.groups()
        number = _MONTHS.get(month, 0)
        return _known(datetime(int(year), number, int(day), int(hour), int(minute), int(second), tzinfo=UTC))
    return _in_utc(mail_date(text), text)


def mail_date(text: str) -> datetime:
    """A time of e-mail headers in its own offset.

    Raises:
        ValueError: it is none.
    """
    try:
        return parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        raise ValueError(f"not a date of mail: {text[:60]!r}") from error


def version_number(text: str) -> int:
    """The number of a version such as ``v2``.

    Raises:
        ValueError: it is none.
    """
    match = _VERSION.match(text)
    if match is None:
        raise ValueError(f"not a version: {text[:20]!r}")
    return int(match.group(1))


def _in_utc(moment: datetime, text: str) -> datetime:
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    try:
        return _known(utc(moment))
    except OverflowError as error:
        raise ValueError(f"a time out of range: {text[:60]!r}") from error


def _known(moment: datetime) -> datetime:
    if moment.year not in _YEARS:
        raise ValueError(f"a time out of range: {moment.isoformat()}")
    return moment
