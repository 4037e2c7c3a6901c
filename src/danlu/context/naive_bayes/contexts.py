"""Many contexts, one answer: naive-Bayes context extension for any causal language model.

Each context is read in a row of its own, with the same question; the rows' predictions are combined token by token and
the token is appended to all of them. Nothing is trained, the architecture is not touched, cost and memory are linear in
the number of contexts, and their sum may exceed what the model can read by any factor. A single context must fit.

The contexts are treated as unordered and independent given the next token: put ``Chapter 1`` into a context if its
place matters, and do not expect one token to need two contexts.

Special cases: one context with ``top_p=1`` is classifier-free guidance with ``guidance_scale = 1 + beta``, which is
context-aware decoding; one context with ``beta=0`` and ``top_p=1`` is plain generation; ``pooling="mean"`` with
``beta = n - 1`` and ``top_p=1`` is naive Bayes as in the textbook.

Source: Scientific Spaces archive 9617, 9632, 9648; arXiv:2305.14739.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from danlu.context.documents import split_text
from danlu.context.extend import active_methods
from danlu.context.inspect import host_model
from danlu.context.naive_bayes.combine import Pooling, Settings
from danlu.context.naive_bayes.decode import merge_options
from danlu.context.naive_bayes.prepared import NEW_TOKENS, PreparedContexts
from danlu.context.naive_bayes.prompt import TextLike, make_layout
from danlu.context.naive_bayes.result import NaiveBayesResult, Source
from danlu.context.naive_bayes.rows import Host, read_rows
from danlu.context.naive_bayes.select import Selection
from danlu.context.trial import evaluating, in_range

_OWN = ("seed", "generator", "streamer", "on_token")  # options of an answer that are not the host's


class NaiveBayesContexts:
    """Answers from contexts that together exceed what the model can read.

    Args:
        model: a Hugging Face causal language model with a key/value cache; ``danlu.extend`` and PEFT may be on it.
        tokenizer: the model's; None where contexts and questions are given as token ids.
        beta: weight against the prompt without context, >= -1.
        eta: nats by which another context must be surer to take over, >= 0.
        top_p: nucleus that each row is cut to before combination, in (0, 1]. Another thing than ``top_p`` of
            ``generate``, which cuts the combined distribution.
        pooling: ``min_entropy``, ``mean``, ``max``, or a function; see ``danlu.context.naive_bayes.combine``.
        template: text with ``{context}`` and behind it ``{question}``. Default: the tokenizer's chat template, or
            ``User: {context}, {question}, Assistant:`` on lines of their own.
        prefix: instructions in front of every row, read once.
        selection: which contexts may speak; default all.
        max_length: tokens that a row may have, the answer included. Default: ``max_position_embeddings``, or no limit
            when ``danlu.extend`` is on the model.
        batch_tokens: tokens of a micro-batch when contexts are read, >= 1. Changes speed and memory, not the result.
        max_padding: padding that rows advanced together may hold, as a share of their tokens, >= 0. As above.

    Raises:
        ValueError: a value out of range.
        TypeError: a model without a cache, an encoder-decoder, or an argument of another kind.

    Source: Scientific Spaces archive 9617, 9632; arXiv:2305.14739.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        beta: float = 0.25,
        eta: float = 0.1,
        top_p: float = 0.95,
        pooling: Pooling = "min_entropy",
        template: str | None = None,
        prefix: TextLike = "",
        selection: Selection | None = None,
        max_length: int | None = None,
        batch_tokens: int = 8192,
        max_padding: float = 0.25,
    ):
        self.settings = Settings(beta, eta, top_p, pooling)
        if not max_padding >= 0:
            raise ValueError(f"max_padding must be >= 0, got {max_padding}")
        in_range("batch_tokens", batch_tokens, 1)
        self.host = Host(model)
        self.layout = make_layout(tokenizer, template, prefix)
        self.selection = selection
        self.batch_tokens = batch_tokens
        self.max_padding = max_padding
        if max_length is not None:
            in_range("max_length", max_length, 1)
        elif not active_methods(model):
            max_length = getattr(host_model(model).config.get_text_config(), "max_position_embeddings", None)
        self.max_length = max_length

    def prepare(
        self, contexts: Sequence[TextLike], *, split: bool = False, room: int | None = None
    ) -> PreparedContexts:
        """Read contexts once, to ask several questions about them.

        Args:
            contexts: at least one; each text, or token ids. Equal ones are read once.
            split: cut a context that is too long at paragraph borders (ids: anywhere) into several.
            room: tokens kept free for question and answer; default a quarter of the limit when splitting, else 1.

        Returns:
            What ``answer`` can be called on.

        Raises:
            ValueError: no contexts, an empty one, no room, or one that is too long and not to be split.
        """
        if isinstance(contexts, str):
            raise TypeError("contexts must be a sequence of texts, got a single text: pass [text]")
        if not len(contexts):
            raise ValueError("contexts must hold at least one context, got none")
        limit = self.max_length
        if room is None:
            room = 1 if limit is None or not split else max(1, limit // 4)
        in_range("room", room, 1)
        free = None if limit is None else limit - len(self.layout.head) - room
        if free is not None and free < 1:
            raise ValueError(
                f"{len(self.layout.head)} tokens in front and {room} kept for question and answer leave no context any "
                f"of the {limit} that the model takes: shorten the prefix, the question or max_new_tokens"
            )
        rows: list[list[int]] = []
        sources: list[Source] = []
        for number, context in enumerate(contexts):
            name = f"contexts[{number}]"
            ids = self.layout.encode(context, name)
            if free is None or len(ids) <= free:
                rows.append(ids)
                sources.append(Source(number, 0, len(context) if isinstance(context, str) else len(ids)))
            elif split:
                for start, end, part in self._parts(context, ids, free):
                    rows.append(part)
                    sources.append(Source(number, start, end))
            else:
                raise ValueError(
                    f"{name} has {len(ids)} tokens; with {len(self.layout.head)} in front and {room} kept for question "
                    f"and answer that is {len(ids) - free} more than the {limit} that the model takes: pass split=True "
                    "to cut it into several, or let danlu.extend make the model read further"
                )
        unique = {tuple(row): None for row in rows}
        order = {row: i for i, row in enumerate(unique, 1)}
        with evaluating(self.host.model):
            read = read_rows(
                self.host,
                self.layout.head,
                [list(row) for row in unique],
                batch_tokens=self.batch_tokens,
                max_padding=self.max_padding,
            )
        return PreparedContexts(self, read, [order[tuple(row)] for row in rows], rows, tuple(sources))

    def generate(
        self,
        contexts: Sequence[TextLike],
        question: TextLike,
        *,
        split: bool = False,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> NaiveBayesResult:
        """Read contexts and answer one question.

        Args:
            contexts: as for ``prepare``.
            question: as for ``PreparedContexts.answer``.
            split: as for ``prepare``; leaves room for question and answer.
            max_new_tokens: as for ``answer``.
            **options: as for ``answer``.

        Returns:
            The answer and where each token came from.

        Raises:
            ValueError: as for both.
        """
        given = {name: value for name, value in options.items() if name not in _OWN}
        merge_options(self.host.model, given)  # refuses before the contexts are read
        prepared = self.prepare(contexts, split=split, room=self.room_for(question, max_new_tokens, split=split))
        return prepared.answer(question, max_new_tokens=max_new_tokens, release=True, **options)

    def room_for(self, question: TextLike, max_new_tokens: int | None = None, *, split: bool = True) -> int:
        """Tokens to keep free behind each context for a question and its answer: ``room`` of ``prepare``.

        Args:
            question: text or token ids.
            max_new_tokens: of the answer; None is 256, or a quarter of the limit if that is less.
            split: without it, an answer of one token is room enough where ``max_new_tokens`` is None.
        """
        if max_new_tokens is not None:
            in_range("max_new_tokens", max_new_tokens, 1)
        elif not split:
            max_new_tokens = 1
        elif self.max_length is None:
            max_new_tokens = NEW_TOKENS
        else:
            max_new_tokens = max(1, min(NEW_TOKENS, self.max_length // 4))
        return len(self.layout.question(question)) + max_new_tokens

    def _parts(self, context: TextLike, ids: list[int], free: int) -> list[tuple[int, int, list[int]]]:
        if not isinstance(context, str):
            return [
                (start, min(start + free, len(ids)), ids[start : start + free]) for start in range(0, len(ids), free)
            ]
        spans = split_text(context, free, lambda text: len(self.layout.encode(text, "context")))
        return [(start, end, self.layout.encode(context[start:end], "context")) for start, end in spans]
