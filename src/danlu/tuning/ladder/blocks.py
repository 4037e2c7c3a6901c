"""The narrow blocks of a ladder: the backbone's own classes, built from its configuration with divided widths."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from danlu.hosts.architecture import Stack, UnsupportedArchitecture, find_blocks

_WIDTHS = ("intermediate_size", "n_inner", "moe_intermediate_size", "ffn_dim")


def side_config(config: Any, layers: Sequence[int], reduction: int, min_head_dim: int = 1) -> Any:
    """The host's configuration with every width divided, and one layer for each of ``layers``.

    The number of heads is kept, as in the reference code, and each head gets narrower. Where that leaves a fraction, an
    odd number of rotated channels or fewer than ``min_head_dim`` channels, g neighbouring heads become one, with the
    smallest g that fits (or the largest possible, if all heads of keys together are still too narrow).

    Args:
        config: of the backbone.
        layers: backbone layers that are linked.
        reduction: r.
        min_head_dim: channels that a head of the side has at least.

    Returns:
        A new configuration; the given one is not changed.

    Raises:
        UnsupportedArchitecture: a model without attention heads.
        ValueError: a width that r does not divide, or heads that cannot be narrowed.
    """
    for name in ("hidden_size", "num_attention_heads"):
        if not isinstance(getattr(config, name, None), int):
            raise UnsupportedArchitecture(f"{type(config).__name__} must have {name} for a ladder")
    small = copy.deepcopy(config)
    width, heads = config.hidden_size, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    for name in ("hidden_size", *_WIDTHS):
        value = getattr(config, name, None)
        if isinstance(value, int) and value % reduction:
            raise ValueError(f"reduction must divide the backbone's {name} of {value}, got {reduction}")
        if isinstance(value, int):
            setattr(small, name, value // reduction)
    fitting = [
        merged
        for merged in range(1, kv_heads + 1)
        if kv_heads % merged == 0 and (head_dim * merged) % reduction == 0
        if _rotates_evenly(config, head_dim * merged // reduction)
    ]
    if not fitting:
        raise ValueError(
            f"reduction must leave whole heads with an even number of rotated channels: {heads} heads of {head_dim} "
            f"({kv_heads} of keys) cannot be divided by {reduction}"
        )
    wide_enough = [merged for merged in fitting if head_dim * merged // reduction >= min_head_dim]
    merged = wide_enough[0] if wide_enough else fitting[-1]
    small.num_attention_heads = heads // merged
    if getattr(config, "num_key_value_heads", None):
        small.num_key_value_heads = kv_heads // merged
    if getattr(config, "head_dim", None):
        small.head_dim = head_dim * merged // reduction
    if getattr(config, "query_pre_attn_scalar", None):
        # a constant of the logit's scale, whole in some configurations
        small.query_pre_attn_scalar = max(1, round(config.query_pre_attn_scalar * merged / reduction))
    depth = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == depth and depth > 1:
            setattr(small, name, [value[i] for i in layers])
    small.num_hidden_layers = len(layers)
    # The side has no table: it is fed by the backbone's embeddings.
    small.vocab_size = 1
    small.bos_token_id = small.eos_token_id = None
    small.pad_token_id = None if config.pad_token_id is None else 0
    return small


def rotated_channels(config: Any, head_dim: int) -> int:
    """How many channels of a head are turned by rotary encoding; 0 for models without it."""
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return 0
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return int(head_dim * (nested[0] if nested else rope).get("partial_rotary_factor", 1.0))


def _rotates_evenly(config: Any, head_dim: int) -> bool:
    return rotated_channels(config, head_dim) % 2 == 0 and (
        rotated_channels(config, head_dim) > 0 or not getattr(config, "rope_parameters", None)
    )


def build_blocks(stack: Stack, config: Any, small: Any, seed: int) -> Any:
    """A host base model with the narrow configuration, drawn from ``seed``; tables and pooler are taken out.

    Raises:
        UnsupportedArchitecture: the host's class does not build such blocks, their matrices are not the backbone's
            divided by r, or something beside them has weights.
    """
    kind: Any = type(stack.base)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            side: Any = kind(small)
            with torch.device("meta"):
                wide = find_blocks(kind(copy.deepcopy(config))).blocks
        built = find_blocks(side)
    except UnsupportedArchitecture:
        raise
    except Exception as error:
        raise UnsupportedArchitecture(f"{kind.__name__} cannot be built with narrow blocks: {error}") from error
    reduction = config.hidden_size // small.hidden_size
    shapes = dict(wide[0].named_parameters())
    for name, parameter in built.blocks[0].named_parameters():
        expected = [size // reduction for size in shapes[name].shape]
        if parameter.ndim > 1 and list(parameter.shape) != expected:
            raise UnsupportedArchitecture(
                f"{built.name}.0.{name} must shrink by {reduction} on all sides for a ladder, but goes from "
                f"{tuple(shapes[name].shape)} to {tuple(parameter.shape)}: {kind.__name__} is not supported"
            )
    before, _ = built.norms
    for name, module in list(side.named_modules()):
        if isinstance(module, nn.Embedding) and not name.startswith(f"{built.name}."):
            _replace(side, name, _NoTable(small.hidden_size))
        elif module is before:
            _replace(side, name, nn.Identity())
    if isinstance(getattr(side, "pooler", None), nn.Module):
        side.pooler = None
    kept = {id(p) for module in (*built.blocks, built.norms[1]) if module is not None for p in module.parameters()}
    for name, parameter in side.named_parameters():
        if id(parameter) not in kept:
            raise UnsupportedArchitecture(
                f"{kind.__name__} has {name} outside its blocks and final norm, which a ladder has no place for"
            )
    return side


class _NoTable(nn.Module):
    """Stands where a base model looks up tokens or positions, which the side has none of."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # A buffer, so that it follows the side to its dtype and device.
        self.nothing = nn.Buffer(torch.zeros(width), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.nothing.expand(*ids.shape, -1)


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
