"""What the rows of naive-Bayes context extension say: a template, cut into token lists around context and question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

#: Contexts and questions are text, or token ids that are taken as they are.
TextLike = str | Sequence[int] | torch.Tensor

#: The layout of the source, for models without a chat template.
PLAIN = "User: {context}\n\n{question}\n\nAssistant:"

_CONTEXT, _QUESTION = "{context}", "{question}"
# A chat template must not find our braces in the user's own words.
_MARKS = ("\ue000", "\ue001")


@dataclass(frozen=True)
class Layout:
    """Token ids before the context, between context and question, and behind the question.

    Attributes:
        head: the start token, the prefix, and the template up to the context: the same in all rows.
        middle: between context and question.
        tail: behind the question.
        tokenizer: turns text into ids; None where everything is given as ids.
    """

    head: list[int]
    middle: list[int]
    tail: list[int]
    tokenizer: Any = None

    def encode(self, text: TextLike, name: str) -> list[int]:
        """Ids of a text without special tokens, or the ids as given.

        Raises:
            TypeError: text without a tokenizer, or neither text nor ids.
            ValueError: empty.
        """
        if isinstance(text, str):
            if self.tokenizer is None:
                raise TypeError(f"{name} is text, which needs a tokenizer: NaiveBayesContexts(model, tokenizer)")
            if not text.strip():
                raise ValueError(f"{name} is empty: leave it out, or pass its text")
            return _plain_ids(self.tokenizer, text)
        ids = torch.as_tensor(text)
        if ids.ndim == 2 and ids.shape[0] == 1:
            ids = ids[0]
        if ids.numel() == 0:
            raise ValueError(f"{name} is empty: leave it out, or pass its token ids")
        if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise TypeError(f"{name} must be text or 1-D token ids, got {ids.dtype} of shape {tuple(ids.shape)}")
        return ids.tolist()

    def question(self, question: TextLike) -> list[int]:
        """Ids of all that follows a context, up to the answer."""
        return [*self.middle, *self.encode(question, "question"), *self.tail]


def make_layout(tokenizer: Any, template: str | None, prefix: TextLike) -> Layout:
    """Cut a template around its two places; the parts are tokenised one by one, so that caches can be reused.

    Args:
        tokenizer: of the model; None where contexts and questions are token ids.
        template: text with ``{context}`` and, behind it, ``{question}``, each once. None: the tokenizer's chat
            template, or ``PLAIN`` where it has none; nothing at all without a tokenizer.
        prefix: instructions in front of everything: the system message of a chat template, text, or ids.

    Raises:
        ValueError: a template without its places, or a chat template that takes no system message.
        TypeError: a template or text without a tokenizer.
    """
    if tokenizer is None:
        if template is not None:
            raise TypeError("template needs a tokenizer: NaiveBayesContexts(model, tokenizer, template=...)")
        bare = Layout([], [], [])
        return Layout(bare.encode(prefix, "prefix") if len(prefix) else [], [], [])
    text_prefix = prefix if isinstance(prefix, str) else ""
    chat = template is None and getattr(tokenizer, "chat_template", None) is not None
    if chat:
        whole, places = _chat(tokenizer, text_prefix), _MARKS
    else:
        whole, places = PLAIN if template is None else template, (_CONTEXT, _QUESTION)
    if any(whole.count(place) != 1 for place in places) or whole.index(places[0]) > whole.index(places[1]):
        raise ValueError(
            f"template must hold {_CONTEXT} once and {_QUESTION} once behind it (contexts come first, so that they "
            f"need not be read again for another question), got {whole!r}"
        )
    head, rest = whole.split(places[0])
    middle, tail = rest.split(places[1])
    if text_prefix and not chat:
        head = f"{text_prefix}\n\n{head}"
    ids = _plain_ids(tokenizer, head)
    if not isinstance(prefix, str) and len(prefix):
        ids = [*Layout([], [], []).encode(prefix, "prefix"), *ids]
    leading = _leading(tokenizer)
    if ids[: len(leading)] != leading:
        ids = [*leading, *ids]
    return Layout(ids, _plain_ids(tokenizer, middle), _plain_ids(tokenizer, tail), tokenizer)


def _chat(tokenizer: Any, prefix: str) -> str:
    messages = [{"role": "user", "content": f"{_MARKS[0]}\n\n{_MARKS[1]}"}]
    if prefix:
        messages.insert(0, {"role": "system", "content": prefix})
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may raise anything
        raise ValueError(
            f"the tokenizer's chat template refuses the prompt ({error}): pass template= with {_CONTEXT} and "
            f"{_QUESTION}" + (", or leave out prefix" if prefix else "")
        ) from error


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []


def _leading(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts in front of every text."""
    whole, plain = list(tokenizer("x")["input_ids"]), _plain_ids(tokenizer, "x")
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:start]
