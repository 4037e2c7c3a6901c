"""Counting what autograd keeps between a forward and a backward pass, the same on every machine."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn


class SavedForBackward:
    """Context manager that counts the bytes which autograd keeps for the backward pass.

    ``peak`` is the largest number of bytes kept at one time. Storage that is kept twice counts once, and the model's
    own parameters and buffers do not count.

    Args:
        model: whose parameters are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self._own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
        self._held: dict[int, int] = {}
        self._now = 0
        self.peak = 0

    def __enter__(self) -> SavedForBackward:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> Any:
        key, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if key in self._own:
            return tensor
        self._held[key] = self._held.get(key, 0) + 1
        if self._held[key] == 1:
            self._now += size
            self.peak = max(self.peak, self._now)
        return _Kept(self, tensor, key, size)

    @staticmethod
    def _unpack(kept: Any) -> Tensor:
        tensor: Tensor = kept.tensor if isinstance(kept, _Kept) else kept
        return tensor

    def release(self, key: int, size: int) -> None:
        """Called when autograd lets go of one reference."""
        self._held[key] -= 1
        if not self._held[key]:
            del self._held[key]
            self._now -= size


class _Kept:
    """A saved tensor that reports its own end."""

    def __init__(self, counter: SavedForBackward, tensor: Tensor, key: int, size: int) -> None:
        self.counter, self.tensor, self.key, self.size = counter, tensor, key, size

    def __del__(self) -> None:
        self.counter.release(self.key, self.size)
