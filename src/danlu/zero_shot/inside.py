"""Questions inside a text: what a mention means (two-stage prompts), and what fills a blank (soft positions)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from danlu.zero_shot.nsp import NSPClassifier, rank_rows
from danlu.zero_shot.scorer import Ids, Row
from danlu.zero_shot.templates import Position, find_template

__all__ = ["fill_blank", "two_stage"]


def two_stage(
    classifier: NSPClassifier,
    texts: Sequence[str],
    mentions: Sequence[str],
    candidates: Sequence[Sequence[str]],
    first_stage: str = "{text}上文中{mention}是指",
    second_stage: str = "这个词是指{}",
) -> list[dict[str, Any]]:
    """What does a word mean here? For word senses, coreference, entity linking and typing.

    The first stage asks behind the text, the second answers in the other sentence; the text comes first.

    Args:
        classifier: scores the pairs.
        texts: the texts; only they are cut where a pair is too long.
        mentions: words of each text.
        candidates: for each text at least two descriptions, types or antecedents, of any length.
        first_stage: the first sentence, with ``{text}`` once, and ``{mention}``. It is read in parts, so an English
            one needs a space behind ``{text}``.
        second_stage: the second sentence, with ``{}`` where the candidate goes.

    Returns:
        One dictionary per text: ``sequence``, ``labels`` (the candidates) from best to worst, ``scores``.

    Raises:
        ValueError: lists of different lengths, a mention that is not in its text, stages without their places.

    Source: Scientific Spaces archive 8671; arXiv:2109.03564
    """
    if len(mentions) != len(texts):
        raise ValueError(f"mentions must be one for each text, got {len(mentions)} for {len(texts)} texts")
    if first_stage.count("{text}") != 1 or "{mention}" not in first_stage:
        raise ValueError(f"first_stage must hold {{text}} once, and {{mention}}, got {first_stage!r}")
    around: list[list[Ids]] = []
    for text, mention in zip(texts, mentions, strict=True):
        if not mention or mention not in text:
            raise ValueError(f"mentions must be words of their texts, got {mention!r} for {text!r}")
        around.append(_encode_parts(classifier, first_stage.replace("{mention}", mention).split("{text}")))

    def row(i: int, ids: Ids, candidate: Ids) -> Row:
        before, after = around[i]
        space = classifier.scorer.space_beside(len(before) + len(after) + len(candidate))
        return Row([*before, *ids[:space], *after], candidate)

    return rank_rows(classifier, texts, candidates, row, second_stage)


def fill_blank(
    classifier: NSPClassifier,
    texts: Sequence[str],
    candidates: Sequence[Sequence[str]],
    blank: str = "[BLANK]",
    position: Position = "prefix",
) -> list[dict[str, Any]]:
    """Choose what fills a blank, by soft positions: the candidate gets the position ids of the blank.

    The blank itself is taken out of the text, and what stands behind it moves by the length of the candidate. The
    order of the tokens stays that of a pair.

    Args:
        classifier: scores the pairs; its model must have absolute positions.
        texts: texts with the blank once. Of one that is too long, what is farthest from the blank is cut, where the
            published code cuts the end.
        candidates: for each text at least two fillings.
        blank: how the blank is written.
        position: side of the candidate among the tokens.

    Returns:
        One dictionary per text: ``sequence``, ``labels`` (the candidates) from best to worst, ``scores``.

    Raises:
        ValueError: a text without exactly one blank, or without words around it.

    Source: Scientific Spaces archive 8671; arXiv:2109.03564
    """
    find_template("{}", position)
    halves: list[list[Ids]] = []
    for i, text in enumerate(texts):
        if text.count(blank) != 1 or not text.replace(blank, "").strip():
            raise ValueError(f"text {i} must be words around one {blank}, got {text!r}")
        halves.append(_encode_parts(classifier, text.split(blank)))

    def row(i: int, ids: Ids, candidate: Ids) -> Row:
        left, right = halves[i]
        space = classifier.scorer.space_beside(len(candidate))
        before = min(len(left), max(space - len(right), space // 2))
        return soft_row(left[len(left) - before :], right[: space - before], candidate, position)

    return rank_rows(classifier, texts, candidates, row)


def soft_row(left: Ids, right: Ids, candidate: Ids, position: Position) -> Row:
    """Tokens in the usual order, the candidate's positions between those of the halves.

    Args:
        left: tokens before the blank.
        right: tokens behind it.
        candidate: tokens of the filling.
        position: side of the candidate among the tokens.

    Returns:
        The row with the positions of all its tokens, special ones included.
    """
    start = 2 if position == "prefix" else 1  # with a prefix, [CLS] and the first [SEP] come before the text
    blank = start + len(left)
    behind = blank + len(candidate)
    end = behind + len(right)
    own, text = range(blank, behind), [*range(start, blank), *range(behind, end)]
    if position == "prefix":
        return Row(candidate, [*left, *right], [0, *own, 1, *text, end])
    return Row([*left, *right], candidate, [0, *text, end, *own, end + 1])


def _encode_parts(classifier: NSPClassifier, parts: Sequence[str]) -> list[Ids]:
    return [classifier.scorer.encode([part])[0] if part.strip() else [] for part in parts]
