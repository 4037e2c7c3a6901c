"""What each layer of a model caches: numbers per token, how many tokens, states that do not grow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerCache:
    """What one layer caches.

    Args:
        kind: ``attention``, ``latent``, ``state`` (a fixed number, whatever the length), ``mixed``, or ``none``.
        width: numbers per token.
        tokens: most tokens that are kept; None: all.
        state: numbers that do not grow with the length; None: there is a state whose size is not known here.
    """

    kind: str
    width: int
    tokens: int | None = None
    state: int | None = 0

    def numbers(self, length: int) -> int:
        """Numbers in the cache after ``length`` tokens; an unknown state counts as 0."""
        return self.width * (length if self.tokens is None else min(length, self.tokens)) + (self.state or 0)


def cache_layers(config: Any) -> list[LayerCache]:
    """What each layer of a host model caches, in the host library's own dynamic cache.

    Args:
        config: configuration of a decoder (the text part of a multimodal one).

    Raises:
        ValueError: a cache of a kind that is not known here, or sizes that the configuration does not name.
    """
    if hasattr(config, "cache_elements"):
        return list(config.cache_elements())
    from transformers import DynamicCache

    try:
        made = DynamicCache(config=config).layers
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"the host library makes no cache for {config.model_type}: {error}") from error
    own = getattr(config, "per_layer_config", None) or [config] * len(made)
    found = [_layer_cache(layer, one) for layer, one in zip(made, own, strict=True)]
    if config.model_type == "danlu":  # its mixers replace the layers that the host's cache makes for it
        for index, mixer in enumerate(config.mixers):
            if mixer == "latent":
                found[index] = LayerCache("latent", config.kv_rank + config.rope_head_dim)
            elif mixer in ("linear", "vq", "recurrent"):
                found[index] = LayerCache("state", 0, None, None)
    return found


def _layer_cache(layer: Any, config: Any) -> LayerCache:
    kind = type(layer).__name__
    if kind == "DummyLayer":
        return LayerCache("none", 0)
    has_state = hasattr(layer, "conv_states")
    has_tokens = hasattr(layer, "get_mask_sizes") and kind != "LinearAttentionLayer"
    state = _state_numbers(config) if has_state else 0
    if not has_tokens:
        return LayerCache("state", 0, None, state)
    window = layer.sliding_window if getattr(layer, "is_sliding", False) else None
    tokens = None if window is None else max(1, window - 1)
    rank = getattr(config, "kv_lora_rank", None)
    width = rank + config.qk_rope_head_dim if rank else sum(_key_value_sizes(config))
    if hasattr(layer, "indexer_keys"):
        width += getattr(config, "index_head_dim", 0)
    return LayerCache("mixed" if has_state else "latent" if rank else "attention", width, tokens, state)


def attention_heads(config: Any) -> tuple[int, int, int]:
    """Query heads, key heads, channels per head."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        raise ValueError(f"{config.model_type} has no attention heads in its configuration: it has no attention cache")
    heads = int(max(heads) if isinstance(heads, list | tuple) else heads)
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        groups = 1
    else:
        named = (getattr(config, name, None) for name in ("num_key_value_heads", "num_kv_heads"))
        groups = next((int(value) for value in named if isinstance(value, int) and value), heads)
    return heads, groups, int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def _key_value_sizes(config: Any) -> tuple[int, int]:
    """Numbers per token of keys and of values."""
    _, groups, dim = attention_heads(config)
    keys, values = (getattr(config, name, None) or dim for name in ("qk_head_dim", "v_head_dim"))
    return groups * keys, groups * values


def _state_numbers(config: Any) -> int | None:
    """Numbers in the state of a gated delta layer (Qwen3-Next and kin); None for other kinds."""
    names = ("key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads", "conv_kernel_dim")
    sizes = [getattr(config, f"linear_{name}", None) for name in names]
    if None in sizes:
        return None
    key, value, key_heads, value_heads, kernel = (int(size) for size in sizes if size is not None)
    return value_heads * key * value + kernel * (2 * key_heads * key + value_heads * value)
