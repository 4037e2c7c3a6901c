"""The two caches of a ladder as one, so that the host's ``generate`` can reorder, crop and repeat both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache


class LadderCache(Cache):
    """Keys and values of the backbone and of the side.

    Lengths and mask sizes are the backbone's, which the side shares: both see the same tokens. Layers of the backbone
    above the last link stay empty.

    Args:
        backbone: the backbone's cache.
        side: the side's cache.
    """

    def __init__(self, backbone: Cache, side: Cache) -> None:
        super().__init__(layers=[*backbone.layers, *side.layers])
        self.backbone = backbone
        self.side = side

    @classmethod
    def empty(cls, backbone: Any, side: Any) -> LadderCache:
        """Two growing caches for a pair of host configurations."""
        return cls(DynamicCache(config=backbone), DynamicCache(config=side))

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: each part writes to its own cache."""
        raise RuntimeError("write to .backbone or .side of a LadderCache, not to the pair")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen."""
        return self.backbone.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the keys of a backbone layer."""
        return self.backbone.get_mask_sizes(query_length, layer_idx)

    @property
    def is_compileable(self) -> bool:
        """Growing caches change their shapes with every token."""
        return False

    def bytes(self) -> int:
        """Bytes of all keys and values held."""
        tensors = [x for layer in self.layers for x in vars(layer).values() if isinstance(x, torch.Tensor)]
        return sum(x.numel() * x.element_size() for x in tensors)
