"""The rows of naive-Bayes context extension: read once, kept in caches, advanced together by the same tokens.

What all rows begin with is read once and its cache copied. Contexts are read in micro-batches of similar length, padded
behind, where no real token sees the padding; the finished rows are then joined into as few groups as little padding
allows, aligned on the right, so that question and answer are plain batched steps. Row 0 has no context.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from danlu.context.naive_bayes.caches import can_join, can_pad_right, fork, join, select_rows, take_row
from danlu.context.trial import keeps_logits


class Host:
    """The host model as one call: tokens and a cache in, logits and the grown cache out.

    Raises:
        TypeError: an encoder-decoder, or a model whose forward takes no ``past_key_values``.
    """

    def __init__(self, model: Any):
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        name = type(inner).__name__
        if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
            raise TypeError(f"{name} is an encoder-decoder: naive-Bayes contexts need a decoder-only language model")
        parameters = inspect.signature(inner.forward).parameters
        if "past_key_values" not in parameters or not hasattr(inner, "generate"):
            raise TypeError(
                f"{name} has no key/value cache or cannot generate: naive-Bayes contexts need a causal language model "
                "whose forward takes past_key_values"
            )
        self.model = model
        self.name = name
        self.device = next(model.parameters()).device
        self.keeps_logits = keeps_logits(model)
        self.takes_positions = "position_ids" in parameters

    def __call__(
        self, ids: Tensor, cache: Any, *, mask: Tensor | None = None, positions: Tensor | None = None, keep: int = 1
    ) -> tuple[Tensor, Any]:
        """Read tokens.

        Args:
            ids: (rows, tokens).
            cache: what went before, or None; it grows in place.
            mask: (rows, before + tokens), 1 = real; None = all.
            positions: (rows, tokens); None = as the host counts.
            keep: last positions whose logits are wanted.

        Returns:
            Logits (rows, keep, vocabulary) as the model gave them, and the cache.

        Raises:
            ValueError: the model returned no cache.
        """
        given: dict[str, Any] = {"logits_to_keep": keep} if self.keeps_logits else {}
        if positions is not None and self.takes_positions:
            given["position_ids"] = positions
        output = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **given)
        grown = getattr(output, "past_key_values", None)
        if grown is None:
            raise ValueError(f"{self.name} returned no cache: naive-Bayes contexts need past_key_values")
        return output.logits[:, -keep:], grown


@dataclass
class Group:
    """Rows that are one batch: their numbers, their cache, and what of it is padding.

    Attributes:
        rows: numbers of the rows.
        cache: of all of them, aligned on the right; None while it is empty.
        padding: slots of padding in front of each row.
        width: slots of the cache.
    """

    rows: list[int]
    cache: Any
    padding: list[int]
    width: int


@dataclass
class Rows:
    """All rows, in groups.

    Attributes:
        host: the model.
        groups: each row is in one.
    """

    host: Host
    groups: list[Group]

    def __len__(self) -> int:
        return sum(len(group.rows) for group in self.groups)

    def fork(self) -> Rows:
        """A copy that can go on without changing this one."""
        return replace(self, groups=[replace(group, cache=fork(group.cache)) for group in self.groups])

    def feed(self, tokens: Tensor, *, score: bool = False) -> tuple[Tensor, Tensor | None]:
        """Append the same tokens to all rows.

        Args:
            tokens: (tokens,), at least one.
            score: also return how probable the tokens after the first were.

        Returns:
            Logits after the last token in float32 or better, (rows, vocabulary) in the order of row numbers, and with
            ``score`` the mean log probability of the tokens from the second on, (rows,), 0 where there is one token.
        """
        last: dict[int, Tensor] = {}
        means: dict[int, Tensor] = {}
        count = len(tokens)
        for group in self.groups:
            logits = self._feed(group, tokens, count if score else 1)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            last |= zip(group.rows, logits[:, -1], strict=True)
            if score:
                logs = logits[:, :-1].log_softmax(-1).gather(-1, tokens[1:].expand(len(group.rows), -1)[..., None])
                mean = logs.squeeze(-1).mean(-1) if count > 1 else logits.new_zeros(len(group.rows))
                means |= zip(group.rows, mean, strict=True)
        order = sorted(last)
        scores = torch.stack([means[row] for row in order]) if score else None
        return torch.stack([last[row] for row in order]), scores

    def _feed(self, group: Group, tokens: Tensor, keep: int) -> Tensor:
        rows, count = len(group.rows), len(tokens)
        mask = positions = None
        if any(group.padding):
            padding = torch.tensor(group.padding, device=self.host.device)[:, None]
            slots = torch.arange(group.width + count, device=self.host.device)
            mask = (slots >= padding).long()
            positions = slots[group.width :] - padding
        logits, group.cache = self.host(tokens.expand(rows, -1), group.cache, mask=mask, positions=positions, keep=keep)
        group.width += count
        return logits

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows alone, in place; they keep their numbers."""
        wanted, kept = set(rows), []
        for group in self.groups:
            places = [place for place, row in enumerate(group.rows) if row in wanted]
            if not places:
                continue
            if len(places) < len(group.rows):
                if group.cache is not None:
                    select_rows(group.cache, torch.tensor(places, device=self.host.device))
                group.rows = [group.rows[place] for place in places]
                group.padding = [group.padding[place] for place in places]
            kept.append(group)
        self.groups = kept


def read_rows(
    host: Host, head: Sequence[int], contexts: Sequence[Sequence[int]], *, batch_tokens: int, max_padding: float
) -> Rows:
    """Read what comes before the question.

    Args:
        host: the model.
        head: tokens that all rows begin with, row 0 included; may be none.
        contexts: tokens of each context, all different, none empty.
        batch_tokens: tokens of a micro-batch, padding included; a longer context is one by itself.
        max_padding: slots of padding that a group may hold, as a share of its real tokens.

    Returns:
        Row 0 without context and row i with the i-th, i = 1..n.
    """
    common = _common_prefix(contexts)
    start = host(_row(host, head), None)[1] if head else None
    trunk = fork(start)
    if common:
        trunk = host(_row(host, contexts[0][:common]), trunk)[1]
    before = len(head) + common
    caches: dict[int, Any] = {0: start}
    lengths = {0: len(head), **{i: len(head) + len(context) for i, context in enumerate(contexts, 1)}}
    rest = {i: context[common:] for i, context in enumerate(contexts, 1)}
    waiting = sorted(rest, key=lambda i: (-len(rest[i]), i))
    known = trunk
    while waiting:
        batch, waiting = _next_batch(waiting, rest, known, batch_tokens)
        width = max(len(rest[i]) for i in batch)
        ids = torch.tensor([[*rest[i], *[0] * (width - len(rest[i]))] for i in batch], device=host.device)
        mask = None
        if any(len(rest[i]) < width for i in batch):
            ends = torch.tensor([lengths[i] for i in batch], device=host.device)
            mask = (torch.arange(before + width, device=host.device) < ends[:, None]).long()
        _, known = host(ids, fork(trunk, len(batch)), mask=mask)
        for place, i in enumerate(batch):
            caches[i] = known if len(batch) == 1 else take_row(known, place, lengths[i])
    return Rows(host, _grouped(host, caches, lengths, max_padding))


def _next_batch(
    waiting: list[int], rest: dict[int, Sequence[int]], cache: Any, batch_tokens: int
) -> tuple[list[int], list[int]]:
    """The next micro-batch of rows, sorted from long to short, and those that are left.

    ``cache`` is one that the model made, None before it made any: then a single row finds out its kind.
    """
    longest = len(rest[waiting[0]])
    if cache is None or not can_join(cache):
        return waiting[:1], waiting[1:]
    count = max(1, batch_tokens // longest)
    if not can_pad_right(cache):
        count = min(count, sum(len(rest[i]) == longest for i in waiting))
    # a much shorter row would be mostly padding
    count = sum(2 * len(rest[i]) > longest for i in waiting[:count])
    return waiting[:count], waiting[count:]


def _grouped(host: Host, caches: dict[int, Any], lengths: dict[int, int], max_padding: float) -> list[Group]:
    """Join rows, from long to short, while the padding stays below its share."""
    order = sorted(caches, key=lambda i: (-lengths[i], i))
    joinable = all(cache is None or can_join(cache) for cache in caches.values())
    parts: list[list[int]] = []
    real = 0
    for i in order:
        slots = (len(parts[-1]) + 1) * lengths[parts[-1][0]] if parts else 0
        if parts and joinable and slots <= (1 + max_padding) * (real + lengths[i]):
            parts[-1].append(i)
            real += lengths[i]
        else:
            parts.append([i])
            real = lengths[i]
    groups = []
    for part in parts:
        width = lengths[part[0]]
        # a single row is joined too, where that gives it memory of its own
        cache = join([caches[i] for i in part]) if joinable and width else caches[part[0]]
        groups.append(Group(part, cache, [width - lengths[i] for i in part], width))
        for i in part:
            del caches[i]
    return groups


def _common_prefix(contexts: Sequence[Sequence[int]]) -> int:
    """Tokens that all contexts begin with, at least one less than the shortest has; 0 for a single context."""
    if len(contexts) < 2:
        return 0
    ordered = sorted(map(list, contexts))
    low, high = ordered[0], ordered[-1]  # what these two share, all between them share
    limit = min(len(context) for context in contexts) - 1
    return next((i for i in range(limit) if low[i] != high[i]), limit)


def _row(host: Host, tokens: Sequence[int]) -> Tensor:
    return torch.tensor([list(tokens)], device=host.device)
