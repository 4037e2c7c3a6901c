"""Rotary frequencies of a host configuration, and rescaled frequencies written back as the host's own `longrope` type.

The host's longrope table is theta_i / factor_i with theta_i = rope_theta**(-2i/d). With short_factor = long_factor =
theta_i / theta'_i any frequency table theta' whatever becomes plain configuration: it survives save and load, and needs
no danlu where the model runs.
"""

from __future__ import annotations

import copy
import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .rotary import inverse_frequencies
from .scaling import rescaled, stretch_factor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger("danlu.positions")

# Entries of `rope_parameters` that describe the model and not a scaling, so they outlive a change of type.
_KEPT_KEYS = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")


def rope_tables(config: PreTrainedConfig) -> dict[str | None, dict[str, Any]]:
    """The `rope_parameters` of a host configuration by layer type, `{None: ...}` where all layers share one.

    Args:
        config: A transformers configuration (for a multimodal model its text part is read).

    Raises:
        ValueError: The configuration has no rotary positions.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None)
    if not parameters:
        raise ValueError(
            f"{type(config).__name__} has no rope_parameters: the model has no rotary positions to rescale"
        )
    if "rope_type" in parameters or "rope_theta" in parameters:
        return {None: parameters}
    return {name: value for name, value in parameters.items() if isinstance(value, dict)}


def rotated_dim(config: PreTrainedConfig, layer_type: str | None = None) -> int:
    """Number of rotated dims of a head of a host model.

    Args:
        config: A transformers configuration.
        layer_type: Key of `rope_tables`.
    """
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(head_dim * _table(config, layer_type).get("partial_rotary_factor", 1.0))


def host_frequencies(config: PreTrainedConfig, layer_type: str | None = None) -> tuple[Tensor, float]:
    """Frequencies that a host model rotates with, read from its configuration.

    A plain or linear table is built here in float64; other types come from the host's own function in float32. The
    `inv_freq` buffer of a model is no substitute: `model.to(torch.bfloat16)` may have rounded it.

    Args:
        config: A transformers configuration.
        layer_type: Key of `rope_tables`.

    Returns:
        (inv_freq, attention_scaling): float64 (d/2,) and the host's scale on cos and sin.

    Raises:
        ValueError: No rotary positions, or a type whose table depends on the length of the input (dynamic, longrope
            with two different tables).
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = _table(config, layer_type)
    kind = parameters.get("rope_type", "default")
    if "dynamic" in kind:
        raise ValueError(
            f"rope_type {kind!r} rebuilds its frequencies as the input grows, there is no one table to read; "
            "start from a config with rope_type 'default'"
        )
    if kind == "longrope" and list(parameters["short_factor"]) != list(parameters["long_factor"]):
        raise ValueError(
            "this longrope config switches between a short and a long table; rescale each one yourself with rescaled()"
        )
    if kind in ("default", "linear"):
        dim = rotated_dim(config, layer_type)
        return inverse_frequencies(dim, parameters["rope_theta"]) / float(parameters.get("factor", 1.0)), 1.0
    if kind not in ROPE_INIT_FUNCTIONS:
        raise ValueError(f"rope_type must be default or one of {', '.join(sorted(ROPE_INIT_FUNCTIONS))}, got {kind!r}")
    text = config.get_text_config()
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](text, None, layer_type=layer_type)
    return inv_freq.to(torch.float64), float(scaling)


def to_longrope(
    inv_freq: Tensor,
    config: PreTrainedConfig,
    *,
    attention_scaling: float = 1.0,
    factor: float = 1.0,
    trained_length: int | None = None,
    layer_type: str | None = None,
) -> dict[str, Any]:
    """`rope_parameters` of the host's longrope type that give exactly these frequencies.

    `original_max_position_embeddings` is set to the stretched length: the two tables are the same, so the host's switch
    between them never matters, and engines that derive a scale from the ratio of lengths derive 1. Where the scale on
    cos and sin is not 1 it is written as `attention_factor` (transformers) and as `short_mscale` / `long_mscale` (other
    engines); transformers logs that it does not know the latter two.

    Args:
        inv_freq: (d/2,) rescaled frequencies, > 0.
        config: The host's configuration before rescaling.
        attention_scaling: Scale m on cos and sin, > 0.
        factor: Stretch s >= 1.
        trained_length: Tokens; None reads `max_position_embeddings`.
        layer_type: Key of `rope_tables`.

    Returns:
        A dict of plain numbers and lists, ready for JSON.

    Raises:
        ValueError: A table that longrope cannot hold (wrong length, zero frequencies), or a host that also scales its
            logits by the factor (`mscale_all_dim`).
    """
    parameters = _table(config, layer_type)
    dim = rotated_dim(config, layer_type)
    table = torch.as_tensor(inv_freq, dtype=torch.float64)
    if table.shape != (dim // 2,):
        raise ValueError(f"inv_freq must have shape ({dim // 2},) for {dim} rotated dims, got {tuple(table.shape)}")
    if not bool((table > 0).all()) or not bool(torch.isfinite(table).all()):
        raise ValueError("longrope divides by factors, so every frequency must be finite and > 0: keep the host's type")
    if parameters.get("mscale_all_dim"):
        raise ValueError("this host scales its logits by rope_parameters['mscale_all_dim'], which longrope cannot hold")
    ratios = (inverse_frequencies(dim, parameters["rope_theta"]) / table).tolist()
    text = config.get_text_config()
    target = math.ceil((trained_length or text.max_position_embeddings) * factor)
    exported: dict[str, Any] = {key: parameters[key] for key in _KEPT_KEYS if key in parameters}
    exported.update(
        rope_type="longrope",
        short_factor=ratios,
        long_factor=list(ratios),
        factor=float(factor),
        attention_factor=float(attention_scaling),
        original_max_position_embeddings=target,
    )
    if attention_scaling != 1:
        exported.update(short_mscale=float(attention_scaling), long_mscale=float(attention_scaling))
    return exported


def export_config(
    config: PreTrainedConfig,
    method: str,
    *,
    factor: float | None = None,
    target_length: int | None = None,
    trained_length: int | None = None,
    layer_types: tuple[str, ...] | None = None,
    **options: Any,
) -> PreTrainedConfig:
    """A copy of a host configuration whose rotary frequencies are rescaled; the model then runs without danlu.

    Args:
        config: A transformers configuration; it is not changed.
        method: One of `danlu.positions.METHODS`.
        factor: Stretch s >= 1. Give `factor` or `target_length`, not both.
        target_length: Length wanted, tokens.
        trained_length: Tokens; None reads `max_position_embeddings`.
        layer_types: For models with one table per layer type, the types to rescale. None takes all but
            "sliding_attention", whose distances never leave the window that it was trained with.
        **options: As in `rescaled`.

    Returns:
        A deep copy with `rope_parameters` of type longrope and `max_position_embeddings` at least the stretched length.

    Raises:
        ValueError: As in `rescaled`, `host_frequencies` and `to_longrope`, or an unknown layer type.

    Source: Scientific Spaces archive 9706, 9948; arXiv:2402.13753 (the longrope format).
    """
    tables = rope_tables(config)
    chosen = [name for name in tables if name != "sliding_attention"] if layer_types is None else list(layer_types)
    unknown = [name for name in chosen if name not in tables]
    if unknown or not chosen:
        raise ValueError(f"layer_types must be among {sorted(map(str, tables))}, got {layer_types!r}")
    exported = copy.deepcopy(config)
    text = exported.get_text_config()
    length = trained_length or text.max_position_embeddings
    stretch = stretch_factor(method, factor, length, target_length)
    for name in chosen:
        inv_freq, host_scaling = host_frequencies(config, name)
        new, scaling = rescaled(inv_freq, method, factor=stretch, trained_length=length, **options)
        parameters = to_longrope(
            new,
            config,
            attention_scaling=host_scaling * scaling,
            factor=stretch,
            trained_length=length,
            layer_type=name,
        )
        if name is None:
            text.rope_parameters = parameters
        else:
            text.rope_parameters[name] = parameters
    for name in tables:
        if name not in chosen:
            logger.info("rope table of %s left as it is", name)
    target = math.ceil(length * stretch)
    text.max_position_embeddings = max(text.max_position_embeddings, target)
    if hasattr(text, "original_max_position_embeddings"):  # the host gives this attribute priority over the dict
        text.original_max_position_embeddings = target
    if getattr(text, "head_dim", 0) is None:  # the host's longrope reads the attribute without a fallback
        text.head_dim = text.hidden_size // text.num_attention_heads
    return exported


def _table(config: PreTrainedConfig, layer_type: str | None) -> dict[str, Any]:
    tables = rope_tables(config)
    if layer_type not in tables:
        raise ValueError(f"layer_type must be one of {sorted(map(str, tables))}, got {layer_type!r}")
    return tables[layer_type]
