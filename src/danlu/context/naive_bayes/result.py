"""What naive-Bayes context extension returns: the answer, and for each of its tokens where it came from."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Source:
    """A row's context: which of the given contexts it is, and which part of it.

    Attributes:
        context: number of the given context, from 0.
        start: where the part begins, in characters of a text or in tokens of ids.
        end: where it ends.
    """

    context: int
    start: int
    end: int


@dataclass(frozen=True)
class TokenTrace:
    """One token of the answer.

    Attributes:
        token: its id.
        source: number of the source it came from: the one chosen by least entropy, else the one that gave it most.
        entropies: in nats, one per source; None for one that was dropped.
        probability: p_k of the token, of the row that it came from.
        prior: p_0 of the token, without any context.
    """

    token: int
    source: int
    entropies: tuple[float | None, ...]
    probability: float
    prior: float

    @property
    def gain(self) -> float:
        """``log p_k - log p_0`` in nats: what the source added; near 0 where the model knew without it."""
        tiny = 1e-38  # float32 underflow of a probability is no infinite gain
        return math.log(max(self.probability, tiny)) - math.log(max(self.prior, tiny))


@dataclass(frozen=True)
class Dropped:
    """A source that took no part, and why."""

    source: int
    reason: str


@dataclass(frozen=True)
class NaiveBayesResult:
    """An answer from several contexts.

    Attributes:
        text: without special tokens; empty where there is no tokenizer.
        tokens: ids of the answer, the end token included where it was generated.
        trace: one entry per token.
        sources: the contexts, or the parts they were split into.
        dropped: sources that a selection left out.
        refused: whether every source would have begun with a refusal; then none was dropped for it.
        scores: (tokens, vocabulary) after the host's processors, where ``output_scores`` asked for it.
    """

    text: str
    tokens: tuple[int, ...]
    trace: tuple[TokenTrace, ...]
    sources: tuple[Source, ...]
    dropped: tuple[Dropped, ...] = ()
    refused: bool = False
    scores: Tensor | None = None

    def runs(self) -> list[tuple[int, int, int]]:
        """The answer as stretches from one source: (source, first token, token behind the last)."""
        found: list[tuple[int, int, int]] = []
        for i, entry in enumerate(self.trace):
            if found and found[-1][0] == entry.source:
                found[-1] = (entry.source, found[-1][1], i + 1)
            else:
                found.append((entry.source, i, i + 1))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything but the scores, as JSON takes it."""
        return {
            "text": self.text,
            "tokens": list(self.tokens),
            "trace": [asdict(entry) for entry in self.trace],
            "sources": [asdict(source) for source in self.sources],
            "dropped": [asdict(entry) for entry in self.dropped],
            "refused": self.refused,
        }
