"""What has been used up today, by name, over all processes."""

from __future__ import annotations

from datetime import UTC, date, datetime

from sqlalchemy import select

from danlu.papers.schema import budget as table
from danlu.papers.store import Store, insert_into


def _today() -> date:
    return datetime.now(UTC).date()


def spent(store: Store, name: str, day: date | None = None) -> int:
    """How much was used on a day (in UTC), the current one unless given."""
    with store.reading() as connection:
        query = select(table.c.used).where(table.c.day == (day or _today()), table.c.name == name)
        return int(connection.scalar(query) or 0)


def spend(store: Store, name: str, amount: int, day: date | None = None) -> None:
    """Add to what was used on a day (in UTC), the current one unless given."""
    here = {"day": day or _today(), "name": name}
    with store.writing() as connection:
        statement = insert_into(connection, table).values(**here, used=amount)
        change = {"used": table.c.used + amount}
        connection.execute(statement.on_conflict_do_update(index_elements=["day", "name"], set_=change))
