from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime

from danlu.papers import budget
from danlu.papers.store import Store

DAY = date(2024, 5, 17)


def test_what_is_spent_adds_up_by_day_and_name(store):
    assert budget.spent(store, "engine", DAY) == 0
    budget.spend(store, "engine", 30, DAY)
    budget.spend(store, "engine", 12, DAY)
    budget.spend(store, "other", 5, DAY)
    budget.spend(store, "engine", 7, date(2024, 5, 18))
    assert [budget.spent(store, "engine", DAY), budget.spent(store, "other", DAY)] == [42, 5]
    assert budget.spent(store, "engine", date(2024, 5, 18)) == 7


def test_without_a_day_it_is_today_in_utc(store):
    before = datetime.now(UTC).date()
    budget.spend(store, "engine", 3)
    after = datetime.now(UTC).date()
    # Midnight may pass between the two.
    assert sum(budget.spent(store, "engine", day) for day in {before, after}) == 3
    assert budget.spent(store, "engine") in (0, 3) and budget.spent(store, "engine", after) == budget.spent(
        store, "engine"
    )


def test_large_numbers_fit(store):
    budget.spend(store, "engine", 3 * 10**9, DAY)
    budget.spend(store, "engine", 3 * 10**9, DAY)
    assert budget.spent(store, "engine", DAY) == 6 * 10**9


def test_nothing_is_lost_when_many_spend_at_once(store):
    url = store.url.render_as_string(hide_password=False)

    def work(_):
        other = Store(url, migrate=False)
        try:
            for _ in range(10):
                budget.spend(other, "engine", 1, DAY)
        finally:
            other.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert budget.spent(store, "engine", DAY) == 40
