"""Contexts that were read once: the caches of all rows up to the question, and answers from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from danlu.context.naive_bayes.decode import Decoding, merge_options, run
from danlu.context.naive_bayes.prompt import TextLike
from danlu.context.naive_bayes.result import Dropped, NaiveBayesResult, Source, TokenTrace
from danlu.context.naive_bayes.rows import Rows
from danlu.context.naive_bayes.select import Decision, as_dropped, decide
from danlu.context.trial import evaluating, in_range

if TYPE_CHECKING:
    from danlu.context.naive_bayes.contexts import NaiveBayesContexts

#: Tokens of an answer at most, where neither the caller nor the model's configuration says.
NEW_TOKENS = 256


@dataclass
class PreparedContexts:
    """Contexts that were read, for any number of questions; made by ``NaiveBayesContexts.prepare``.

    Attributes:
        owner: how to combine.
        rows: caches up to the question; not changed by answers.
        index: for each source, its row.
        contexts: token ids of each source.
        sources: what each source is a part of.
    """

    owner: NaiveBayesContexts
    rows: Rows
    index: list[int]
    contexts: list[list[int]]
    sources: tuple[Source, ...]

    def answer(
        self,
        question: TextLike,
        *,
        max_new_tokens: int | None = None,
        seed: int = 0,
        generator: torch.Generator | None = None,
        streamer: Any = None,
        on_token: Callable[[TokenTrace], None] | None = None,
        release: bool = False,
        **options: Any,
    ) -> NaiveBayesResult:
        """Answer a question from all contexts.

        Args:
            question: text or token ids; stands behind each context.
            max_new_tokens: tokens of the answer at most; default what the configuration says, else 256, as far as the
                longest row leaves room.
            seed: of sampling (``do_sample=True``).
            generator: instead of ``seed``.
            streamer: the host's, such as ``TextStreamer``; gets each token when it is drawn.
            on_token: called with each token's trace.
            release: give up the caches to this last answer, which saves the memory of a copy.
            **options: of the host's ``generate``: ``do_sample``, ``temperature``, ``top_k``, ``top_p``, penalties,
                ``logits_processor``, ``stopping_criteria``, ``stop_strings``, ``generation_config``, ``output_scores``,
                ... Processors see the log probabilities of the combination, and as the prompt all contexts one after
                another.

        Returns:
            The answer and where each token came from.

        Raises:
            ValueError: an empty question, no room for the answer, an option for one prompt only, or contexts that
                were released.
        """
        if not self.rows.groups:
            raise ValueError("these contexts were released to an answer: prepare them again, or leave out release")
        owner, host = self.owner, self.owner.host
        config, rest = merge_options(host.model, options)
        asked = owner.layout.question(question)
        if max_new_tokens is not None:
            in_range("max_new_tokens", max_new_tokens, 1)
        config.max_new_tokens = self._room(len(asked), max_new_tokens or config.max_new_tokens, max_new_tokens is None)
        if generator is None:
            generator = torch.Generator(host.device).manual_seed(seed)
        rows = Rows(host, self.rows.groups) if release else self.rows.fork()
        if release:
            self.rows.groups = []
        with evaluating(host.model):
            choose = owner.selection
            logits, likelihoods = rows.feed(
                torch.tensor(asked, device=host.device), score=choose is not None and choose.scores_question
            )
            kept, decision = list(range(1, len(rows))), None
            if choose is not None:
                decision = decide(choose, rows, logits, likelihoods, owner.settings, owner.layout)
                kept = decision.kept
                rows.select([0, *kept])
                logits = logits[torch.tensor([0, *kept], device=host.device)]
            place = {row: i for i, row in enumerate(kept, 1)}
            speaking = [i for i, row in enumerate(self.index) if row in place]
            decoding = Decoding(
                rows, logits, [place[self.index[i]] for i in speaking], speaking, len(self.sources), owner.settings,
                generator, streamer, on_token,
            )  # fmt: skip
            read = [*owner.layout.head, *(token for context in self.contexts for token in context), *asked]
            found = run(host.model, read, decoding, owner.layout.tokenizer, config, rest)
        tokenizer = owner.layout.tokenizer
        return NaiveBayesResult(
            text=tokenizer.decode(found.tokens, skip_special_tokens=True) if tokenizer is not None else "",
            tokens=tuple(found.tokens),
            trace=tuple(found.trace),
            sources=self.sources,
            dropped=self._dropped(decision),
            refused=decision is not None and decision.refused,
            scores=found.scores,
        )

    def _dropped(self, decision: Decision | None) -> tuple[Dropped, ...]:
        if decision is None:
            return ()
        of_row = [[i for i, one in enumerate(self.index) if one == row] for row in range(1, max(self.index) + 1)]
        return as_dropped(decision, of_row)

    def _room(self, asked: int, wanted: int | None, by_default: bool) -> int:
        """Tokens that the answer may have."""
        limit = self.owner.max_length
        if limit is None:
            return wanted or NEW_TOKENS
        longest = max(range(len(self.contexts)), key=lambda i: len(self.contexts[i]))
        tokens = len(self.contexts[longest])
        prompt = len(self.owner.layout.head) + asked
        needed = 1 if by_default else wanted or 1
        if (over := tokens + prompt + needed - limit) > 0:
            raise ValueError(
                f"contexts[{self.sources[longest].context}] has {tokens} tokens; with {prompt} of prompt and question "
                f"and {needed} for the answer that is {over} more than the {limit} that the model takes: prepare with "
                "split=True and room for both, shorten the question or max_new_tokens, or let danlu.extend make the "
                "model read further"
            )
        return min(wanted or NEW_TOKENS, limit - tokens - prompt)
