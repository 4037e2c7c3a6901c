"""Why a request gave nothing."""

from __future__ import annotations

from datetime import datetime


class FetchError(Exception):
    """A request that gave nothing usable.

    Attributes:
        kind: a word for programs.
        retryable: whether another try may help.
        attempts: tries made.
        waited: seconds spent between them.
        retry_at: earliest time of a new request, in UTC without zone, or None.
    """

    kind = "failed"
    retryable = False

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.attempts = 0
        self.waited = 0.0
        self.retry_at: datetime | None = None


class Refused(FetchError):
    """An address that may not be asked: its scheme, host or network is not allowed."""

    kind = "refused"


class NotFound(FetchError):
    """The source says that there is no such thing."""

    kind = "not_found"


class TooLarge(FetchError):
    """More bytes than allowed."""

    kind = "too_large"


class BadContent(FetchError):
    """An answer of another kind than asked for, or packed in a way that is not accepted."""

    kind = "bad_content"


class Rejected(FetchError):
    """A status that a new try will not change."""

    kind = "rejected"


class Unavailable(FetchError):
    """The host cannot be reached, is overloaded, or asks to wait."""

    kind = "unavailable"
    retryable = True


class CircuitOpen(FetchError):
    """The host failed so often that it is left alone for a while."""

    kind = "circuit_open"
