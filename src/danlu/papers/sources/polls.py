"""What is noted of polls: marks of the last answer, where a source was left, and what went wrong."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

from sqlalchemy import select

from danlu.papers import schema
from danlu.papers.net.errors import FetchError
from danlu.papers.sources.arxiv_api import ApiError
from danlu.papers.sources.arxiv_oai import HarvestError
from danlu.papers.sources.xml import BadDocument
from danlu.papers.store import Store, Written

logger = logging.getLogger("danlu.papers.polling")

#: What a source may do wrong: it is noted, and the other sources go on.
SOURCE_ERRORS = (FetchError, BadDocument, ApiError, HarvestError)


@dataclass
class PollReport:
    """What a poll brought.

    Args:
        day: of the list, None where none was mailed.
        written: what changed in the store.
        late: papers that the list had missed before.
        warnings: what the operator should know.
        again_at: when to poll next, in UTC without zone.
        errors: of sources that gave nothing, by name.
    """

    day: date | None = None
    written: Written = field(default_factory=Written)
    late: int = 0
    warnings: list[str] = field(default_factory=list)
    again_at: datetime | None = None
    errors: dict[str, str] = field(default_factory=dict)


def poll_row(store: Store, source: str, key: str) -> dict[str, Any]:
    """What is known of a source's last poll."""
    table = schema.poll
    with store.reading() as connection:
        row = connection.execute(select(table).where(table.c.source == source, table.c.key == key)).mappings().first()
    if row is not None:
        return dict(row)
    texts = ("etag", "last_modified", "body_sha", "cursor", "error", "warning")
    return {**{column.name: None for column in table.columns}, **dict.fromkeys(texts, "")}


def state_of(row: dict[str, Any]) -> dict[str, Any]:
    """Where a source was left, as `note_poll` kept it."""
    return dict(json.loads(row["cursor"] or "{}"))


def note_poll(store: Store, source: str, key: str, now: datetime, **values: Any) -> None:
    """Note that a source was read.

    Args:
        store: to write to.
        source: kind of the source.
        key: which of them.
        now: the time, with zone.
        values: of columns of the table; a ``cursor`` may be a dictionary.
    """
    moment = _moment(now)
    if isinstance(values.get("cursor"), dict):
        values["cursor"] = json.dumps(values["cursor"])
    _write(store, source, key, {"last_ok": moment, "last_try": moment, "error": "", **values})


def note_failure(store: Store, source: str, key: str, now: datetime, error: Exception, report: PollReport) -> None:
    """Note that a source gave nothing."""
    logger.warning("poll of %s %s failed: %s", source, key, error)
    report.errors[f"{source} {key}".strip()] = str(error)
    _write(store, source, key, {"last_try": _moment(now), "error": f"{type(error).__name__}: {error}"[:1000]})


def _moment(now: datetime) -> datetime:
    return now.astimezone(UTC).replace(tzinfo=None, microsecond=0)


def _write(store: Store, source: str, key: str, values: dict[str, Any]) -> None:
    table = schema.poll
    here = (table.c.source == source, table.c.key == key)
    with store.writing() as connection:
        if connection.execute(table.update().where(*here).values(values)).rowcount == 0:
            connection.execute(table.insert().values(source=source, key=key, **values))
