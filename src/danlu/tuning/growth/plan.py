"""Which model a growth leads to, and which growths are refused."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from danlu.hosts.architecture import Architecture, Block, UnsupportedArchitecture, read_architecture
from danlu.tuning.growth.maps import ParameterMap
from danlu.tuning.growth.sizes import Sizes, layer_sources, rope_type, sizes_of
from danlu.tuning.growth.sources import Sources

#: Host families whose forward pass was read and tested; others may compute with a size that no matrix shows.
MODEL_TYPES = (
    "bert",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "granite",
    "llama",
    "mistral",
    "phi3",
    "qwen2",
    "qwen3",
    "roberta",
    "smollm3",
)


@dataclass(frozen=True)
class GrowthPlan:
    """The grown model without weights, the maps by parameter name, and the reasons why it is not exact."""

    model: Any
    maps: dict[str, ParameterMap]
    lossy: tuple[str, ...]


def plan_growth(
    model: Any, sizes: Sizes, *, placement: str | Sequence[int] = "even", widening: str = "auto"
) -> GrowthPlan:
    """Plan a growth; builds the grown model with parameters on the meta device.

    Args:
        model: a host model of one of ``MODEL_TYPES``.
        sizes: what it grows to, from ``resolve_sizes``.
        placement: where new blocks go, see :func:`danlu.tuning.growth.grow.grow`.
        widening: how the hidden size grows, see :func:`danlu.tuning.growth.grow.grow`.

    Raises:
        ValueError: the host refuses these sizes or builds something else for them, or a parameter is not understood.
    """
    if widening not in ("auto", "repeat", "pad"):
        raise ValueError(f"widening must be 'auto', 'repeat' or 'pad', got {widening!r}")
    old = read_growable(model)
    _check_rotation(old, sizes.head_dim / sizes_of(old).head_dim)
    layers = layer_sources(len(old.blocks), sizes.num_hidden_layers, placement)
    grown = _empty_model(model, _grown_config(old, sizes, layers))
    new = read_architecture(grown)
    for index, (source, _) in enumerate(layers):
        _check_same_layer(old.blocks[source], new.blocks[index])
    maker = Sources(old, new, sizes_of(old), sizes, layers, widening)
    parameters = dict(model.named_parameters())
    maps = {name: made for name, made in maker.maps() if made.source in parameters}
    if unknown := set(parameters) - {made.source for made in maps.values()}:
        raise UnsupportedArchitecture(f"model has a parameter that growth does not know: {min(unknown)}")
    built = {name: tuple(p.shape) for name, p in grown.named_parameters(remove_duplicate=False)}
    for name, made in maps.items():
        shape = made.shape(parameters[made.source].shape)
        if built.get(name) != shape:
            raise ValueError(f"{name} must grow to {shape}, but its host builds {built.get(name)} for these sizes")
    return GrowthPlan(grown, maps, tuple(maker.lossy))


def read_growable(model: Any) -> Architecture:
    """Read a model of a family that is known.

    Raises:
        UnsupportedArchitecture: of another family.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in MODEL_TYPES:
        raise UnsupportedArchitecture(f"model must be one of {', '.join(MODEL_TYPES)}, got {kind}")
    return read_architecture(model)


def _grown_config(arch: Architecture, sizes: Sizes, layers: list[tuple[int, bool]]) -> Any:
    config = copy.deepcopy(arch.config)
    config.hidden_size, config.num_hidden_layers = sizes.hidden_size, sizes.num_hidden_layers
    config.num_attention_heads = sizes.num_attention_heads
    setattr(config, "n_inner" if arch.family == "gpt2" else "intermediate_size", sizes.intermediate_size)
    if arch.family == "llama":
        config.num_key_value_heads, config.head_dim = sizes.num_key_value_heads, sizes.head_dim
    for name in ("layer_types", "no_rope_layers"):
        if isinstance(values := getattr(config, name, None), list):
            setattr(config, name, [values[source] for source, _ in layers])
    try:
        type(config).from_dict(config.to_dict())
    except Exception as error:
        reason = str(error).splitlines()[-1].strip().removeprefix("ValueError: ")
        raise ValueError(f"the host refuses a {config.model_type} of these sizes: {reason}") from error
    return config


def _empty_model(model: Any, config: Any) -> Any:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return type(model)(config)


def _check_same_layer(old: Block, new: Block) -> None:
    """A block keeps its window and its rotation wherever it comes to stand."""
    for name in ("sliding_window", "layer_type", "use_rope"):
        before, after = (getattr(block.attention.module, name, None) for block in (old, new))
        if before != after:
            raise ValueError(f"{new.name} would have {name} {after}, but the block that it copies has {before}")


def _check_rotation(old: Architecture, k: float) -> None:
    """Heads that are rotated grow by whole factors, and only where frequencies stand still."""
    kind = rope_type(old.config)
    if k != 1 and any(name.endswith("inv_freq") for name, _ in old.base.named_buffers()):
        head_dim = old.blocks[0].attention.head_dim
        if k != int(k):
            wanted = round(k * head_dim)
            raise ValueError(f"head_dim must be a multiple of {head_dim} where heads are rotated, got {wanted}")
        if "dynamic" in kind or "longrope" in kind:
            raise ValueError(
                f"head_dim cannot grow with {kind} RoPE: its frequencies change with the length of the text"
            )
