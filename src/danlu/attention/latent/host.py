"""The attention functions that ``absorb`` registers with the host, one for each implementation it stands in for.

A latent layer of the host calls its ``expand_kv`` on what the cache gives back and hands the result to the registered
attention function, together with rotated queries, the mask and the scale. Here ``expand_kv`` of a served layer is
`keep_latents`, so the function gets latents; it reads them as they are where that is cheaper, and otherwise expands
them by the layer's own method and calls the attention it stands in for. Rotary layouts, query latents, YaRN and other
query scales, norms and gates all happen before or after and need no case here.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from danlu.attention.latent.absorbed import absorbed_attention, prefers_absorbed
from danlu.attention.latent.cache import LatentLayer

PREFIX = "danlu_absorbed_"
BASES = {"sdpa": sdpa_mask, "eager": eager_mask}
PROBE = "_danlu_probe"
# Arguments under which the scores, or the cache, are not what this module computes with.
_FOREIGN = ("softcap", "position_bias", "cache")


def keep_latents(self: Any, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """Stand in for a layer's ``expand_kv``: expands only if another attention function than ours comes next."""
    if self.config._attn_implementation.startswith(PREFIX):
        return kv_nope, k_rot
    return type(self).expand_kv(self, kv_nope, k_rot)


class _GiveRoom:
    """Forward pre-hook of a latent layer: an empty cache layer of the plain kind becomes one that appends in place."""

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, Cache) or module.layer_idx > len(cache.layers):
            return
        if module.layer_idx == len(cache.layers) and cache.layer_class_to_replicate is DynamicLayer:
            cache.layers.append(LatentLayer())
        elif module.layer_idx < len(cache.layers):
            layer = cache.layers[module.layer_idx]
            if type(layer) is DynamicLayer and not layer.get_seq_length():
                cache.layers[module.layer_idx] = LatentLayer()


def serve(layer: Any) -> None:
    """Let a latent layer of the host hand its latents on, and append to its cache in place."""
    layer.__dict__["expand_kv"] = types.MethodType(keep_latents, layer)
    layer.register_forward_pre_hook(_GiveRoom(), with_kwargs=True)


def release(layer: Any) -> None:
    """Undo :func:`serve`."""
    del layer.__dict__["expand_kv"]
    for key, hook in list(layer._forward_pre_hooks.items()):
        if isinstance(hook, _GiveRoom):
            del layer._forward_pre_hooks[key]
            layer._forward_pre_hooks_with_kwargs.pop(key, None)


def is_served(module: nn.Module) -> bool:
    """Whether a layer hands its latents on."""
    return getattr(module.__dict__.get("expand_kv"), "__func__", None) is keep_latents


def attention(
    base: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    indices: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as the host calls it.

    Args:
        base: the implementation this stands in for.
        module: the layer.
        query: (batch, heads, queries, nope_dim + rope_dim).
        key: latents (batch, 1, keys, kv_rank) in a served layer, else keys.
        value: rotated shared keys (batch, 1, keys, rope_dim) in a served layer, else values.
        attention_mask: as the base takes it.
        scaling: factor of the scores.
        dropout: above 0 the base computes.
        indices: (batch, queries, selected) keys that a sparse layer's indexer chose.
        s_aux: (heads,) learnt sinks.
        kwargs: passed on to the base.

    Returns:
        (batch, queries, heads, value_dim), and the base's probabilities where the base computed.
    """
    served = is_served(module)
    record = module.__dict__.get(PROBE)
    ours = None
    if served and scaling is not None and not dropout and _is_plain(module, query, key, attention_mask, kwargs):
        if record is not None or _is_cheaper(module, query, key, value):
            ours = _absorbed(module, query, key, value, attention_mask, scaling, indices, s_aux)
            if record is None:
                return ours, None
    if served:
        key, value = type(module).expand_kv(module, key, value)
    if indices is not None:
        attention_mask = _select(attention_mask, indices, query, key.shape[2])
    if s_aux is not None:
        kwargs["s_aux"] = s_aux
    stock = _stock(base, module)(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if record is not None and ours is not None:
        record.append(relative_error(ours, stock[0]))
    return stock


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest entry; rows that are not finite in both are left out."""
    fine = torch.isfinite(got) & torch.isfinite(expected)
    difference = torch.where(fine, got - expected, 0).abs().max()
    return float(difference) / max(float(torch.where(fine, expected, 0).abs().max()), 1e-30)


def plain_weight(module: Any) -> Tensor | None:
    """The up-projection's weight, or None where its product is not simply ``x weight'``."""
    projection = module.kv_b_proj
    if getattr(projection, "bias", None) is not None or type(projection) is not nn.Linear:
        return None  # an adapter or a quantised matrix
    if projection._forward_hooks or projection._forward_pre_hooks or "_hf_hook" in projection.__dict__:
        return None
    weight = projection.weight
    return weight if type(weight) is nn.Parameter and weight.device.type != "meta" else None


def _stock(base: str, module: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if base == "eager":  # each model file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]


def _is_plain(module: Any, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether the absorbed form gives what the base would."""
    if any(kwargs.get(name) is not None for name in _FOREIGN):
        return False
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        return False
    if mask is None:
        if query.shape[2] > 1:  # the host leaves the mask out of a first prefill, where expanding is cheaper
            return False
    elif mask.ndim != 4 or mask.shape[-1] != key.shape[2]:
        return False
    weight = plain_weight(module)
    return weight is not None and weight.dtype == query.dtype == key.dtype and weight.device == query.device


def _is_cheaper(module: Any, query: Tensor, key: Tensor, value: Tensor) -> bool:
    queries, keys = query.shape[2], key.shape[2]
    rope = value.shape[3]
    nope = query.shape[3] - rope
    value_dim = module.kv_b_proj.weight.shape[0] // query.shape[1] - nope
    return prefers_absorbed(queries, keys, kv_rank=key.shape[3], nope_dim=nope, rope_dim=rope, value_dim=value_dim)


def _absorbed(
    module: Any,
    query: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    mask: Tensor | None,
    scaling: float,
    indices: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """The absorbed form, as (batch, queries, heads, value_dim)."""
    latent, k_rope = latent[:, 0], k_rope[:, 0]
    if indices is not None:
        if query.shape[2] == 1 and indices.shape[2] < latent.shape[1]:
            chosen = indices[:, 0].long()
            latent = latent.gather(1, chosen[..., None].expand(-1, -1, latent.shape[2]))
            k_rope = k_rope.gather(1, chosen[..., None].expand(-1, -1, k_rope.shape[2]))
            if mask is not None:
                mask = mask.expand(len(chosen), -1, -1, -1)
                mask = mask.gather(3, chosen[:, None, None].expand(*mask.shape[:3], -1))
        else:
            mask = _select(mask, indices, query, latent.shape[1])
    nope = query.shape[3] - k_rope.shape[2]
    q_nope, q_rope = query.split([nope, k_rope.shape[2]], -1)
    weight = module.kv_b_proj.weight.view(query.shape[1], -1, latent.shape[2])
    out = absorbed_attention(
        q_nope,
        q_rope,
        latent,
        k_rope,
        weight[:, :nope],
        weight[:, nope:],
        scaling,
        mask=mask,
        causal=False,
        sinks=sinks,
    )
    return out.transpose(1, 2).contiguous()


def _select(mask: Tensor | None, indices: Tensor, query: Tensor, keys: int) -> Tensor:
    """Fold an indexer's choice into the mask, as the host does for the implementations it knows by name."""
    chosen = torch.zeros(*indices.shape[:2], keys, dtype=torch.bool, device=query.device)
    chosen = chosen.scatter(-1, indices.long(), True)[:, None]
    if mask is None:
        return chosen
    if mask.dtype == torch.bool:
        return mask & chosen
    return mask.masked_fill(~chosen, torch.finfo(query.dtype).min)


for _base, _mask in BASES.items():
    AttentionInterface.register(PREFIX + _base, functools.partial(attention, _base))
    AttentionMaskInterface.register(PREFIX + _base, _mask)
