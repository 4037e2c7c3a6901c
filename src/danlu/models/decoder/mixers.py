"""Names of token mixers, the modules they stand for, and the states that these keep in a host's cache."""

from __future__ import annotations

from typing import Any

from torch import nn

from danlu.models.decoder.attention import DanluAttention, logit_scale
from danlu.models.decoder.config import PLAIN, DanluConfig


def build_mixer(config: DanluConfig, layer_idx: int) -> nn.Module:
    """The module that mixes tokens in one layer."""
    kind = config.mixers[layer_idx]
    if kind in PLAIN:
        return DanluAttention(config, layer_idx)
    return _BUILDERS[kind](config)


def keeps_own_state(mixer: nn.Module) -> bool:
    """Whether a mixer puts a state of its own into the cache, in place of keys and values."""
    return hasattr(mixer, "make_cache")


def fit_cache(cache: Any, mixers: list[Any]) -> None:
    """Put the states of mixers into an empty cache that the host made for plain attention; a used one is left alone.

    Raises:
        ValueError: the cache already holds keys where a mixer needs a state of its own, or is of fixed size.
    """
    from transformers.cache_utils import DynamicLayer, StaticLayer

    for i, mixer in enumerate(mixers):
        if i == len(cache.layers):
            cache.layers.append((cache.layer_class_to_replicate or DynamicLayer)())
        if not keeps_own_state(mixer):
            continue
        layer, fresh = cache.layers[i], mixer.make_cache()
        if isinstance(layer, type(fresh)):
            continue
        if isinstance(layer, StaticLayer):
            raise ValueError(
                f"cache_implementation='static' must not be used with mixer {type(mixer).__name__} (layer {i}), "
                "which keeps a state of its own; leave it out"
            )
        if layer.get_seq_length():
            raise ValueError(
                f"past_key_values holds {layer.get_seq_length()} tokens in layer {i} that {type(mixer).__name__} did "
                "not put there; start from an empty DynamicCache()"
            )
        cache.layers[i] = fresh


def _latent(config: DanluConfig) -> nn.Module:
    from danlu.attention.latent.layer import MultiheadLatentAttention

    return MultiheadLatentAttention(
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        kv_rank=config.kv_rank,
        q_rank=config.q_rank,
        nope_dim=config.head_dim,
        rope_dim=config.rope_head_dim,
        value_dim=config.head_dim,
        rope_base=config.rope_parameters["rope_theta"],
        eps=config.rms_norm_eps,
        bias=config.attention_bias,
        scale=logit_scale(config, config.head_dim + config.rope_head_dim),
    )


def _linear(config: DanluConfig) -> nn.Module:
    from danlu.attention.linear.layer import LinearAttention

    own: dict[str, Any] = {
        "feature_map": config.feature_map,
        "features": config.num_features,
        "chunk": config.block_size,
    }
    return LinearAttention(**_heads(config), **own)


def _vq(config: DanluConfig) -> nn.Module:
    from danlu.attention.vq.layer import VQAttention

    return VQAttention(**_heads(config), codes=config.num_codes, block=config.block_size)


def _heads(config: DanluConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rope_base": config.rope_parameters["rope_theta"],
    }


def _recurrent(config: DanluConfig) -> nn.Module:
    from danlu.attention.recurrent.lru import LRU

    return LRU(
        hidden_size=config.hidden_size,
        state_size=config.state_size,
        radius_min=config.radius_min,
        radius_max=config.radius_max,
    )


_BUILDERS = {"latent": _latent, "linear": _linear, "vq": _vq, "recurrent": _recurrent}
