"""Answers by a model behind an endpoint that speaks the OpenAI protocol.

One conversation a card: what the model is told and the paper come first and stay the same, so that the provider can
keep what it has read; the questions follow one at a time. A paper that does not fit is routed by section, and if that
does not fit either, read in windows whose evidence is then put together.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any

import httpx2

from danlu.papers.answer import context, pdf, questions
from danlu.papers.answer.keys import digest
from danlu.papers.answer.types import (
    EngineRefused,
    EngineUnavailable,
    History,
    PaperText,
    Piece,
    Question,
    Section,
    TooLong,
)
from danlu.papers.net.policy import ENDPOINTS, Policy, parse_retry_after

logger = logging.getLogger("danlu.papers.answer")

VERSION = 1
#: Tokens of one answer, and those left free for what the count of tokens cannot know.
OUTPUT, MARGIN = 2000, 256
#: Characters and seconds after which an answer is cut off, whatever the endpoint thinks of ``max_tokens``.
_CHARACTERS, _SECONDS = 8 * OUTPUT, 900.0
#: Share of the room that a paper may take when the endpoint says that our count of its tokens was too low.
_TIGHTER = 0.6
_RETRY = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
Message = dict[str, str]


class EndpointEngine:
    """A model behind an endpoint.

    Args:
        url: base address, such as ``http://localhost:8080/v1``.
        model: its name there.
        key: sent as bearer token, or empty.
        tokens: that the model reads at once.
        parameters: sent with every request.
        policy: when to try again.
        route: read long papers by section and window; without it, they are `TooLong`.
    """

    name = "endpoint"

    def __init__(
        self,
        url: str,
        model: str,
        key: str = "",
        tokens: int = 32_768,
        parameters: dict[str, Any] | None = None,
        policy: Policy = ENDPOINTS,
        route: bool = True,
    ) -> None:
        self.url, self.model, self.tokens, self.policy, self.route = url.rstrip("/"), model, tokens, policy, route
        self.parameters, self._key = dict(parameters or {}), key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx2.AsyncClient(
            headers=headers, timeout=httpx2.Timeout(30.0, read=120.0), follow_redirects=False
        )

    @property
    def label(self) -> str:
        """Who answers, for readers."""
        return self.model

    def key(self) -> str:
        """A hash of everything that changes its answers."""
        parts = (VERSION, self.model, self.tokens, self.parameters, self.route)
        return digest(self.name, *parts, questions.VERSION, pdf.VERSION)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def answer(self, paper: PaperText, question: Question, history: History) -> AsyncIterator[Piece]:
        """Ask the model.

        Raises:
            TooLong: the paper does not fit, and may not be routed.
            EngineRefused: a wrong key, an unknown model, a refused request.
            EngineUnavailable: the endpoint cannot be reached or broke off too often.
        """
        for share in (1.0, _TIGHTER):
            said = False
            try:
                async for piece in self._answer(paper, question, history, share):
                    said = said or bool(piece.text)
                    yield piece
                return
            except TooLong:
                if said or not self.route or share == _TIGHTER:
                    raise

    async def _answer(
        self, paper: PaperText, question: Question, history: History, share: float
    ) -> AsyncIterator[Piece]:
        messages, spent = await self._messages(paper, question, history, share)
        if spent:
            yield Piece("", tokens=spent)
        async for piece in self._stream(messages):
            yield piece

    async def _messages(
        self, paper: PaperText, question: Question, history: History, share: float
    ) -> tuple[list[Message], int]:
        """What to ask for an answer, and tokens spent on finding that out."""
        whole = context.body(paper)
        if self._fits(whole, 6 * OUTPUT, share):
            start = self._opening(question, whole)
            for earlier, answered in history:
                start += [_said("user", earlier.text), _said("assistant", answered)]
            return [*start, _said("user", question.text)], 0
        if not self.route:
            needed = context.count_tokens(whole)
            raise TooLong(f"the paper has about {needed} tokens, the model reads {self.tokens} at once")
        sections = context.routed(paper, question)
        part = context.body(paper, sections)
        if self._fits(part, OUTPUT, share):
            return [*self._opening(question, part), _said("user", question.text)], 0
        evidence, spent = await self._evidence(paper, question, sections, share)
        found = "\n".join(evidence)
        while not self._fits(found, OUTPUT, share):
            # The longest gives way, so that a talkative window does not push out those behind it.
            longest = max(range(len(evidence)), key=lambda index: len(evidence[index]))
            evidence[longest] = evidence[longest][: int(len(evidence[longest]) * 0.8)]
            found = "\n".join(evidence)
        asked = [*self._opening(question, found or "(no evidence was found)"), _said("user", question.text)]
        return asked, spent

    async def _evidence(
        self, paper: PaperText, question: Question, sections: Sequence[Section], share: float
    ) -> tuple[list[str], int]:
        """What each window of a paper says to a question, and the tokens that it took."""
        prompt, output = questions.evidence_prompt(question), min(OUTPUT, self.tokens // 4)
        fixed = context.count_tokens(questions.system_prompt(question.lang)) + context.count_tokens(prompt)
        room = min(self.tokens // 2, self.tokens - output - fixed - 32)
        evidence, spent = [], 0
        for window in context.windows(paper, sections, max(32, int(share * room))):
            asked = [*self._opening(question, window), _said("user", prompt)]
            text = ""
            async for piece in self._stream(asked, output):
                text = piece.text if piece.restart else text + piece.text
                spent += piece.tokens
            if text.strip().strip(".[]").upper() != "NONE":
                evidence.append(text.strip())
        return evidence, spent

    def _opening(self, question: Question, text: str) -> list[Message]:
        return [_said("system", questions.system_prompt(question.lang)), _said("user", context.delimited(text))]

    def _fits(self, text: str, output: int, share: float) -> bool:
        room = self.tokens - min(output, self.tokens // 3) - MARGIN
        return context.count_tokens(text) <= share * room

    async def _stream(self, messages: list[Message], output: int = OUTPUT) -> AsyncIterator[Piece]:
        """One answer, handed on as it comes; a stream that breaks is asked for again from its start."""
        request = {**self.parameters, "model": self.model, "messages": messages, "stream": True}
        request.setdefault("max_tokens", min(output, max(64, self.tokens // 3)))
        request["stream_options"] = {"include_usage": True}
        attempts, waited, said = 0, 0.0, ""
        while True:
            attempts += 1
            try:
                async for piece in self._request(request, messages):
                    said += piece.text
                    yield piece
                return
            except EngineUnavailable as error:
                # No retry library takes back half an answer, so this loop is our own.
                wait = error.retry_after if error.retry_after is not None else self.policy.wait(attempts, random.random)
                if attempts >= self.policy.attempts or waited + wait > self.policy.deadline:
                    raise
                waited += wait
                await asyncio.sleep(wait)
                if said:
                    # What broke off was read and written all the same.
                    yield Piece("", tokens=_counted(messages, said), restart=True)
                    said = ""

    async def _request(self, request: dict[str, Any], messages: list[Message]) -> AsyncIterator[Piece]:
        said, used, ended, began = "", 0, False, time.monotonic()
        try:
            async with self._client.stream("POST", f"{self.url}/chat/completions", json=request) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise _refusal(response, self._key)
                async for line in response.aiter_lines():
                    if time.monotonic() - began > _SECONDS:
                        break
                    if not line.startswith("data:"):
                        continue
                    data = line[5:].strip()
                    if data == "[DONE]":
                        ended = True
                        break
                    text, tokens, stopped = _delta(data)
                    used, ended = tokens or used, ended or stopped
                    if text:
                        said += text
                        yield Piece(text)
                    if len(said) > _CHARACTERS:
                        ended = True
                        break
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise EngineRefused("the endpoint has no valid address: check engine.url") from error
        except (httpx2.HTTPError, OSError) as error:
            raise EngineUnavailable(f"the endpoint cannot be reached: {type(error).__name__}") from error
        if not ended:
            raise EngineUnavailable("the endpoint broke off in the middle of an answer")
        if not said.strip():
            raise EngineUnavailable("the endpoint gave an empty answer")
        yield Piece("", tokens=used or _counted(messages, said))


def _counted(messages: list[Message], said: str) -> int:
    return sum(context.count_tokens(message["content"]) for message in messages) + context.count_tokens(said)


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _delta(data: str) -> tuple[str, int, bool]:
    """Text, tokens in all, and whether the answer has ended, of one event."""
    try:
        event = json.loads(data)
        choice = (event.get("choices") or [{}])[0]
        text = (choice.get("delta") or {}).get("content") or ""
        used = int((event.get("usage") or {}).get("total_tokens") or 0)
        return str(text), used, choice.get("finish_reason") is not None
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise EngineUnavailable("the endpoint sent something that is not an event of the protocol") from error


def _refusal(response: httpx2.Response, key: str) -> EngineRefused | EngineUnavailable | TooLong:
    status = response.status_code
    try:
        message = str(response.json()["error"]["message"])[:200]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    if status in _RETRY:
        wait = parse_retry_after(response.headers.get("retry-after"), datetime.now(UTC), 600.0)
        return EngineUnavailable(f"the endpoint answered with status {status}", wait)
    if status in (400, 413) and any(word in message.lower() for word in ("context", "too long", "maximum", "tokens")):
        return TooLong("the endpoint says that the paper is too long for it")
    # Readers see why; the words of the endpoint, which may hold the key or an account, are for the operator.
    logger.error("the endpoint refused with status %d: %s", status, message.replace(key, "***") if key else message)
    reasons = {401: "its key is not valid", 403: "its key may not do this", 404: "it does not know the model"}
    return EngineRefused(f"the endpoint refused: {reasons.get(status, f'it answered with status {status}')}")
