"""Running parts of a host decoder again: projections of one layer, or blocks over a prefix."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from danlu.hosts.architecture import Architecture, Attention, UnsupportedArchitecture
from danlu.positions.rotary import Layout, Rotary

_CHECK_TOKENS = 3


class Stop(Exception):
    """Leaves a forward pass that has given what was wanted of it."""


class Recorder:
    """Stands in for a cache: takes what a layer stores, and may end its run there."""

    keys: Tensor
    values: Tensor

    def __init__(self, stop: bool):
        self.stop = stop

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take keys and values; raises ``Stop`` if nothing behind them is wanted."""
        self.keys, self.values = keys, values
        if self.stop:
            raise Stop
        return keys, values


def watch(module: nn.Module, see: Callable[[dict[str, Any]], None]) -> Any:
    """Call ``see`` with the arguments by name whenever a module runs; returns the handle that ends it."""
    signature = inspect.signature(module.forward)

    def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
        given = signature.bind_partial(*args, **kwargs).arguments
        see({**given, **given.pop("kwargs", {})})

    return module.register_forward_pre_hook(before, with_kwargs=True)


def first_arguments(architecture: Architecture, **inputs: Any) -> dict[str, Any]:
    """What the host passes to its first block: embedded tokens (``hidden_states``), masks, rotation.

    Args:
        architecture: of the host.
        inputs: arguments of the base model.
    """
    seen: dict[str, Any] = {}

    def stop(given: dict[str, Any]) -> None:
        seen.update(given)
        raise Stop

    handle = watch(architecture.blocks[0].module, stop)
    try:
        architecture.base(**inputs, use_cache=False)
    except Stop:
        pass
    finally:
        handle.remove()
    return seen


def run_block(
    block: nn.Module, arguments: dict[str, Any], hidden: Tensor, last: bool
) -> tuple[Tensor | None, Recorder]:
    """Run a block; stop at its keys and values if it is the last one wanted.

    Args:
        block: of the host.
        arguments: from `first_arguments`.
        hidden: (batch, length, hidden), its input.
        last: nothing behind its keys and values is wanted.

    Returns:
        Its output, or None, and a recorder with its keys and values.
    """
    recorder = Recorder(stop=last)
    try:
        out = block(**{**arguments, "hidden_states": hidden, "past_key_values": recorder})
    except Stop:
        return None, recorder
    return (out if isinstance(out, Tensor) else out[0]), recorder


def project(
    architecture: Architecture, attention: Attention, x: Tensor, positions: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Keys and values (batch, kv_heads, length, head_dim) from the input of an attention module."""
    key, value = (
        F.linear(x, m.weight, m.bias).unflatten(-1, (-1, attention.head_dim)) for m in (attention.key, attention.value)
    )
    key = key if attention.key_norm is None else attention.key_norm(key)
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    rotary_module: Any = architecture.base.rotary_emb
    cos, sin = rotary_module(x, positions)
    half = cos.shape[-1] // 2
    # hosts write each angle twice: one half after the other, or in adjacent places
    twice = bool(torch.equal(cos[..., :half], cos[..., half:]))
    pick = slice(0, half) if twice else slice(0, None, 2)
    return Rotary(torch.ones(half), layout).apply(key, cos[..., pick], sin[..., pick]), value


def find_layouts(architecture: Architecture) -> list[Layout]:
    """Compare projected keys with the host's own on a few tokens.

    Returns:
        The layout of each layer's rotation.

    Raises:
        UnsupportedArchitecture: a layer whose keys and values are not what `project` gives.
    """
    blocks, inputs, handles = architecture.blocks, [], []
    for block in blocks:
        handles.append(watch(block.attention.module, lambda given: inputs.append(given["hidden_states"])))
    ids = torch.arange(_CHECK_TOKENS, device=blocks[0].attention.query.weight.device)[None]
    reference = Cache(layers=[DynamicLayer() for _ in blocks])
    try:
        with torch.no_grad():
            architecture.base(input_ids=ids, past_key_values=reference, use_cache=True)
            return [
                _layout_of(architecture, block.attention, x, ids, layer)
                for block, x, layer in zip(blocks, inputs, reference.layers, strict=True)
            ]
    finally:
        for handle in handles:
            handle.remove()


def _layout_of(architecture: Architecture, attention: Attention, x: Tensor, positions: Tensor, wanted: Any) -> Layout:
    tolerance = 64 * max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)
    layouts: tuple[Layout, ...] = ("half", "interleaved")
    for layout in layouts:
        try:
            found = project(architecture, attention, x, positions, layout)
        except (ValueError, RuntimeError):  # a norm over all heads, or another shape: not this kind
            continue
        pairs = list(zip(found, (wanted.keys, wanted.values), strict=True))
        if all(a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max()) for a, b in pairs):
            return layout
    raise UnsupportedArchitecture(
        f"keys of {attention.name} are not what its projection, norm and rotation give; use every=2 or more, or "
        "policy='ids'"
    )
