"""Naive-Bayes context extension as a logits processor, for the host's plain ``generate`` on rows of your own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from danlu.context.naive_bayes.combine import Pooling, Settings, combine
from danlu.context.trial import in_range


class NaiveBayesLogitsProcessor(LogitsProcessor):
    """Gives all rows of a group the scores of their combination, so that they draw the same token.

    A group is the rows of one request: first the prompt without context, then the same prompt with each context, padded
    on the left. Greedy decoding needs nothing else. Rows that sample would draw different tokens from the same scores;
    with ``sample=True`` the processor therefore draws itself, from scores under its own temperature, top-k and top-p,
    and returns 0 for that token and ``-inf`` for others, which the host's own sampling cannot change. Penalties of the
    host come before it, on single rows.

    ``NaiveBayesContexts`` does more: rows of different length, shared prefixes, streaming, a trace.

    Args:
        group_sizes: rows of each request, the one without context included: at least 2 each, the batch in sum.
        beta: as for ``NaiveBayesContexts``.
        eta: likewise.
        top_p: of each row, likewise.
        pooling: likewise.
        sample: draw here; pass ``do_sample=True`` to ``generate`` or not, the token is the same.
        temperature: of the draw, > 0.
        top_k: of the draw, 0 is off.
        sampling_top_p: of the draw, in (0, 1].
        seed: of the draws of each call.
        generator: instead of ``seed``, on the device of the scores; goes on from call to call.

    Raises:
        ValueError: a value out of range; in a call, a batch of another size (beams, several returned sequences).

    Source: Scientific Spaces archive 9617.
    """

    def __init__(
        self,
        group_sizes: Sequence[int],
        beta: float = 0.25,
        eta: float = 0.1,
        top_p: float = 0.95,
        pooling: Pooling = "min_entropy",
        *,
        sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        sampling_top_p: float = 1.0,
        seed: int = 0,
        generator: torch.Generator | None = None,
    ):
        if not len(group_sizes):
            raise ValueError("group_sizes must name at least one group, got none")
        for size in group_sizes:
            in_range("every entry of group_sizes", size, 2)
        in_range("top_k", top_k, 0)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {temperature} (greedy decoding is sample=False)")
        if not 0 < sampling_top_p <= 1:
            raise ValueError(f"sampling_top_p must be in (0, 1], got {sampling_top_p}")
        self.group_sizes = list(group_sizes)
        self.settings = Settings(beta, eta, top_p, pooling)
        self.sample = sample
        self.seed = seed
        self.generator = generator
        self._warpers: list[LogitsProcessor] = []
        if temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            self._warpers.append(TopKLogitsWarper(top_k))
        if sampling_top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling_top_p))
        self._draws: torch.Generator | None = None
        self._seen: Tensor | None = None
        self._previous: list[int | None] = []
        #: For each step of the current call, the context chosen in each group, from 0; None where none is chosen.
        self.chosen: list[tuple[int | None, ...]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Combined scores in every row.

        Args:
            input_ids: (batch, length), as the host passes them; a batch that does not go on from the last one starts
                a new call and forgets which contexts were chosen.
            scores: (batch, vocabulary).
        """
        if scores.shape[0] != sum(self.group_sizes):
            raise ValueError(
                f"the batch has {scores.shape[0]} rows, but group_sizes {self.group_sizes} make "
                f"{sum(self.group_sizes)}: pass one prompt per row, no beams, no num_return_sequences and no assistant"
            )
        if self._seen is None or not torch.equal(self._seen, input_ids[:, :-1]):
            self._previous = [None] * len(self.group_sizes)
            self.chosen = []
            if self.sample:
                self._draws = self.generator or torch.Generator(scores.device).manual_seed(self.seed)
        self._seen = input_ids.clone()
        steps = [
            combine(rows, self.settings, previous)
            for rows, previous in zip(scores.split(self.group_sizes), self._previous, strict=True)
        ]
        self._previous = [step.context for step in steps]
        self.chosen.append(tuple(self._previous))
        combined = torch.stack([step.scores for step in steps])
        if self.sample:
            first = [0, *torch.tensor(self.group_sizes).cumsum(0)[:-1].tolist()]
            for warper in self._warpers:
                combined = warper(input_ids[first], combined)
            drawn = torch.multinomial(combined.softmax(-1), 1, generator=self._draws)
            combined = torch.full_like(combined, -math.inf).scatter(-1, drawn, 0.0)
        repeats = torch.tensor(self.group_sizes, device=scores.device)
        return combined.repeat_interleave(repeats, dim=0).to(scores.dtype)
