"""Unigram segmentation by listing every segmentation: the definition, for short texts. Shares no code with danlu."""

from __future__ import annotations

import math
import re


def chunks(data: bytes) -> list[bytes]:
    """Lines with the line feeds after them."""
    return re.findall(rb"[^\n]*\n+|[^\n]+", data)


def segmentations(data: bytes, scores: dict[bytes, float]) -> list[tuple[bytes, ...]]:
    """Every way to write a chunk as pieces."""
    if not data:
        return [()]
    return [
        (data[:end], *rest)
        for end in range(1, len(data) + 1)
        if data[:end] in scores
        for rest in segmentations(data[end:], scores)
    ]


def score(pieces: tuple[bytes, ...], scores: dict[bytes, float]) -> float:
    """Sum of scores from left to right, as a decoder adds them."""
    total = 0.0
    for piece in pieces:
        total += scores[piece]
    return total


def best(data: bytes, scores: dict[bytes, float]) -> tuple[bytes, ...]:
    """The best segmentation by a table over prefixes; of equal ones the longest last piece, at every prefix."""
    table: list[tuple[float, tuple[bytes, ...]]] = [(0.0, ())]
    for end in range(1, len(data) + 1):
        found: tuple[float, tuple[bytes, ...]] | None = None
        for start in range(end):  # longest last piece first
            if data[start:end] in scores:
                value = table[start][0] + scores[data[start:end]]
                if found is None or value > found[0]:
                    found = value, (*table[start][1], data[start:end])
        assert found is not None
        table.append(found)
    return table[-1][1]


def law(data: bytes, scores: dict[bytes, float], alpha: float) -> dict[tuple[bytes, ...], float]:
    """Probability of every segmentation of a chunk, and nothing else."""
    paths = segmentations(data, scores)
    weights = [math.exp(alpha * score(path, scores)) for path in paths]
    total = math.fsum(weights)
    return {path: weight / total for path, weight in zip(paths, weights, strict=True)}


def log_partition(data: bytes, scores: dict[bytes, float], alpha: float) -> float:
    """Log of the total weight of all segmentations of a chunk."""
    values = [alpha * score(path, scores) for path in segmentations(data, scores)]
    top = max(values)
    return top + math.log(math.fsum(math.exp(value - top) for value in values))
