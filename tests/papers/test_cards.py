from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa

from danlu.papers import budget, schema
from danlu.papers.cards import NOTES, Cards
from danlu.papers.jobs import HISTORY, TOKEN, Queue
from reference.answering import Scripted, cards_of, stored


def _now():
    return datetime.now(UTC).replace(tzinfo=None)


def test_reading_a_card_starts_nothing(store):
    paper, cards = stored(store), cards_of(store)
    for version in (None, 1):
        assert cards.get(paper, version, "en") is None
    assert cards.versions(paper.pk, "en") == [] and cards.queue.depth() == {}
    with store.reading() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(schema.job)) == 0


def test_the_same_request_is_the_same_job_and_others_are_not(store):
    paper, other, cards = stored(store), stored(store, "2401.00002"), cards_of(store)
    first = cards.ask(paper, None, "en")
    assert cards.ask(paper, 3, "en", TOKEN).id == first.id and cards.queue.get(first.id).prio == TOKEN
    second = Cards(store, Queue(store), "j" * 64)
    different = {cards.ask(paper, 2, "en").id, cards.ask(paper, 3, "zh").id, cards.ask(other, 3, "en").id,
                 second.ask(paper, 3, "en").id}  # fmt: skip
    assert len(different) == 4 and first.id not in different
    assert first.payload == {"pk": paper.pk, "version": 3, "lang": "en"} and first.prio == HISTORY


def test_twenty_requests_at_once_make_one_job(store):
    paper, cards = stored(store), cards_of(store)
    with ThreadPoolExecutor(20) as pool:
        jobs = list(pool.map(lambda _: cards.ask(paper, None, "en").id, range(20)))
    assert len(set(jobs)) == 1


def test_a_card_holds_answers_notes_and_its_job(store):
    paper, cards = stored(store), cards_of(store)
    job = cards.ask(paper, None, "en")
    cards.write(paper.pk, 3, "en", 2, "second", [{"start": 0, "end": 3}])
    cards.write(paper.pk, 3, "en", 1, "first", [])
    cards.write(paper.pk, 3, "en", NOTES, "one note\nanother", [])
    cards.write(paper.pk, 3, "en", 1, "first, again", [])
    card = cards.get(paper, None, "en")
    assert [(answer.q, answer.text) for answer in card.answers] == [(1, "first, again"), (2, "second")]
    assert card.answers[1].sources == [{"start": 0, "end": 3}] and card.notes == ("one note", "another")
    assert card.job == job and card.version == 3 and not card.complete
    for q in range(1, 7):
        cards.write(paper.pk, 3, "en", q, "x", [])
    assert cards.get(paper, 3, "en").complete


def test_cards_of_other_versions_languages_and_engines_are_not_mixed(store):
    paper, cards = stored(store), cards_of(store)
    cards.write(paper.pk, 1, "en", 1, "of version 1", [])
    assert cards.get(paper, None, "en") is None and cards.get(paper, 1, "zh") is None
    assert cards.get(paper, 1, "en").answers[0].text == "of version 1" and cards.versions(paper.pk, "en") == [1]
    other = Cards(store, Queue(store), "j" * 64)
    assert other.get(paper, 1, "en") is None and other.versions(paper.pk, "en") == []
    cards.forget(paper.pk, 1, "en")
    assert cards.get(paper, 1, "en") is None


def test_a_paper_without_versions_has_a_card(store):
    paper = stored(store, "P19-1001@ACL", version=None)
    cards = cards_of(store)
    cards.write(paper.pk, 0, "en", 1, "x", [])
    assert cards.get(paper, None, "en").version == 0


def test_chunks_come_in_order_behind_any_of_them(store):
    cards = cards_of(store)
    for number, text in enumerate("abcde"):
        cards.append(1, 1 + number // 3, text)
        cards.append(2, 1, "other")
    chunks = cards.chunks(1)
    assert [(q, text) for _, q, text in chunks] == [(1, "a"), (1, "b"), (1, "c"), (2, "d"), (2, "e")]
    assert cards.chunks(1, chunks[2][0]) == chunks[3:] and cards.chunks(1, chunks[-1][0]) == []


def test_a_restart_has_a_number_that_no_reader_has_yet(store):
    """A database may give the number of a deleted last row again: a reader who has it would miss the restart."""
    cards = cards_of(store)
    cards.append(1, 1, "kept")
    cards.append(1, 2, "void")
    last = cards.chunks(1)[-1][0]
    cards.restart(1, 2)
    cards.append(1, 2, "new")
    assert [(q, text) for _, q, text in cards.chunks(1, last)] == [(2, ""), (2, "new")]
    assert [text for _, _, text in cards.chunks(1)] == ["kept", "", "new"]


def test_chunks_of_jobs_that_ended_long_ago_go(store):
    paper, cards = stored(store), cards_of(store)
    done = cards.ask(paper, None, "en")
    cards.append(done.id, 1, "old")
    cards.queue.finish(cards.queue.claim(["answer"], "w"))
    live = cards.ask(paper, 1, "en")
    cards.append(live.id, 1, "running")
    assert cards.tidy(_now() - timedelta(hours=1)) == 0
    assert cards.tidy(_now() + timedelta(hours=1)) == 1
    assert cards.chunks(done.id) == [] and cards.chunks(live.id)


def test_tokens_of_a_day_add_up_by_name(store):
    assert budget.spent(store, "a") == 0
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: budget.spend(store, "a", n), range(1, 11)))
    budget.spend(store, "b", 5)
    yesterday = datetime.now(UTC).date() - timedelta(days=1)
    assert budget.spent(store, "a") == 55 and budget.spent(store, "b") == 5 and budget.spent(store, "a", yesterday) == 0


def test_keys_hold_all_that_matters():
    cards = Cards(None, None, Scripted().key())
    assert len({cards.key_for(p, v, lang) for p in (1, 12) for v in (1, 2) for lang in ("en", "zh")}) == 8
    assert len(cards.key_for(2**60, 10**5, "en")) < 200
