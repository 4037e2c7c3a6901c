"""Keys turned by a dynamic method's current frequencies, kept beside the host's cache of unturned keys.

A dynamic method turns all keys of a row by the frequencies of that row's length. They change only when the length
passes the next step, so the turned keys of the last call are good for this one: only new keys have to be turned. The
turned copy lives on the host's own cache layer, and every operation that edits the layer drops it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from danlu.context.turning import Turner

LAYER = "_danlu_cache_layer"


class TurnedKeysLayer(DynamicLayer):
    """The host's growing cache layer with one more tensor: its keys as one ``Turner`` turns them."""

    _turner: Turner | None = None
    _buffer: Tensor | None = None
    _length: int = 0

    def drop(self) -> None:
        """Forget the turned keys; the next call turns them all again."""
        self._buffer, self._length = None, 0

    def turned(self, key: Tensor, turner: Turner) -> Tensor:
        """All keys turned by ``turner``, of which only those are turned now that were not before.

        Args:
            key: (batch, kv_heads, length, head_dim), all keys of this layer, unturned.
            turner: the known ones are good for the same object only: another method may have an equal factor.
        """
        length = key.shape[2]
        if turner is not self._turner or length <= self._length:
            self.drop()
        if self._buffer is None or length > self._buffer.shape[2]:
            # room to grow, so that a step does not copy all keys
            room = key.new_empty(*key.shape[:2], length + length // 8 + 64, key.shape[3])
            if self._buffer is not None:
                room[:, :, : self._length] = self._buffer[:, :, : self._length]
            self._buffer = room
        self._buffer[:, :, self._length : length] = turner.turn(key[:, :, self._length :], self._length)
        self._length, self._turner = length, turner
        return self._buffer[:, :, :length]

    def reset(self) -> None:
        """As the host's, without turned keys."""
        self.drop()
        super().reset()

    def offload(self) -> None:
        """As the host's, without turned keys."""
        self.drop()
        super().offload()

    def crop(self, tokens_to_remove: int) -> None:
        """As the host's, without turned keys."""
        self.drop()
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As the host's, without turned keys."""
        self.drop()
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As the host's, without turned keys."""
        self.drop()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """As the host's, without turned keys."""
        self.drop()
        super().batch_select_indices(indices)


class _Attach:
    """Forward pre-hook of an attention module: gives an empty cache layer of the plain kind room for turned keys."""

    def __call__(self, module: Any, args: tuple, kwargs: dict) -> None:
        cache: Any = kwargs.get("past_key_values", kwargs.get("layer_past"))
        layer = None
        if isinstance(cache, Cache) and module.layer_idx < len(cache.layers):
            layer = cache.layers[module.layer_idx]
            if type(layer) is DynamicLayer and layer.get_seq_length() == 0:
                layer = cache.layers[module.layer_idx] = TurnedKeysLayer()
        module.__dict__[LAYER] = layer if isinstance(layer, TurnedKeysLayer) else None


def keep_turned_keys(module: nn.Module) -> Any:
    """Let an attention module keep turned keys in its cache layer; returns the handle whose ``remove`` undoes it.

    Other kinds of cache (static, quantised, offloaded) work too: their keys are turned anew at each call.
    """
    return module.register_forward_pre_hook(_Attach(), with_kwargs=True)
