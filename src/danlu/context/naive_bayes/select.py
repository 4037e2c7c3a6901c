"""Leaving out contexts before they are combined.

With least entropy the surest row speaks, and a row that is sure that it *cannot* answer is very sure: strong instructed
models then refuse although one context has the answer. A row whose own answer begins with a refusal is therefore left
out, and rows can be ranked by how much better the question fits behind their context, or by their first entropy.

Source: the limit is stated by the author of archive 9617 for large instructed models; the routing is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from danlu.context.naive_bayes.combine import Settings, combine
from danlu.context.naive_bayes.prompt import Layout, TextLike
from danlu.context.naive_bayes.result import Dropped
from danlu.context.naive_bayes.rows import Rows
from danlu.context.trial import in_range


@dataclass(frozen=True)
class Selection:
    """Which contexts may speak.

    Attributes:
        refusals: beginnings of answers that say nothing, as the model writes them, such as ``" I cannot"``; text or
            token ids. A context is dropped when its own greedy answer begins so.
        keep: how many contexts stay at most; None is all.
        by: what ranks them for ``keep``: ``likelihood``, the mean log probability per token of the question behind
            the context above that without it; or ``entropy`` of the first answer token, the least first.
        max_entropy: nats above which the first answer token's entropy drops a context; None is no limit.

    Raises:
        ValueError: a value out of range, or a refusal that is empty.
    """

    refusals: Sequence[TextLike] = ()
    keep: int | None = None
    by: str = "likelihood"
    max_entropy: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.refusals, str):
            raise TypeError(f"refusals must be a sequence of texts, got the single text {self.refusals!r}")
        if self.keep is not None:
            in_range("keep", self.keep, 1)
        if self.by not in ("likelihood", "entropy"):
            raise ValueError(f"by must be likelihood or entropy, got {self.by!r}")
        if self.max_entropy is not None and not self.max_entropy > 0:
            raise ValueError(f"max_entropy must be above 0 nats, got {self.max_entropy}")

    @property
    def scores_question(self) -> bool:
        """Whether the question's own probability is needed."""
        return self.keep is not None and self.by == "likelihood"


@dataclass(frozen=True)
class Decision:
    """Rows that stay, in order, why the others do not, and whether all refused."""

    kept: list[int]
    dropped: list[tuple[int, str]]
    refused: bool


def decide(
    selection: Selection, rows: Rows, logits: Tensor, likelihoods: Tensor | None, settings: Settings, layout: Layout
) -> Decision:
    """Choose among rows 1..n, which have just read the question.

    Args:
        selection: the rules, applied in the order refusals, max_entropy, keep; each leaves at least one row.
        rows: the rows; not changed.
        logits: (1 + n, vocabulary), for the first answer token.
        likelihoods: (1 + n,), of the question's tokens; needed for ``keep`` by likelihood.
        settings: the cut that entropies are measured under.
        layout: encodes refusals.

    Returns:
        Numbers of the rows that stay, and a reason for each other.
    """
    kept = list(range(1, logits.shape[0]))
    dropped: list[tuple[int, str]] = []
    refused = _refusing(selection, rows, logits, layout)
    all_refused = len(refused) == len(kept)
    if not all_refused:
        dropped += [(row, f"its answer begins with {words!r}") for row, words in refused.items()]
        kept = [row for row in kept if row not in refused]
    entropies = dict(enumerate(combine(logits, settings).entropies.tolist(), 1))
    limit = selection.max_entropy
    if limit is not None:
        unsure = [row for row in kept if entropies[row] > limit]
        if len(unsure) == len(kept):
            unsure.remove(min(kept, key=lambda row: (entropies[row], row)))
        dropped += [(row, f"entropy of the first token {entropies[row]:.2f} nats, above {limit:g}") for row in unsure]
        kept = [row for row in kept if row not in unsure]
    if selection.keep is not None and len(kept) > selection.keep:
        if selection.by == "likelihood":
            if likelihoods is None:
                raise ValueError("likelihoods must be given to keep rows by likelihood, got None")
            gains = (likelihoods[1:] - likelihoods[0]).tolist()
            ranked = sorted(kept, key=lambda row: (-gains[row - 1], row))
            what = {row: f"question gains {gains[row - 1]:+.2f} nats per token" for row in kept}
        else:
            ranked = sorted(kept, key=lambda row: (entropies[row], row))
            what = {row: f"entropy of the first token {entropies[row]:.2f} nats" for row in kept}
        for place, row in enumerate(ranked[selection.keep :], selection.keep + 1):
            dropped.append((row, f"rank {place} of {len(ranked)}: {what[row]}"))
        kept = sorted(ranked[: selection.keep])
    return Decision(kept, sorted(dropped), all_refused)


def _refusing(selection: Selection, rows: Rows, logits: Tensor, layout: Layout) -> dict[int, TextLike]:
    """Rows whose greedy answer begins with a refusal, and which."""
    found: dict[int, TextLike] = {}
    first = logits.argmax(-1)
    for i, words in enumerate(selection.refusals):
        ids = torch.tensor(layout.encode(words, f"refusals[{i}]"), device=logits.device)
        saying = [row for row in range(1, len(first)) if row not in found and int(first[row]) == int(ids[0])]
        if saying and len(ids) > 1:
            trial = rows.fork()
            trial.select(saying)
            for token, following in zip(ids[:-1], ids[1:], strict=True):
                best = trial.feed(token[None])[0].argmax(-1)
                saying = [row for row, choice in zip(saying, best.tolist(), strict=True) if choice == int(following)]
                if not saying:
                    break
                trial.select(saying)
        found |= dict.fromkeys(saying, words)
    return found


def as_dropped(decision: Decision, sources: Sequence[Sequence[int]]) -> tuple[Dropped, ...]:
    """The decision in terms of sources; equal contexts share a row.

    Args:
        decision: by rows.
        sources: for each row from 1 on, the sources that are that row.
    """
    return tuple(
        sorted((Dropped(one, why) for row, why in decision.dropped for one in sources[row - 1]), key=lambda d: d.source)
    )
