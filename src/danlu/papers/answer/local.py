"""Answers by a causal language model on this machine whose context is short: every section is a context of its own.

The sections that matter to a question are read side by side by naive-Bayes context extension, each headed by its
title, because contexts have no order among them. A model that is strong, or a context that says "cannot tell", can win
the vote for a token without evidence: so the sections are routed by role first.

Source: Scientific Spaces archive 9617.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator
from typing import Any

from danlu.papers.answer import context, pdf, questions
from danlu.papers.answer.keys import digest
from danlu.papers.answer.types import EngineRefused, History, PaperText, Piece, Question

VERSION = 1
#: Tokens of an answer, and of the longest one that a short context leaves room for, as a share of it.
OUTPUT, SHARE = 300, 0.25
#: Contexts read side by side, at most.
CONTEXTS = 16
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
        self._reader: Any = None
        self._lock = threading.Lock()

    def key(self) -> str:
        """A hash of everything that changes its answers."""
        parameters = (VERSION, self.label, self.beta, ETA, TOP_P, OUTPUT, CONTEXTS)
        return digest(self.name, *parameters, questions.VERSION, pdf.VERSION)

    async def close(self) -> None:
        """Give the memory back."""
        self._reader = self._model = None

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
            pieces.put(EngineRefused(f"the local model cannot answer: {type(error).__name__}: {error}"[:300]))
        else:
            pieces.put(None)

    def _generate(self, paper: PaperText, question: Question, pieces: queue.Queue[Any], stop: threading.Event) -> None:
        from transformers import StoppingCriteria

        reader = self._load(question.lang)
        tokenizer = reader.layout.tokenizer
        limit = reader.max_length
        new = OUTPUT if limit is None else min(OUTPUT, max(8, int(limit * SHARE)))
        parts = []
        for section in context.routed(paper, question):
            text = paper.text[section.start : section.end].strip()
            if text:
                parts.append(f"Section {section.title}:\n{text}")
        room = reader.room_for(question.text, new)
        prepared = reader.prepare(parts[:CONTEXTS] or [paper.text], split=True, room=room)

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

    def _load(self, lang: str) -> Any:
        if self._reader is None:
            from danlu.context.naive_bayes.contexts import NaiveBayesContexts

            model, tokenizer = self._model, self._tokenizer
            if isinstance(model, str):
                from danlu.hosts.loading import load_causal_lm

                model, tokenizer = load_causal_lm(model)
            self._reader = NaiveBayesContexts(
                model, tokenizer, beta=self.beta, eta=ETA, top_p=TOP_P, prefix=questions.system_prompt(lang)
            )
        return self._reader


class _Streamer:
    """Hands decoded text on as tokens come, once it no longer changes."""

    def __init__(self, tokenizer: Any, pieces: queue.Queue[Any]) -> None:
        self.tokenizer, self.pieces = tokenizer, pieces
        self.tokens: list[int] = []
        self.given = 0

    def put(self, value: Any) -> None:
        """Take the next tokens."""
        self.tokens += value.reshape(-1).tolist()
        self._give(final=False)

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
