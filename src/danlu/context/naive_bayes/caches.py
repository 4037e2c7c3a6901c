"""Copying, cutting and joining the host's caches without running the model.

The host's growing layers never write into the tensors they hold, they replace them; a copy may therefore share them,
and costs nothing until it grows. Rows that were read separately are joined into one batch with padding on the left, the
form in which the host itself batches prompts of different lengths. Caches of other kinds (recurrent states, a model's
own layers) are copied deeply and stay one row each.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from danlu.context.cache import TurnedKeysLayer

_FULL = (DynamicLayer, TurnedKeysLayer)


def can_join(cache: Any) -> bool:
    """Whether rows of such caches can be joined into a batch and taken out of one."""
    layers = getattr(cache, "layers", ())
    kinds = (*_FULL, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and not cache.offloading and all(type(layer) in kinds for layer in layers)


def can_pad_right(cache: Any) -> bool:
    """Whether a row's own tokens can be told from padding behind them: not where a window has pushed them out."""
    return can_join(cache) and all(type(layer) in _FULL for layer in cache.layers)


def fork(cache: Any, rows: int = 1) -> Any:
    """An independent copy, of ``rows`` equal rows where the cache has one.

    Args:
        cache: a host cache; None is one that is still empty.
        rows: above 1 only where ``can_join``.
    """
    if cache is None:
        return None
    if not can_join(cache):
        return copy.deepcopy(cache)
    made = _shell(cache)
    for layer in made.layers:
        if rows > 1 and _filled(layer):
            layer.keys = layer.keys.expand(rows, -1, -1, -1)
            layer.values = layer.values.expand(rows, -1, -1, -1)
    return made


def take_row(cache: Any, row: int, length: int) -> Any:
    """One row of a joinable cache, the first ``length`` of its tokens, as views: ``join`` gives it memory of its own.

    Args:
        cache: holds rows of real tokens with padding behind them, if any.
        row: which.
        length: its real tokens.
    """
    made = _shell(cache)
    for layer in made.layers:
        if not _filled(layer):
            continue
        held = slice(None) if isinstance(layer, DynamicSlidingWindowLayer) else slice(length)
        layer.keys = layer.keys[row : row + 1, :, held]
        layer.values = layer.values[row : row + 1, :, held]
    return made


def join(caches: Sequence[Any]) -> Any:
    """One batch of single rows, padded on the left with zeros; empties the given caches as it goes.

    Args:
        caches: joinable, one row each, the longest first; None is a row without tokens.
    """
    made = _shell(caches[0])  # the longest: a layer that counts its tokens counts those of the batch
    for i, layer in enumerate(made.layers):
        if not _filled(layer):
            continue
        layers = [None if cache is None else cache.layers[i] for cache in caches]
        layer.keys = _stacked([None if one is None else one.keys for one in layers])
        layer.values = _stacked([None if one is None else one.values for one in layers])
        for one in layers:
            if one is not None:
                one.keys = one.values = None  # frees this layer before the next is joined
    return made


def select_rows(cache: Any, rows: Tensor) -> None:
    """Keep some rows of a joinable cache, in place."""
    for layer in cache.layers:
        if isinstance(layer, TurnedKeysLayer):
            layer.drop()
        if _filled(layer):
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]


def _shell(cache: Any) -> Any:
    """The same cache with layer objects of its own, which still share their tensors."""
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in made.layers:
        if isinstance(layer, TurnedKeysLayer):
            layer.drop()
    return made


def _filled(layer: Any) -> bool:
    return layer.is_initialized and layer.keys is not None and layer.keys.ndim == 4


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor:
    """Rows (1, heads, tokens, dim) one below the other, aligned on the right."""
    given = [tensor for tensor in tensors if tensor is not None]
    width = max(tensor.shape[2] for tensor in given)
    empty = given[0][:, :, :0]
    rows = [empty if tensor is None else tensor for tensor in tensors]
    return torch.cat([F.pad(row, (0, 0, width - row.shape[2], 0)) for row in rows])
