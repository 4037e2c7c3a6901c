"""Keywords of a paper: words that are frequent in it and rare elsewhere. Formulas are no words.

The weight of a word is ``(3 tf_title + tf_abstract) (ln((1 + N) / (1 + df)) + 1)``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from danlu.papers.tokens import stop_words, words

# A dollar sign before a space, or before a digit as the closing one, is money.
_FORMULA = re.compile(
    r"\$\$.{1,2000}?\$\$|\\\(.{1,1000}?\\\)|\\\[.{1,2000}?\\\]|(?<!\\)\$(?![\s$])(?:[^$\\]|\\.){0,1000}?(?<!\s)\$(?!\d)",
    re.DOTALL,
)


class Keyword(NamedTuple):
    """A word and its weight."""

    term: str
    weight: float


def weigh(
    title: str, abstract: str, frequencies: Callable[[Sequence[str]], tuple[dict[str, int], int]], count: int = 10
) -> list[Keyword]:
    """The heaviest words of a paper.

    Args:
        title: counts three times.
        abstract: counts once.
        frequencies: gives the number of papers that each word is in, and the number of papers.
        count: how many words.

    Returns:
        At most ``count`` keywords, heaviest first, equals in alphabetical order. Words that only this paper has are
        left out where enough others remain.
    """
    in_title, in_abstract = Counter(_candidates(title)), Counter(_candidates(abstract))
    terms = sorted(in_title.keys() | in_abstract.keys())
    found, total = frequencies(terms)
    weighed = [
        Keyword(term, (3 * in_title[term] + in_abstract[term]) * (math.log((1 + total) / (1 + found.get(term, 0))) + 1))
        for term in terms
    ]
    weighed.sort(key=lambda keyword: (-keyword.weight, keyword.term))
    shared = [keyword for keyword in weighed if found.get(keyword.term, 0) > 1]
    return (shared if len(shared) >= count else weighed)[:count]


def _candidates(text: str) -> list[str]:
    stop = stop_words()
    return [
        word for word in words(_FORMULA.sub(" ", text)) if len(word) >= 2 and word not in stop and not word.isdigit()
    ]
