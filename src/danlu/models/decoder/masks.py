"""Masks of the decoder's layers, by the host's mask functions where the host knows the layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.masking_utils import causal_mask_function as _back
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)

from danlu.attention.masks import anticausal, first_real, make_mask, prefix
from danlu.models.decoder.config import PLAIN, DanluConfig


def mask_name(config: DanluConfig, layer: int) -> str:
    """Name of a layer's mask: the host's layer type, or a kind for what the host does not know.

    Args:
        config: of the decoder.
        layer: 0-based.
    """
    kind = config.mask
    if kind == "mixed_layers":
        kind = "anticausal" if layer % 2 else "causal"
    if config.mixers[layer] not in PLAIN:
        return f"own {kind}"
    if config.mask == "mixed_layers":
        return kind
    return config.layer_types[layer]


def layer_masks(
    config: DanluConfig,
    x: Tensor,
    mask: Any,
    positions: Tensor,
    cache: Any,
    past: int,
    prefix_lengths: Tensor | None,
) -> dict[str, Any]:
    """Masks by the names of :func:`mask_name`, each made only if a layer wants it.

    Args:
        config: of the decoder.
        x: (batch, length, hidden).
        mask: (batch, past + length) of real tokens, or what the host's ``generate`` has made, or None.
        positions: (batch or 1, length).
        cache: the host's, or None.
        past: tokens in it.
        prefix_lengths: (batch,), or None.

    Raises:
        ValueError: prefix lengths that are missing, unwanted, or reach past the first call; a mask that is not of real
            tokens where a mixer needs that.
    """
    kind = config.mask
    if prefix_lengths is not None and kind != "prefix":
        raise ValueError(f"prefix_lengths is for mask 'prefix', got it with mask {kind!r}")
    padding = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
    if kind == "prefix" and prefix_lengths is None and not past:
        raise ValueError("prefix_lengths must be given with mask 'prefix': how many tokens of each row are input?")
    if prefix_lengths is not None and past:
        # a prefix token sees the whole prefix, so that all of it must come in one call
        if bool((first_real(padding, prefix_lengths) + prefix_lengths > past).any()):
            raise ValueError(f"prefix_lengths must end within the first call, {past} tokens are in the cache")
        prefix_lengths = None
    names = {mask_name(config, layer) for layer in range(config.num_hidden_layers)}
    made: dict[str, Any] = {}
    for name in names:
        if name.startswith("own "):
            if mask is not None and padding is None:
                raise ValueError("attention_mask must be (batch, past + length) for mixers with a state of their own")
            made[name] = _dense(name.removeprefix("own "), config, x, padding, past, prefix_lengths)
    if isinstance(mask, dict):
        return made | mask
    common: dict[str, Any] = {"config": config, "inputs_embeds": x, "attention_mask": mask}
    if kind in ("mixed_heads", "mixed_layers"):
        back, ahead = (create_bidirectional_mask(**common, and_mask_function=f) for f in (_back, anticausal))
        return made | {"full_attention": (back, ahead), "causal": back, "anticausal": ahead}
    if kind == "bidirectional":
        return made | {"full_attention": create_bidirectional_mask(**common)}
    common |= {"past_key_values": cache, "position_ids": positions}
    if "full_attention" in names:
        if prefix_lengths is not None:
            common["or_mask_function"] = prefix(first_real(padding, prefix_lengths), prefix_lengths)
        made["full_attention"] = create_causal_mask(**common)
    if "sliding_attention" in names:
        made["sliding_attention"] = create_sliding_window_causal_mask(**common)
    return made


def _dense(
    kind: Any, config: DanluConfig, x: Tensor, padding: Tensor | None, past: int, prefix_lengths: Tensor | None
) -> Tensor | None:
    if kind == "causal" or (kind == "prefix" and prefix_lengths is None):
        return None if padding is None else padding.bool()
    options: dict[str, Any] = {"padding": padding, "prefix_lengths": prefix_lengths, "device": x.device}
    return make_mask(kind, x.shape[1], past=past, heads=config.num_attention_heads, **options)
