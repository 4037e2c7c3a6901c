"""How often to try again, and how long to wait: the waits of a policy, and delays that a server asks for.

Source: Scientific Spaces archive 9938; the retry loop itself is stamina's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

_SECONDS = re.compile(r"[0-9]{1,18}\Z")
#: The three forms of a date that HTTP knows begin with a day's name.
_DATE = re.compile(r"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)[a-z]*,? ", re.IGNORECASE)
_ASCTIME = "%a %b %d %H:%M:%S %Y"
_RFC850 = "%A, %d-%b-%y %H:%M:%S GMT"


def parse_retry_after(value: str | None, now: datetime, cap: float) -> float | None:
    """Seconds to wait that a Retry-After header asks for.

    Args:
        value: the header, or None.
        now: the time, with zone.
        cap: the longest wait that is believed, in seconds.

    Returns:
        Seconds in 0..cap, or None where the header says nothing that HTTP knows (fractions, signs, foreign digits).
    """
    text = (value or "").strip(" \t")
    if _SECONDS.match(text):
        return min(float(text), cap)
    if not _DATE.match(text):
        return None
    try:
        moment = _http_date(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return min(max((moment - now).total_seconds(), 0.0), cap)


def _http_date(text: str) -> datetime:
    for form in (_ASCTIME, _RFC850):
        try:
            return datetime.strptime(text, form).replace(tzinfo=UTC)
        except ValueError:
            continue
    moment = parsedate_to_datetime(text)
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Policy:
    """When to try again after a failure.

    Args:
        attempts: tries in all, at least 1.
        deadline: seconds that all waits together may take, above 0.
        wait_initial: seconds before the second try.
        wait_max: longest wait, at least ``wait_initial``.
        wait_base: factor from one wait to the next, at least 1.
        jitter: each wait grows by a random share of this many seconds.
        retry_after_cap: longest wait that a server's Retry-After is believed for.

    Raises:
        ValueError: a value out of range.
    """

    attempts: int = 5
    deadline: float = 180.0
    wait_initial: float = 3.0
    wait_max: float = 60.0
    wait_base: float = 2.0
    jitter: float = 3.0
    retry_after_cap: float = 600.0

    def __post_init__(self) -> None:
        rules = {
            "attempts": (self.attempts >= 1, "at least 1"),
            "deadline": (self.deadline > 0, "above 0"),
            "wait_initial": (0 <= self.wait_initial <= self.wait_max, "in 0..wait_max"),
            "wait_base": (self.wait_base >= 1, "at least 1"),
            "jitter": (self.jitter >= 0, "at least 0"),
            "retry_after_cap": (self.retry_after_cap >= 0, "at least 0"),
        }
        for name, (holds, rule) in rules.items():
            if not holds or not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be {rule} and finite, got {getattr(self, name)}")

    def wait(self, attempt: int, random: Callable[[], float]) -> float:
        """Seconds to wait after a failed try.

        Args:
            attempt: number of the try that failed, from 1.
            random: gives numbers in 0..1.
        """
        # A power beyond the largest float is an error, and far beyond any wait.
        exponent = min(attempt - 1, 200)
        return min(self.wait_max, self.wait_initial * self.wait_base**exponent + self.jitter * random())


#: For sources of papers: 3, 6, 12 and 24 seconds before jitter.
SOURCES = Policy()
#: For endpoints of models.
ENDPOINTS = Policy(attempts=4, deadline=60.0, wait_initial=1.0, wait_max=20.0, jitter=1.0)
