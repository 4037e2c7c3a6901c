"""Made-up papers in any number, for tests and load: the same seed gives the same papers."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from functools import cache

import numpy as np

from danlu.papers.categories import vocabulary
from danlu.papers.ids import ARXIV, PaperId
from danlu.papers.records import Listing, PaperRecord

#: Different words in all texts; their frequencies fall with the rank, as in language.
WORDS = 30_000
#: Papers announced on one day, of all categories.
PER_DAY = 1_000
_BLOCK = 1_000
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnrstvz" for vowel in "aeiou"]


def generate(
    count: int, seed: int = 0, last_day: date = date(2024, 12, 31), per_day: int = PER_DAY
) -> Iterator[PaperRecord]:
    """Make papers.

    Args:
        count: how many, 1 to 3,000,000.
        seed: of everything.
        last_day: the day on which the last of them is announced; earlier ones fill the weekdays before it.
        per_day: papers announced on one day.

    Yields:
        Records with titles of about 10 words, abstracts of about 170, one to three categories and one day's listings.

    Raises:
        ValueError: a count or a number per day out of range.
    """
    if not 1 <= count <= 3_000_000:
        raise ValueError(f"count must be in 1..3000000, got {count}")
    if not 1 <= per_day <= 99_999 // 23:
        raise ValueError(f"per_day must be in 1..{99_999 // 23}: identifiers have five digits a month, got {per_day}")
    random = np.random.default_rng(seed)
    days = _weekdays_before(last_day, -(-count // per_day))
    codes = [code for code, category in vocabulary().items() if category.active and "." in code]
    numbers: dict[str, int] = {}
    for first in range(0, count, _BLOCK):
        # Draws come in blocks: one call a paper would cost more than the text.
        block = min(_BLOCK, count - first)
        lengths = random.integers((6, 120, 1, 600), (14, 220, 7, 2000), size=(block, 4)).tolist()
        categories = (len(codes) ** random.random((block, 3))).astype(int) - 1
        amounts = random.integers(1, 4, size=block).tolist()
        for place in range(first, first + block):
            day, (title, abstract, authors, minutes) = days[place // per_day], lengths[place - first]
            stamp = f"{day:%y%m}"
            numbers[stamp] = numbers.get(stamp, 0) + 1
            own = tuple(dict.fromkeys(codes[i] for i in categories[place - first, : amounts[place - first]]))
            submitted = datetime(day.year, day.month, day.day, tzinfo=UTC) - timedelta(days=1, minutes=minutes)
            words = _draw(random, title + abstract + 2 * authors)
            names = words[title + abstract :]
            yield PaperRecord(
                PaperId(ARXIV, f"{stamp}.{numbers[stamp]:05d}"),
                "api",
                title=" ".join(words[:title]).capitalize(),
                abstract=_sentences(words[title : title + abstract]),
                authors=tuple(f"{a} {b}".title() for a, b in zip(names[::2], names[1::2], strict=True)),
                categories=own,
                version=1,
                versions=((1, submitted),),
                submitted_at=submitted,
                updated_at=submitted,
                listings=tuple(
                    Listing(day, code, "cross" if i else "new", place % per_day) for i, code in enumerate(own)
                ),
            )


def _weekdays_before(last: date, count: int) -> list[date]:
    """So many weekdays up to a day, oldest first."""
    found: list[date] = []
    while len(found) < count:
        if last.weekday() < 5:
            found.append(last)
        last -= timedelta(days=1)
    return found[::-1]


@cache
def _words() -> list[str]:
    random = np.random.default_rng(7)
    made: dict[str, None] = {}
    while len(made) < WORDS:
        picks = random.integers(len(_SYLLABLES), size=(WORDS, 4)).tolist()
        lengths = random.integers(2, 5, size=WORDS).tolist()
        made.update((("".join(_SYLLABLES[i] for i in pick[:n])), None) for pick, n in zip(picks, lengths, strict=True))
    return list(made)[:WORDS]


def _draw(random: np.random.Generator, length: int) -> list[str]:
    # The floor of a power with a uniform exponent has Zipf-like ranks, at the cost of one draw a word.
    words = _words()
    return [words[rank] for rank in ((WORDS ** random.random(length)).astype(int) - 1).tolist()]


def _sentences(words: list[str]) -> str:
    return " ".join(" ".join(words[i : i + 18]).capitalize() + "." for i in range(0, len(words), 18))
