"""The cache of one latent attention layer: a latent and a rotated key per token, in tensors that grow with room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class LatentLayer(CacheLayerMixin):
    """Cache layer that appends in place instead of copying everything at each token.

    `keys` holds the normalised latents, (batch, 1, tokens, kv_rank), `values` the rotated shared keys,
    (batch, 1, tokens, rope_dim): the arrangement of the host library's own latent models, so a host cache may be made
    of these layers too: ``Cache(layers=[LatentLayer() for _ in range(depth)])``. Both are views of tensors with room
    for an eighth more tokens, and 64.

    Positions are turned into the keys before they are stored: cropping is fine, moving tokens is not.

    Source: Scientific Spaces archive 10091; arXiv:2405.04434.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    keys: Tensor | None
    values: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self._room: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start empty, with the batch, widths, type and device of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._hold(key_states[..., :0, :], value_states[..., :0, :])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens.

        Args:
            key_states: (batch, 1, length, kv_rank) latents.
            value_states: (batch, 1, length, rope_dim) rotated keys.
            args: ignored, as are `kwargs`: the host passes more to some of its own layers.
            kwargs: ignored.

        Returns:
            All latents and all rotated keys. They are views: the next call may write behind them, never into them.

        Raises:
            ValueError: another batch size than the one cached.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._contents()
        if key_states.shape[0] != keys.shape[0]:
            raise ValueError(
                f"key_states must have the batch size of the cache, {keys.shape[0]}, got {key_states.shape[0]}; "
                "call batch_repeat_interleave or reset first"
            )
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad or keys.requires_grad):
            # a gradient may need the old tensors as they were: writing into them is not allowed
            self._hold(torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2))
            return self._contents()
        seen, total = keys.shape[-2], keys.shape[-2] + key_states.shape[-2]
        if self._room is None or total > self._room[0].shape[-2]:
            capacity = total + total // 8 + 64
            self._room = _grown(keys, capacity), _grown(values, capacity)
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[..., seen:total, :] = new
        self.keys, self.values = (room[..., :total, :] for room in self._room)
        return self._contents()

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return 0 if self.keys is None else self.keys.shape[-2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `query_length` new tokens will attend to."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit: -1."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens.

        Args:
            tokens_to_remove: minus their number; 0 leaves all.

        Raises:
            ValueError: a positive number.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove must be negative (the last tokens to take away) or 0, got {tokens_to_remove}"
            )
        if tokens_to_remove and self.is_initialized:
            self.keys, self.values = (x[..., :tokens_to_remove, :] for x in self._contents())

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self._room = None
        self.is_initialized = False

    def offload(self) -> None:
        """Move to the CPU, without the room to grow."""
        self._change(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move back to the device of the first states."""
        if self.is_initialized and self._contents()[0].device != self.device:
            self._change(lambda x: x.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows that a beam search goes on with."""
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, by index or by a mask of rows."""
        self._change(lambda x: x[indices, ...])

    def _contents(self) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            raise ValueError("the cache layer is empty; call update first")
        return self.keys, self.values

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self._room = keys, values, None

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            keys, values = self._contents()
            self._hold(change(keys), change(values))


def _grown(x: Tensor, capacity: int) -> Tensor:
    room = x.new_empty(*x.shape[:-2], capacity, x.shape[-1])
    room[..., : x.shape[-2], :] = x
    return room
