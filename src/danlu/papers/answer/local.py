"""Answers by a causal language model on this machine whose context is short: every section is a context of its own.

The sections that matter to a question are read side by side by naive-Bayes context extension, each headed by its
title, because contexts have no order among them. A model that is strong, or a context that says "cannot tell", can win
the vote for a token without evidence: so the sections are routed by role first.

Source: Scientific Spaces archive 9617.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator
from typing import Any

from danlu.papers.answer import context, pdf, questions
from danlu.papers.answer.extractive import relevance
from danlu.papers.answer.keys import digest
from danlu.papers.answer.types import EngineRefused, History, PaperText, Piece, Question

logger = logging.getLogger("danlu.papers.answer")

VERSION = 1
#: Tokens of an answer, and of the longest one that a short context leaves room for, as a share of it.
OUTPUT, SHARE = 300, 0.25
#: Contexts read side by side, at most: time and memory grow with them at every token.
CONTEXTS = 16
#: A model that reads less than this is told the short version of its task.
_SHORT = 1024
#: Sections whose own answer begins like this have nothing to say, and are the surest of it.
_REFUSALS = {
    "en": (" I cannot", "I cannot", " The paper does not", "The paper does not", " Sorry", "Sorry"),
    "zh": ("无法", "对不起", "抱歉", "论文没有"),
}
BETA, ETA, TOP_P = 0.25, 0.1, 0.95


class LocalEngine:
    """A causal language model on this machine.

    Args:
        model: folder or hub name, or a loaded model.
        tokenizer: of a loaded model.
        beta: weight against the prompt without the paper.
    """

    name = "local"

    def __init__(self, model: Any, tokenizer: Any = None, beta: float = BETA) -> None:
        self.label = model if isinstance(model, str) else type(model).__name__
        self.beta = beta
        self._model, self._tokenizer = model, tokenizer
        self._readers: dict[str, Any] = {}
        self._lock = threading.Lock()

    def key(self) -> str:
        """A hash of everything that changes its answers."""
        parameters = (VERSION, self.label, self.beta, ETA, TOP_P, OUTPUT, CONTEXTS)
        return digest(self.name, *parameters, questions.VERSION, pdf.VERSION)

    async def close(self) -> None:
        """Give the memory back."""
        self._readers.clear()
        self._model = None

    async def answer(self, paper: PaperText, question: Question, history: History) -> AsyncIterator[Piece]:
        """Read the sections that matter side by side, and write the answer token by token.

        Raises:
            EngineRefused: the model cannot be loaded, or cannot be read this way.
        """
        pieces: queue.Queue[str | BaseException | None] = queue.Queue()
        stop = threading.Event()
        thread = threading.Thread(target=self._run, args=(paper, question, pieces, stop), daemon=True)
        thread.start()
        try:
            while True:
                piece = await asyncio.to_thread(pieces.get)
                if piece is None:
                    return
                if isinstance(piece, BaseException):
                    raise piece
                yield Piece(piece)
        finally:
            stop.set()

    def _run(self, paper: PaperText, question: Question, pieces: queue.Queue[Any], stop: threading.Event) -> None:
        """In a thread of its own, one at a time: the model is busy with one answer."""
        try:
            with self._lock:
                self._generate(paper, question, pieces, stop)
        except Exception as error:
            # Readers see the kind alone: the words may name files of this machine.
            logger.exception("the local model cannot answer")
            pieces.put(EngineRefused(f"the local model cannot answer: {type(error).__name__}"))
        else:
            pieces.put(None)

    def _generate(self, paper: PaperText, question: Question, pieces: queue.Queue[Any], stop: threading.Event) -> None:
        from transformers import StoppingCriteria

        reader = self._load(question.lang)
        tokenizer = reader.layout.tokenizer
        limit = reader.max_length
        new = OUTPUT if limit is None else min(OUTPUT, max(8, int(limit * SHARE)))
        room = reader.room_for(question.text, new)
        prepared = reader.prepare(self.contexts(reader, paper, question, room), split=True, room=room)

        class Stopped(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **rest: Any) -> bool:
                return stop.is_set()

        prepared.answer(
            question.text,
            max_new_tokens=new,
            streamer=_Streamer(tokenizer, pieces),
            stopping_criteria=[Stopped()],
            do_sample=False,
            release=True,
        )

    @staticmethod
    def contexts(reader: Any, paper: PaperText, question: Question, room: int) -> list[str]:
        """What is read side by side: the sections that matter, cut so that each fits behind its own heading.

        Args:
            reader: that will read them.
            paper: of which.
            question: that is asked.
            room: tokens kept free for question and answer.

        Returns:
            In the order of the paper; where there are more than are read, those whose words fit the question best.
        """
        from danlu.context.documents import split_text

        limit, found = reader.max_length, []
        for section in context.routed(paper, question):
            text = paper.text[section.start : section.end].strip()
            heading = f"Section {section.title}:\n"
            if limit is None:
                found.append(heading + text)
                continue
            free = max(8, limit - len(reader.layout.head) - room - len(reader.layout.encode(heading, "heading")) - 2)
            spans = split_text(text, free, lambda part: len(reader.layout.encode(part, "part")))
            found += [heading + text[start:end] for start, end in spans]
        if len(found) > CONTEXTS:
            fit = relevance(found, question)
            best = sorted(range(len(found)), key=lambda index: -fit[index])[:CONTEXTS]
            found = [found[index] for index in sorted(best)]
        return found

    def _load(self, lang: str) -> Any:
        if lang not in self._readers:
            from danlu.context.naive_bayes.contexts import NaiveBayesContexts
            from danlu.context.naive_bayes.select import Selection

            if isinstance(self._model, str):
                from danlu.hosts.loading import load_causal_lm

                self._model, self._tokenizer = load_causal_lm(self._model)
            config = getattr(self._model, "config", None)
            length = getattr(config, "max_position_embeddings", None)
            prefix = questions.system_prompt(lang, short=length is not None and length < _SHORT)
            self._readers[lang] = NaiveBayesContexts(
                self._model,
                self._tokenizer,
                beta=self.beta,
                eta=ETA,
                top_p=TOP_P,
                prefix=prefix,
                selection=Selection(refusals=_REFUSALS[lang]),
            )
        return self._readers[lang]


class _Streamer:
    """Hands decoded text on as tokens come, once it no longer changes."""

    def __init__(self, tokenizer: Any, pieces: queue.Queue[Any]) -> None:
        self.tokenizer, self.pieces = tokenizer, pieces
        self.tokens: list[int] = []
        self.given = 0
        self.prompt = True

    def put(self, value: Any) -> None:
        """Take the next tokens; the first that come are the prompt."""
        if not self.prompt:
            self.tokens += value.reshape(-1).tolist()
            self._give(final=False)
        self.prompt = False

    def end(self) -> None:
        """Take the rest."""
        self._give(final=True)

    def _give(self, final: bool) -> None:
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        # The last characters may be the first bytes of one that is not complete.
        end = len(text) if final else len(text.rstrip("\ufffd"))
        if end > self.given:
            self.pieces.put(text[self.given : end])
            self.given = end
