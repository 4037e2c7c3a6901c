"""Answers that quote the paper: no model, no network, the same every time.

A sentence is worth ``role + 0.6 BM25 + 0.4 cues + 0.3 centrality - 0.5 overlap``: how well its section fits the
question, how well its words fit the question and the paper, how many cue words of the question it has, how central it
is, and how much of it has been said already.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from danlu.papers.answer import pdf, questions
from danlu.papers.answer.keys import digest
from danlu.papers.answer.sentences import Sentence, sentences
from danlu.papers.answer.types import History, NoText, PaperText, Piece, Question, Quote
from danlu.papers.tokens import fold, stop_words, words

VERSION = 1
#: Quotes of one answer: at most so many sentences and words.
SENTENCES, WORDS = 6, 120
_LEAST = 3
_BM25_K1, _BM25_B = 1.2, 0.75
#: What Markdown would take for its own, outside formulas: a quote is shown as it stands in the paper.
_FORMULA = re.compile(r"(\$[^$\n]+\$)")
_MARKUP = re.compile(r"[`*~|]|(?<![^\W_])_|_(?![^\W_])|^#|^[-+>](?=\s)|(?<=^[0-9])[.)](?=\s)|(?<=^[0-9]{2})[.)](?=\s)")
#: These by their number: behind a backslash they would begin a formula, or still be a link.
_NUMBERED = str.maketrans({character: f"&#{ord(character)};" for character in "\\[&<"})


@dataclass(frozen=True)
class _Guide:
    """What fits a question: how well each role does, cue words, and words that stand for the question itself."""

    roles: dict[str, float]
    cues: tuple[str, ...]
    terms: str


_GUIDES = {
    1: _Guide(
        {"abstract": 1.0, "introduction": 0.9},
        (
            *("however", "problem", "challenge", "lack", "limitation of", "difficult", "fail", "suffer", "remains"),
            *("unfortunately", "goal", "aim", "问题", "然而", "挑战"),
        ),
        "problem challenge goal difficulty task address issue",
    ),
    2: _Guide(
        {"related": 1.0, "introduction": 0.4},
        (
            *("et al", "[", "previous", "prior", "existing", "earlier", "recent work", "proposed by", "studies"),
            *("已有", "相关"),
        ),
        "related prior previous existing work studies methods literature",
    ),
    3: _Guide(
        {"method": 1.0, "abstract": 0.6, "introduction": 0.5},
        (
            *("we propose", "we introduce", "we present", "our method", "our approach", "our model", "we develop"),
            *("is computed", "consists of", "提出", "我们的方法"),
        ),
        "propose introduce method approach model algorithm design",
    ),
    4: _Guide(
        {"experiments": 1.0, "abstract": 0.4, "discussion": 0.4},
        (
            *("table", "outperform", "dataset", "data set", "benchmark", "accuracy", "%", "baseline", "improve"),
            *("results show", "achieves", "evaluate", "实验", "结果"),
        ),
        "experiments results datasets baselines accuracy evaluation improvement",
    ),
    5: _Guide(
        {"limitations": 1.0, "conclusion": 0.8, "discussion": 0.7},
        (
            *("limitation", "future", "leave", "extend", "further", "open question", "could be"),
            *("would be interesting", "未来", "局限"),
        ),
        "future limitation extend further work open direction",
    ),
    6: _Guide(
        {"abstract": 1.0, "conclusion": 0.9},
        ("in this paper", "in this work", "we show", "we propose", "in summary", "overall", "we conclude", "本文"),
        "paper propose show result contribution summary",
    ),
}
#: Roles that a question falls back to where a paper has none of its own.
_ANY = 0.2


_NOTHING = {
    "en": "*No sentence of the paper is left that fits this question.*\n",
    "zh": "*论文中没有其他适合这个问题的句子。*\n",
}


class ExtractiveEngine:
    """Quotes three to six sentences for each question."""

    name = "extractive"
    label = "extracts from the paper"

    def key(self) -> str:
        """A hash of everything that changes its answers."""
        return digest(self.name, VERSION, questions.VERSION, pdf.VERSION)

    async def answer(self, paper: PaperText, question: Question, history: History) -> AsyncIterator[Piece]:
        """Quote the sentences that fit best; the summary does not repeat what was quoted for the problem."""
        used = {
            text for asked, answer in history for text in _quoted(answer) if (asked.number, question.number) == (1, 6)
        }
        chosen = select(paper, question, used)
        if not chosen and not _quotable(paper):
            raise NoText("the paper has no sentence to quote")
        if not chosen:
            yield Piece(_NOTHING[question.lang])
        for sentence in chosen:
            yield _piece(paper, sentence)

    async def close(self) -> None:
        """Nothing is held."""


def select(paper: PaperText, question: Question, used: Iterable[str] = ()) -> list[Sentence]:
    """The sentences that answer a question, in the order of the paper.

    Args:
        paper: to quote from.
        question: of the six.
        used: sentences that are not to be quoted again, as `spoken` gives them.

    Returns:
        Three to six sentences of at most 120 words together; fewer where the paper has no more.
    """
    said = set(used)
    pool = [each for each in _quotable(paper) if spoken(paper.text[each.start : each.end]) not in said]
    if not pool:
        return []
    worth = _worth(paper, pool, question)
    return sorted(_spread(pool, worth), key=lambda sentence: sentence.start)


def spoken(text: str) -> str:
    """A sentence on one line, as answers show it: in Markdown that means nothing but itself."""
    parts = _FORMULA.split(" ".join(text.split()))
    return "".join(
        part if place % 2 else _MARKUP.sub(r"\\\g<0>", part.translate(_NUMBERED)) for place, part in enumerate(parts)
    )


def relevance(texts: Sequence[str], question: Question) -> list[float]:
    """How well the words of each text fit a question, in 0..1.

    Args:
        texts: at least one.
        question: of the six.
    """
    pool = [tuple(words(text)) for text in texts]
    return bm25(pool, [*words(_GUIDES[question.number].terms), *_telling(question.text)])


@lru_cache(maxsize=2)
def _quotable(paper: PaperText) -> tuple[Sentence, ...]:
    """Sentences that fit into an answer; kept for the other questions about the same paper."""
    return tuple(sentence for sentence in sentences(paper) if len(sentence.words) <= WORDS)


def _telling(text: str) -> list[str]:
    return [word for word in words(text) if word not in stop_words()]


def _worth(paper: PaperText, pool: Sequence[Sentence], question: Question) -> list[float]:
    guide = _GUIDES[question.number]
    central = _centrality(pool)
    terms = [*words(guide.terms), *_telling(paper.title), *_telling(question.text)]
    matched = bm25([sentence.words for sentence in pool], terms)
    found = []
    for sentence, score, centre in zip(pool, matched, central, strict=True):
        prior = guide.roles.get(sentence.section.role, _ANY if sentence.section.role != "appendix" else 0.0)
        text = fold(paper.text[sentence.start : sentence.end])
        cues = sum(cue in text for cue in guide.cues)
        found.append(prior + 0.6 * score + 0.4 * min(cues, 2) / 2 + 0.3 * centre)
    return found


def _spread(pool: Sequence[Sentence], worth: Sequence[float]) -> list[Sentence]:
    """The best sentences one after the other, each less worth the more of it has been said."""
    bags = [frozenset(sentence.words) - stop_words() for sentence in pool]
    left = set(range(len(pool)))
    chosen: list[int] = []
    total = 0
    while len(chosen) < SENTENCES:
        left = {index for index in left if total + len(pool[index].words) <= WORDS}
        if not left:
            break

        def value(index: int) -> float:
            own = bags[index]
            overlap = max((len(own & bags[other]) / max(1, len(own)) for other in chosen), default=0.0)
            return worth[index] - 0.5 * overlap

        best = max(left, key=lambda index: (value(index), -index))
        if len(chosen) >= _LEAST and value(best) < 0.6 * worth[chosen[0]]:
            break
        left.remove(best)
        chosen.append(best)
        total += len(pool[best].words)
    return [pool[index] for index in chosen]


def bm25(pool: Sequence[Sequence[str]], terms: Iterable[str]) -> list[float]:
    """BM25 of each text for the terms, scaled to 0..1.

    Args:
        pool: the words of each text; at least one text.
        terms: to look for.
    """
    wanted = set(terms)
    counts = [Counter(word for word in own if word in wanted) for own in pool]
    frequency = Counter(term for count in counts for term in count)
    mean = max(1.0, sum(len(own) for own in pool) / len(pool))
    scores = []
    for own, count in zip(pool, counts, strict=True):
        norm = _BM25_K1 * (1 - _BM25_B + _BM25_B * len(own) / mean)
        scores.append(
            sum(
                math.log(1 + (len(pool) - frequency[term] + 0.5) / (frequency[term] + 0.5))
                * n
                * (_BM25_K1 + 1)
                / (n + norm)
                for term, n in count.items()
            )
        )
    top = max(scores, default=0.0)
    return [score / top if top else 0.0 for score in scores]


def _centrality(pool: Sequence[Sentence]) -> list[float]:
    """How near each sentence is to the words of the whole paper, scaled to 0..1."""
    stop = stop_words()
    bags = [Counter(word for word in sentence.words if word not in stop) for sentence in pool]
    frequency = Counter(term for bag in bags for term in bag)
    weight = {term: math.log(1 + len(pool) / count) for term, count in frequency.items()}
    whole: Counter[str] = Counter()
    for bag in bags:
        whole.update(bag)
    scores = []
    for bag in bags:
        length = math.sqrt(sum((n * weight[term]) ** 2 for term, n in bag.items()))
        scores.append(sum(n * whole[term] * weight[term] ** 2 for term, n in bag.items()) / length if length else 0.0)
    top = max(scores, default=0.0)
    return [score / top if top else 0.0 for score in scores]


def _piece(paper: PaperText, sentence: Sentence) -> Piece:
    page = paper.page_of(sentence.start)
    where = sentence.section.title + (f", p. {page}" if page else "")
    quote = Quote(sentence.start, sentence.end, sentence.section.title, page)
    return Piece(f"> {spoken(paper.text[sentence.start : sentence.end])}\n> — *{where}*\n\n", (quote,))


def _quoted(answer: str) -> list[str]:
    """The sentences that an earlier answer of this engine quotes."""
    lines = answer.splitlines()
    return [line[2:] for line in lines if line.startswith("> ") and not line.startswith("> — *")]
