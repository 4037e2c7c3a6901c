"""``extend``, ``restore``, ``extended``: put methods on a Hugging Face causal language model and take them off again.

Frequency methods edit the rotary module's frequencies, and nothing else changes: any kernel, any cache, no cost.
Patterns that need more than one rotation of the same key (ReRoPE, leaky ReRoPE, dynamic scaling) silence the rotary
module instead, so that the host's queries, keys and caches stay unturned, and turn them in the attention function
registered as ``danlu``. For leaky ReRoPE the host turns by ``position / stride``, which is what distant keys need, and
the attention function adds the rest for the near ones.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from danlu.attention.key_norm import add_key_norm, remove_key_norm
from danlu.context import attention
from danlu.context.cache import LAYER, keep_turned_keys
from danlu.context.inspect import Layer, Site, host_model, probe, rotary_argument, silence
from danlu.context.inspect import trained_length as configured_length
from danlu.context.methods import (
    DynamicPattern,
    FrequencyMethod,
    KeyNorm,
    LogN,
    Method,
    ReRoPE,
    Stack,
    Window,
)
from danlu.context.stacks import parse_methods, resolve_stack
from danlu.context.turning import DynamicTables, Turner
from danlu.positions.scaling import rescaled

logger = logging.getLogger("danlu.context")
ModelT = TypeVar("ModelT", bound=nn.Module)

_STATE = "_danlu_state"
_CONFIG = "danlu_methods"
_CONFIG_LENGTH = "danlu_trained_length"


@dataclass
class _State:
    """All that ``restore`` needs."""

    stack: Stack
    length: int
    implementation: str | None
    handles: list[Any] = field(default_factory=list)
    frequencies: list[tuple[Site, Tensor, float]] = field(default_factory=list)
    planned: list[nn.Module] = field(default_factory=list)


class _Divide:
    """Forward pre-hook of a rotary module: positions divided by the stride of leaky ReRoPE."""

    def __init__(self, stride: float, layer_types: set[str | None]):
        self.stride, self.layer_types = stride, layer_types

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if None not in self.layer_types and rotary_argument("layer_type", args, kwargs) not in self.layer_types:
            return args, kwargs
        positions = rotary_argument("position_ids", args, kwargs) / self.stride
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": positions}
        return (args[0], positions, *args[2:]), kwargs


class _RefuseGaps:
    """Forward pre-hook of a rotary module: late positions are counted in cache slots, so they must be consecutive."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        positions = rotary_argument("position_ids", args, kwargs)
        if positions.is_floating_point():
            raise ValueError("position_ids must be whole numbers under this method; real ones need a frequency method")
        if torch.compiler.is_compiling() or positions.shape[-1] == 1:
            return
        if bool((positions.diff(dim=-1) > 1).any()):
            raise ValueError("position_ids must not skip positions under this method, which counts distances in tokens")


def extend(model: ModelT, *methods: Method | str, trained_length: int | None = None) -> ModelT:
    """Let a causal language model read past its training length, in place and without training.

    ``generate``, ``Trainer``, caches, peft and ``torch.compile`` go on working. Calling it again replaces the methods.

    Args:
        model: a Hugging Face causal language model with rotary positions, possibly wrapped by peft.
        methods: what to apply, e.g. ``ReRoPE(window=512), LogN()``, or one written form such as
            ``"rerope:window=512+logn"``. None at all: those written in the model's configuration by an earlier
            ``extend`` before it was saved.
        trained_length: tokens the model was trained on. ``None``: ``max_position_embeddings``.

    A custom 4-D attention mask must be causal: a row's last visible key is taken for its own.

    Returns:
        The same object.

    Raises:
        TypeError: ``model`` holds no Hugging Face model, or a method is none.
        ValueError: the model or the combination is not supported; the message says why.

    Source: Scientific Spaces archive 9675, 9706, 9708, 9728, 9948.
    """
    host = host_model(model)
    stack = _stack(host, methods)
    if trained_length is None and not methods:
        trained_length = getattr(host.config, _CONFIG_LENGTH, None)
    length = trained_length if trained_length is not None else configured_length(host)
    stack = resolve_stack(stack, length)
    restore(model)
    if stack:
        layers = probe(host)
        state = _State(stack, length, host.config._attn_implementation)
        setattr(host, _STATE, state)
        try:
            _apply(host, state, layers, length)
        except BaseException:
            restore(model)
            raise
        setattr(host.config, _CONFIG, "+".join(map(str, stack)))
        setattr(host.config, _CONFIG_LENGTH, length)
    return model


def restore(model: ModelT) -> ModelT:
    """Take every method off again: the model computes bit for bit what it did before ``extend``.

    Args:
        model: what was given to ``extend``; a model that was not extended is left alone.

    Returns:
        The same object.
    """
    host = host_model(model)
    state = host.__dict__.pop(_STATE, None)
    if state is not None:
        for handle in state.handles:
            handle.remove()
        if any(isinstance(method, KeyNorm) for method in state.stack):
            remove_key_norm(host)
        for site, inv_freq, scaling in state.frequencies:
            site.set(inv_freq, scaling)
        for module in state.planned:
            module.__dict__.pop(attention.PLAN, None)
            module.__dict__.pop(LAYER, None)
        if host.config._attn_implementation != state.implementation:
            host.set_attn_implementation(state.implementation)
        for name in (_CONFIG, _CONFIG_LENGTH):
            if hasattr(host.config, name):
                delattr(host.config, name)
    return model


@contextmanager
def extended(model: ModelT, *methods: Method | str, trained_length: int | None = None) -> Iterator[ModelT]:
    """``extend`` for the length of a ``with`` block; afterwards the model is as it was, extended or not.

    Args:
        model: as for ``extend``.
        methods: as for ``extend``; none at all means the plain model.
        trained_length: as for ``extend``.
    """
    host = host_model(model)
    before: _State | None = host.__dict__.get(_STATE)
    try:
        if methods:
            extend(model, *methods, trained_length=trained_length)
        else:
            restore(model)
        yield model
    finally:
        if before is not None:
            extend(model, *before.stack, trained_length=before.length)
        else:
            restore(model)


def active_methods(model: nn.Module) -> Stack:
    """The methods that are on the model now, with all options filled in; empty for a plain model."""
    state: _State | None = host_model(model).__dict__.get(_STATE)
    return state.stack if state is not None else ()


def _stack(host: PreTrainedModel, methods: tuple[Method | str, ...]) -> Stack:
    if not methods:
        written = getattr(host.config, _CONFIG, None)
        if written is None:
            raise ValueError("methods must name at least one method, e.g. extend(model, ReRoPE(window=512))")
        return parse_methods(written)
    stack: list[Method] = []
    for method in methods:
        stack.extend(parse_methods(method) if isinstance(method, str) else (method,))
    return tuple(stack)


def _apply(host: PreTrainedModel, state: _State, layers: list[Layer], length: int) -> None:
    chosen = {method.role: method for method in state.stack}
    pattern = chosen.get("pattern")
    frequencies = chosen.get("frequencies")
    log_n = chosen.get("query scale")
    extended_layers = [layer for layer in layers if _is_extended(layer, length)]
    if (pattern or frequencies) and not extended_layers:
        windows = sorted({layer.sliding_window for layer in layers if layer.sliding_window})
        raise ValueError(
            f"every layer of {type(host).__name__} with positions looks back at most {windows[-1]} tokens, within the "
            f"trained length of {length}: no distance is ever untrained, so there is nothing to extend"
        )
    if isinstance(pattern, Window) and pattern.sinks and any(layer.sliding_window for layer in extended_layers):
        raise ValueError(
            f"{pattern} cannot keep its first tokens in {type(host).__name__}: its own sliding window drops them; "
            f"use Window(window={pattern.window})"
        )
    if isinstance(chosen.get("key norm"), KeyNorm):
        add_key_norm(host)
    sites = list(dict.fromkeys(layer.site for layer in extended_layers if layer.site is not None))
    if isinstance(frequencies, FrequencyMethod):
        _rescale(state, sites, frequencies, length)
        layers = [layer.turning_by_its_site() for layer in layers]
        extended_layers = [layer for layer in layers if _is_extended(layer, length)]
    late = isinstance(pattern, (ReRoPE, DynamicPattern))
    if late:
        types = {site.layer_type for site in sites}
        modules = {site.module: None for site in sites}
        state.handles.extend(module.register_forward_pre_hook(_RefuseGaps(), with_kwargs=True) for module in modules)
        stride = pattern.stride if isinstance(pattern, ReRoPE) else math.inf
        if math.isinf(stride):
            state.handles.extend(silence(sites))
        else:
            hook = _Divide(stride, types)
            state.handles.extend(module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules)
    if not (pattern or log_n):
        return
    if isinstance(pattern, DynamicPattern):
        state.handles.extend(keep_turned_keys(layer.module) for layer in extended_layers)
    _plan(state, layers, extended_layers, sites if late else [], pattern, log_n, length)
    host.set_attn_implementation(attention.NAME)


def _is_extended(layer: Layer, length: int) -> bool:
    """Layers with positions that look back beyond the trained length; a shorter window never sees a new distance."""
    return layer.rotary is not None and _sees_beyond(layer, length)


def _sees_beyond(layer: Layer, length: int) -> bool:
    return layer.sliding_window is None or layer.sliding_window > length


def _rescale(state: _State, sites: list[Site], method: FrequencyMethod, length: int) -> None:
    for site in sites:
        before, scaling = site.inv_freq.detach().clone(), site.scaling
        inv_freq, factor = rescaled(
            before.to("cpu", torch.float64),
            method.rescaling,
            factor=method.factor,
            trained_length=length,
            **method.options(),
        )
        state.frequencies.append((site, before, scaling))
        site.set(inv_freq, scaling * factor)


def _plan(
    state: _State,
    layers: list[Layer],
    extended_layers: list[Layer],
    silenced: list[Site],
    pattern: Method | None,
    log_n: Method | None,
    length: int,
) -> None:
    """Tell each attention module its share; the attention function reads it. Angle tables are shared by site."""
    far = {layer.module for layer in extended_layers}
    turners: dict[Any, Turner] = {}
    tables: dict[Any, DynamicTables] = {}
    stride = pattern.stride if isinstance(pattern, ReRoPE) else math.inf
    for layer in layers:
        is_full = _sees_beyond(layer, length)
        near = dynamic = None
        if layer.rotary is not None and layer.site in silenced:
            key = (layer.site, layer.rotary.layout, layer.rotary.start)
            near = turners.setdefault(key, Turner(layer.rotary, multiplier=1 - 1 / stride))
            if isinstance(pattern, DynamicPattern) and layer.module in far:
                fresh = DynamicTables(layer.rotary, pattern.rescaling, length, pattern.growth, pattern.options())
                dynamic = tables.setdefault(key, fresh)
        share = is_full if isinstance(pattern, Window) else layer.module in far
        window = getattr(pattern, "window", None) or 0
        layer.module.__dict__[attention.PLAN] = attention.Plan(
            pattern=pattern if share else None,
            window=window,
            near=near,
            far_shift=window * (1 - 1 / stride),
            dynamic=dynamic,
            log_n=log_n if isinstance(log_n, LogN) and is_full else None,
            trained_length=length,
        )
        state.planned.append(layer.module)
