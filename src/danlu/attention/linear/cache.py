"""Cache layers that hold a state of fixed size in place of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from danlu.attention.linear.engine import LinearState
from danlu.attention.vq.engine import VQState

State = TypeVar("State", LinearState, VQState)


class StateCache(CacheLayerMixin, Generic[State]):
    """A state and the number of tokens in it; rows can be chosen, repeated and moved, tokens cannot be taken back.

    Attributes:
        state: named tuple of tensors with the batch first, or None before the first token.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.state: State | None = None
        self.seen = 0

    def advance(self, state: State, tokens: int) -> None:
        """Put in the state after ``tokens`` more tokens."""
        self.state = state
        self.seen += tokens
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the mixer makes the state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused.

        Raises:
            ValueError: always; only the mixer that made this layer can add tokens to it.
        """
        raise ValueError(
            f"{type(self).__name__} keeps a state and no keys; use it with the mixer whose make_cache() made it"
        )

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys for masks: all tokens seen."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.state = None
        self.seen = 0
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, except for 0.

        Raises:
            ValueError: tokens are to be removed, which a sum does not allow.
        """
        if tokens_to_remove:
            raise ValueError(
                f"{type(self).__name__} cannot take tokens back (crop({tokens_to_remove})): they are summed; keep a "
                "copy of the cache from before, or decode without assistance"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows for beam search."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._map(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        """Move to the CPU."""
        if self.state is not None:
            self.device: torch.device = self.state[0].device
            self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move back to where ``offload`` took it from."""
        if self.state is not None and hasattr(self, "device"):
            self._map(lambda x: x.to(self.device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            tensors: Any = [None if x is None else change(x) for x in self.state]
            self.state = type(self.state)(*tensors)


class LinearCache(StateCache[LinearState]):
    """State of :class:`danlu.LinearAttention`: features times (value size + 2) numbers per head."""


class VQCache(StateCache[VQState]):
    """State of :class:`danlu.VQAttention`: codes with counts and mean values, and one block of tokens."""
