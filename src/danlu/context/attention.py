"""The attention function and the mask function that ``extend`` registers with the host under the name ``danlu``.

Distances are counted in cache slots: a constant offset, such as left padding, cancels in every rotation. The mask
arrives in one of three forms. ``None``: plain causal attention. ``(batch, keys)``: causal, and each row's valid slots
are one run. ``(batch, 1, queries, keys)``: anything else (sliding windows, packed documents, static caches, holes),
which takes the dense route.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from danlu.attention.rerope import piecewise_attention
from danlu.attention.scale import log_n_factor
from danlu.attention.window import window_attention
from danlu.context.cache import LAYER, TurnedKeysLayer
from danlu.context.methods import LogN, Method, ReRoPE, Window
from danlu.context.turning import DynamicTables, Turner
from danlu.kernels.flash import attend
from danlu.kernels.regions import Part
from danlu.kernels.spans import attend_by_span

NAME = "danlu"
PLAN = "_danlu_plan"
CAUSAL, EVERYTHING = Part(), Part(nearest=None)


@dataclass(frozen=True)
class Plan:
    """What the attention function does in one layer.

    Attributes:
        pattern: ReRoPE, window or dynamic method of this layer, with all options filled in.
        window: the pattern's window in tokens, where it has one.
        near: the rotation that queries and keys still need here; ``None`` when they arrive fully turned.
        far_shift: angle position by which a far query is turned further.
        dynamic: rotations by factor, for dynamic patterns.
        log_n: query scale.
        trained_length: tokens the model was trained on.
    """

    pattern: Method | None = None
    window: int = 0
    near: Turner | None = None
    far_shift: float = 0.0
    dynamic: DynamicTables | None = field(default=None, repr=False)
    log_n: LogN | None = None
    trained_length: int = 0

    def scale_queries(self, query: Tensor, positions: Tensor) -> Tensor:
        """Multiply queries (batch, heads, length, dim) by log n at positions (length,) or (batch, length)."""
        if self.log_n is None:
            return query
        pattern, unit = self.pattern, self.log_n.trained_length or self.trained_length
        visible = self.window + pattern.sinks if isinstance(pattern, Window) else None
        factor = log_n_factor(positions, unit, clip=self.log_n.clip, window=visible)
        factor = factor[:, None] if factor.ndim == 2 else factor
        return (query * factor[..., None].to(query.device)).to(query.dtype)


def danlu_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Mask in the smallest of the three forms of this module; arguments as the host's own mask functions take them."""
    plain = mask_function is causal_mask_function and isinstance(q_offset, int) and q_offset + q_length == kv_length
    if plain and kv_offset == 0:
        if attention_mask is None:
            return None
        mask = attention_mask[:, :kv_length].bool()
        runs = spans(mask) if mask.shape[1] == kv_length else None
        if runs is not None:
            mask.danlu_spans = runs  # type: ignore[attr-defined]  # found once here, not once per layer
            return None if all(run == (0, kv_length) for run in runs) else mask
    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask=attention_mask, **kwargs
    )


def spans(mask: Tensor) -> list[tuple[int, int]] | None:
    """First and last-plus-one valid slot of each row of a (batch, keys) mask; ``None`` when a row has holes."""
    first = mask.int().argmax(-1)
    last = mask.shape[1] - mask.flip(-1).int().argmax(-1)
    if bool((mask.sum(-1) != last - first).any()):
        return None
    return list(zip(first.tolist(), last.tolist(), strict=True))


def danlu_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention under the layer's plan, called by the host; returns (batch, queries, heads, dim)."""
    plan: Plan | None = module.__dict__.get(PLAN)
    if plan is None:
        raise ValueError("attention implementation 'danlu' is set up by danlu.extend(model, ...): call that instead")
    if dropout:
        raise ValueError(
            f"attention dropout must be 0 under danlu.extend, got {dropout}: set config.attention_dropout = 0"
        )
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions must be False under danlu.extend: no attention matrix is ever formed")
    if is_causal is False:
        raise ValueError(f"{type(module).__name__} is not causal: danlu.extend changes causal attention only")
    options = {"scale": scaling, "softcap": softcap}
    if attention_mask is not None and attention_mask.ndim == 4:
        out, lse = _dense(plan, query, key, value, attention_mask[..., : key.shape[2]], options)
    elif attention_mask is None:
        layer = module.__dict__.get(LAYER)
        out, lse = _causal(plan, query, key, value, options, layer)
    else:
        runs = getattr(attention_mask, "danlu_spans", None) or spans(attention_mask) or []
        out, lse = attend_by_span(lambda q, k, v: _causal(plan, q, k, v, options), query, key, value, runs)
    if s_aux is not None:  # a sink is one more key without a value: it only takes its share of the weight
        out = out * torch.sigmoid(lse - s_aux.float().view(1, -1, 1))[..., None].to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def _causal(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: dict,
    layer: TurnedKeysLayer | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries are the last of the keys' positions, and all slots are valid."""
    length, total = query.shape[2], key.shape[2]
    query = plan.scale_queries(query, torch.arange(total - length, total, device=query.device))
    pattern = plan.pattern
    if plan.dynamic is not None:
        return _dynamic(plan.dynamic, query, key, value, options, layer)
    near = plan.near
    if isinstance(pattern, ReRoPE) and near is not None:
        near_length = min(total, length + plan.window - 1)
        out, lse = piecewise_attention(
            near.turn(query, near_length - length),
            near.turn(key[:, :, total - near_length :], 0),
            near.turn_by(query, plan.far_shift) if total > plan.window else query,
            key,
            value,
            window=plan.window,
            return_lse=True,
            **options,
        )
        return out, lse
    if near is not None:
        query, key = near.turn(query, total - length), near.turn(key, 0)
    if isinstance(pattern, Window):
        out, lse = window_attention(
            query, key, value, window=plan.window, sinks=pattern.sinks, return_lse=True, **options
        )
        return out, lse
    return attend([query], [key], value, [CAUSAL], **options)


def _dynamic(
    tables: DynamicTables, query: Tensor, key: Tensor, value: Tensor, options: dict, layer: TurnedKeysLayer | None
) -> tuple[Tensor, Tensor]:
    """One causal call per run of rows that share a factor."""
    length, total = query.shape[2], key.shape[2]
    outs, lses = [], []
    for start, stop, factor in tables.segments(total - length, total):
        turner = tables[factor]
        rows = query[:, :, start - (total - length) : stop - (total - length)]
        # a latent cache (MLA) holds less than the keys it expands to: a turned copy would undo the saving
        if layer is None or stop < total or key.requires_grad or layer.keys.shape != key.shape:
            turned = turner.turn(key[:, :, :stop], 0)
        else:
            turned = layer.turned(key, turner)
        out, lse = attend([turner.turn(rows, start)], [turned], value[:, :, :stop], [CAUSAL], **options)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _dense(plan: Plan, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: dict) -> tuple[Tensor, Tensor]:
    """Any mask (batch, 1, queries, keys), boolean or additive, at O(queries * keys) for the mask alone."""
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    visible = visible.any(1)
    slots = torch.arange(key.shape[2], device=key.device)
    last = (visible * slots).amax(-1)  # a causal row's own slot is the last one it sees
    seen = last - visible.int().argmax(-1)
    query = plan.scale_queries(query, seen)
    pattern, near = plan.pattern, plan.near
    if isinstance(pattern, ReRoPE) and near is not None:
        out, lse = piecewise_attention(
            near.turn_at(query, last),
            near.turn(key, 0),
            near.turn_by(query, plan.far_shift),
            key,
            value,
            window=plan.window,
            bias=mask,
            q_slots=last,
            return_lse=True,
            **options,
        )
        return out, lse
    if plan.dynamic is not None:
        return _dense_dynamic(plan.dynamic, query, key, value, mask, last, seen, options)
    if isinstance(pattern, Window):
        distance = last[:, :, None] - slots
        kept = distance < plan.window
        if pattern.sinks:
            kept = kept | (slots - (last - seen)[:, :, None] < pattern.sinks)
        kept = kept[:, None]
        mask = mask & kept if mask.dtype == torch.bool else mask.masked_fill(~kept, torch.finfo(mask.dtype).min)
    if near is not None:
        query, key = near.turn_at(query, last), near.turn(key, 0)
    return attend([query], [key], value, [EVERYTHING], bias=mask, **options)


def _dense_dynamic(
    tables: DynamicTables,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    last: Tensor,
    seen: Tensor,
    options: dict,
) -> tuple[Tensor, Tensor]:
    """Every factor that occurs, on all rows; each row keeps its own. Few factors occur: they grow geometrically."""
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    lse = torch.zeros(
        out.shape[:3], dtype=torch.float64 if out.dtype == torch.float64 else torch.float32, device=out.device
    )
    for low, high, factor in tables.segments(int(seen.min()), int(seen.max()) + 1):
        turner = tables[factor]
        part, part_lse = attend(
            [turner.turn_at(query, last)], [turner.turn(key, 0)], value, [EVERYTHING], bias=mask, **options
        )
        chosen = ((seen >= low) & (seen < high))[:, None]
        out = torch.where(chosen[..., None], part, out)
        lse = torch.where(chosen, part_lse, lse)
    return out, lse


AttentionInterface.register(NAME, danlu_attention)
AttentionMaskInterface.register(NAME, danlu_mask)
