from __future__ import annotations

import os
import time
from datetime import UTC, datetime

import pytest

from danlu.papers.sources.moments import iso, rfc2822, version_number


@pytest.fixture(params=["America/Los_Angeles", "Asia/Shanghai"])
def elsewhere(request, monkeypatch):
    """A machine in another zone."""
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield
    monkeypatch.delenv("TZ")
    assert "TZ" not in os.environ
    time.tzset()


def test_a_time_without_zone_is_utc_wherever_this_machine_is(elsewhere):
    expected = datetime(2024, 1, 12, 18, 0, 5, tzinfo=UTC)
    for text in ("2024-01-12T18:00:05", "2024-01-12T18:00:05Z", "2024-01-12T13:00:05-05:00"):
        assert iso(text) == expected
    for text in ("Fri, 12 Jan 2024 18:00:05 GMT", "Fri, 12 Jan 2024 18:00:05 -0000", "12 Jan 2024 13:00:05 EST"):
        assert rfc2822(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "1024-01-12T18:00:00", "9999-12-31T23:00:00-14:00", "2024-13-01"])
def test_what_is_no_time_of_a_paper_is_refused(text):
    with pytest.raises(ValueError, match="Invalid|month|out of range"):
        iso(text)
    with pytest.raises(ValueError, match="not a date|out of range"):
        rfc2822(text)


def test_versions_have_ascii_digits_and_no_leading_zero():
    assert version_number("v12") == 12
    for text in ("v0", "v01", "v\u0661", "v12345", "", "v1 "):
        with pytest.raises(ValueError, match="not a version"):
            version_number(text)
