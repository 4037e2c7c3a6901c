"""Decoding with a smaller cache: keep less than keys and values, and compute the rest again at every step.

A decoder's keys and values are functions of what came before, so any earlier quantity can be kept in their place: the
input of each layer, the input of every r-th layer, or the token ids alone. Tokens and logits stay the same; memory is
paid for in arithmetic.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from danlu.attention.streaming.cost import Policy, read_policy
from danlu.attention.streaming.rerun import find_layouts, first_arguments, project, run_block, watch
from danlu.hosts.architecture import Architecture
from danlu.positions.rotary import Layout

__all__ = ["RecomputeCache"]

logger = logging.getLogger("danlu.attention")

_TRAINING = "model must be in evaluation mode, or dropout would differ in each pass: call model.eval()"


class RecomputeCache(Cache):
    """A cache for a host decoder that keeps less than keys and values. Use it as ``past_key_values``.

    Tokens and logits are those of the default cache up to rounding: batches, left padding, beams and prompts in pieces
    included. Only one layer's keys and values exist at a time, plus the activations of the block that runs again.

    Args:
        model: a host decoder of the Llama kind (see ``danlu.hosts.architecture``) with the same attention in every
            layer and no sliding window, in evaluation mode.
        policy: ``"kv"``: keys and values, the default cache. ``"x"``: inputs of layers, ``hidden`` numbers a token
            where multi-head attention keeps ``2 * hidden``; with grouped heads keys and values are often smaller than
            that, and a warning says so. ``"ids"``: token ids alone; a step costs a forward pass over the prefix.
        every: for ``"x"``: keep the input of every r-th layer and run the ``r - 1`` layers behind it again.

    Raises:
        UnsupportedArchitecture: the model is not of the Llama kind, mixes kinds of attention, or its keys are not those
            that its projections and rotation give.
        ValueError: an argument is out of range, or the model is in training mode (dropout would differ in each pass).

    Source: Scientific Spaces archive 10017
    """

    layers: list[Any]

    def __init__(self, model: nn.Module, policy: Policy = "x", *, every: int = 1) -> None:
        architecture, every = read_policy(model, policy, every)
        self.policy, self.every, self._architecture = policy, every, architecture
        blocks, base = architecture.blocks, architecture.base
        self._prefix = _Prefix()
        self._new = _Prefix()
        self._hidden: Tensor | None = None
        self._arguments: dict[str, Any] = {}
        self._layouts: list[Layout] = []
        if policy == "kv":
            super().__init__(layers=[DynamicLayer() for _ in blocks])
            return
        super().__init__(layers=[_Layer(self, index) for index in range(len(blocks))])
        if model.training:
            raise ValueError(
                "model must be in evaluation mode, or dropout would differ in each pass: call model.eval()"
            )
        _warn_of_groups(architecture, policy, every)
        if policy == "x" and every == 1:
            self._layouts = find_layouts(architecture)
        handles = [self._hook(base, RecomputeCache._begin), self._hook(blocks[0].module, RecomputeCache._see_positions)]
        for index in range(0, len(blocks), every) if policy == "x" else ():
            where = blocks[index].attention.module if every == 1 else blocks[index].module
            handles.append(self._hook(where, _see_input(index)))
        self.close: Callable[[], Any] = weakref.finalize(self, _remove, handles)

    def numbers(self) -> int:
        """Floating-point numbers that the cache holds now."""
        tensors: list[Any] = [value for layer in self.layers for value in vars(layer).values()]
        return sum(x.numel() for x in tensors if isinstance(x, Tensor) and x.is_floating_point())

    def _hook(self, module: nn.Module, do: Callable[[RecomputeCache, dict[str, Any]], None]) -> Any:
        """Call back when a module runs with this cache; the model does not keep the cache alive."""
        reference = weakref.ref(self)

        def see(given: dict[str, Any]) -> None:
            cache = reference()
            if cache is None:
                return
            used: Any = given.get("past_key_values")
            if used is cache:
                do(used, given)

        return watch(module, see)

    def _begin(self, given: dict[str, Any]) -> None:
        mask, ids = given.get("attention_mask"), given.get("input_ids")
        if self._architecture.base.training:
            raise ValueError(
                "model must be in evaluation mode, or dropout would differ in each pass: call model.eval()"
            )
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise ValueError("attention_mask must be (batch, past + length) with a RecomputeCache")
        if self.policy == "ids" and ids is None:
            raise ValueError(
                "input_ids must be given under policy 'ids': embeddings cannot be computed again from them"
            )
        self._new = _Prefix(ids=ids if self.policy == "ids" else None, mask=mask)

    def _see_positions(self, given: dict[str, Any]) -> None:
        self._new.positions = given["position_ids"].expand(len(given["hidden_states"]), -1)

    def _keys_and_values(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer for the whole prefix."""
        blocks, prefix = self._architecture.blocks, self._prefix
        x = self.layers[index].x
        with torch.no_grad():
            if self._layouts:
                attention = blocks[index].attention
                return project(self._architecture, attention, x, prefix.positions, self._layouts[index])  # type: ignore[arg-type]
            if not self._arguments:
                inputs = {"input_ids": prefix.ids} if self.policy == "ids" else {"inputs_embeds": x}
                mask = None if prefix.mask is None else prefix.mask[:, : self.get_seq_length()]
                self._arguments = first_arguments(
                    self._architecture, **inputs, attention_mask=mask, position_ids=prefix.positions
                )
                self._hidden = self._arguments["hidden_states"]
            hidden = self._hidden if x is None else x
            last = (index + 1) % self.every == 0 or index + 1 == len(blocks)
            self._hidden, recorder = run_block(blocks[index].module, self._arguments, hidden, last)  # type: ignore[arg-type]
            return recorder.keys, recorder.values

    def _store(self, index: int) -> None:
        """After a layer's attention has what it needs: keep its input; after the last one, the tokens."""
        layer = self.layers[index]
        if layer.new is not None:
            layer.x = layer.new if layer.x is None else torch.cat((layer.x, layer.new), 1)
            layer.new = None
        if index == len(self._architecture.blocks) - 1:
            self._prefix = self._prefix.extended(self._new)
            self._arguments, self._hidden = {}, None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen by all layers."""
        if self.policy == "kv":
            return super().get_seq_length(layer_idx)
        return 0 if self._prefix.positions is None else self._prefix.positions.shape[1]

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply one operation on (batch, length, ...) to all that is kept."""
        for layer in self.layers:
            layer.x = None if layer.x is None else change(layer.x)
        prefix = self._prefix
        kept = {name: value if value is None else change(value) for name, value in vars(prefix).items()}
        self._prefix = _Prefix(**kept)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams of beam search."""
        if self.policy == "kv":
            super().reorder_cache(beam_idx)
        else:
            self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each text."""
        if self.policy == "kv":
            super().batch_repeat_interleave(repeats)
        else:
            self._change(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the texts."""
        if self.policy == "kv":
            super().batch_select_indices(indices)
        else:
            self._change(lambda x: x[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; the number is negative."""
        if self.policy == "kv":
            super().crop(tokens_to_remove)
        else:
            length = max(0, self.get_seq_length() + tokens_to_remove)
            self._change(lambda x: x[:, :length])

    def reset(self) -> None:
        """Forget everything."""
        if self.policy == "kv":
            super().reset()
        else:
            for layer in self.layers:
                layer.x = layer.new = None
            self._prefix = _Prefix()


def _see_input(index: int) -> Callable[[RecomputeCache, dict[str, Any]], None]:
    def see(cache: RecomputeCache, given: dict[str, Any]) -> None:
        cache.layers[index].new = given["hidden_states"].detach()

    return see


@dataclass
class _Prefix:
    """What is kept once for all layers, each (batch, tokens) or None."""

    positions: Tensor | None = None
    ids: Tensor | None = None
    mask: Tensor | None = None

    def extended(self, new: _Prefix) -> _Prefix:
        def joined(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return b if a is None or b is None else torch.cat((a, b), 1)

        # a mask comes whole with every call
        return _Prefix(joined(self.positions, new.positions), joined(self.ids, new.ids), new.mask)


class _Layer(CacheLayerMixin):
    """One layer's share: its input, where the policy keeps it."""

    is_sliding = False
    is_croppable = True

    def __init__(self, cache: RecomputeCache, index: int):
        super().__init__()
        self._cache, self.index = weakref.ref(cache), index
        self.x: Tensor | None = None
        self.new: Tensor | None = None
        self.is_initialized = True

    @property
    def cache(self) -> RecomputeCache:
        cache = self._cache()
        if cache is None:
            raise ValueError("the RecomputeCache of this layer is gone: keep a reference to it")
        return cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of the prefix, computed again, and the new ones behind them."""
        if self.cache.get_seq_length():
            keys, values = self.cache._keys_and_values(self.index)
            key_states = torch.cat((keys.to(key_states.dtype), key_states), -2)
            value_states = torch.cat((values.to(value_states.dtype), value_states), -2)
        self.cache._store(self.index)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.cache.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a call sees."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _warn_of_groups(architecture: Architecture, policy: str, every: int) -> None:
    attention = architecture.blocks[0].attention
    kept, plain = architecture.config.hidden_size / every, 2 * attention.kv_heads * attention.head_dim
    if policy == "x" and kept >= plain:
        logger.warning(
            "policy 'x' with every=%d keeps %g numbers per layer and token, keys and values of %d grouped heads only "
            "%d: take every=%d or more, or the default cache",
            every,
            kept,
            attention.kv_heads,
            plain,
            int(architecture.config.hidden_size // plain) + 1,
        )
