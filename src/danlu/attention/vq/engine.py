"""Softmax attention to quantised keys in linear time: old tokens are one count and one mean value per code.

A block of queries sees, in one softmax, the codes (with the logarithm of their counts), the window of the last tokens
before the block, and the block itself. What leaves the window is folded into counts and means. The result is exactly
softmax attention to the quantised keys, whatever the block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from danlu.attention.linear.inputs import check_inputs, widen
from danlu.attention.vq.codebook import look_up, nearest_codes
from danlu.positions.rotary import Rotary


class VQState(NamedTuple):
    """What attention to quantised keys remembers; its size does not depend on the length.

    Attributes:
        counts: (batch, kv_heads, codes) int64, tokens per code that have left the window.
        means: (batch, kv_heads, codes, value_dim) float32 or float64, their mean value.
        codes: (batch, kv_heads, window) int64, codes of the last tokens, at most one block. They are of the codebook of
            that time: decode with a codebook that stands still.
        values: (batch, kv_heads, window, value_dim).
        far_segment: (batch,) int64, document of the counts; None where every token was real and of one document.
        segments: (batch, window) int64, document of the tokens in the window, -1 for padding; None like that.
    """

    counts: Tensor
    means: Tensor
    codes: Tensor
    values: Tensor
    far_segment: Tensor | None = None
    segments: Tensor | None = None


def vq_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codebook: Tensor,
    *,
    block: int = 256,
    bias: Tensor | None = None,
    rotary: Rotary | None = None,
    mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    state: VQState | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, VQState]:
    """Causal softmax attention to quantised keys, in time and memory linear in the length.

    Equal to ``softmax(scale q C[z]^T + bias) v`` over all earlier tokens, for every ``block``. Gradients reach the keys
    of the block and of the window before it straight through the quantisation; counts and mean values are constants,
    and so is a given ``state``. The codebook gets no gradient.

    Args:
        q: (batch, heads, length, dim).
        k: (batch, kv_heads, length, dim); kv_heads divides heads.
        v: (batch, kv_heads, length, value_dim).
        codebook: (kv_heads, codes, dim), in the space of ``k``.
        block: tokens that are worked on at once, and the window before them, >= 1.
        bias: (heads, reach + 1) added to the logits at distances 0 to reach, reach <= block; distances count real
            tokens. Older tokens have no bias.
        rotary: rotates queries and quantised keys to their true distance up to ``block``; all older tokens stand at the
            distance ``block`` (ReRoPE), so that one code serves them all. Keys and codebook come unrotated. Distances
            count real tokens.
        mask: (batch, length) bool, True = real token; others are seen by no real token.
        segment_ids: (batch, length) integers >= 0; a change starts a new document that does not see the one before.
        state: of an earlier call with the same block, to go on from.
        scale: of the logits; default dim ** -0.5.

    Returns:
        Output (batch, heads, length, value_dim) in the dtype of ``v``, the codes (batch, kv_heads, length) of the keys,
        and the state after the last token, without history.

    Raises:
        ValueError: shapes disagree, block < 1, or the bias reaches beyond a block.

    Source: Scientific Spaces archive 9844; arXiv:2309.16354
    """
    check_inputs(q, k, v, mask, segment_ids, "block", block)
    _check(codebook, bias, q.shape[1], k, block)
    batch, kv_heads, length = k.shape[:3]
    codebook = codebook.detach().to(widen(k).dtype)
    grouped = q.unflatten(1, (kv_heads, -1))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    past = _start(k, v, codebook.shape[1]) if state is None else state
    segments = _segments(k, mask, segment_ids, past)
    if segments is not None and past.segments is None:
        past = past._replace(
            far_segment=segments.new_zeros(batch), segments=segments.new_zeros(batch, past.codes.shape[-1])
        )
    window = look_up(past.codes, codebook)
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *(() if bias is None else (bias,))))
    out = v.new_empty(*grouped.shape[:3], 0 if training else length, v.shape[-1])
    pieces: list[Tensor] = []
    all_codes = k.new_empty((batch, kv_heads, length), dtype=torch.int64)
    # a bias and angles that all blocks share are made once
    shared: dict[tuple[int, ...], Tensor] = {}
    angles: dict[int, tuple[Tensor, ...]] = {}
    for start in range(0, length, block):
        rows = slice(start, min(start + block, length))
        keys, values = k[:, :, rows], v[:, :, rows]
        codes = nearest_codes(keys, codebook)
        all_codes[:, :, rows] = codes
        # the key's own part is exactly zero and carries the gradient
        quantised = look_up(codes, codebook) + (widen(keys) - widen(keys).detach())
        own = None if segments is None else segments[:, rows]
        places = _places(past, own, values.shape[2])
        added = None
        if bias is not None:
            key = (*places.shape, past.codes.shape[2])
            added = shared[key] if places.ndim == 1 and key in shared else _bias(bias, places, past.codes)
            shared[key] = added
        turn = None
        if rotary is not None:
            found = angles.get(places.shape[0]) if places.ndim == 1 else None
            found = _angles(rotary, places, block, codebook.dtype) if found is None else found
            if places.ndim == 1:
                angles[places.shape[0]] = found
            turn = rotary, block, found
        queries = grouped[..., rows, :] * scale
        arguments = (queries, window, quantised, values, own, past, codebook, added, places, turn)
        if training:
            pieces.append(checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            out[..., rows, :] = _attend(*arguments)
        past, window = _fold(past, window, quantised, codes, values, own, block)
    whole = torch.cat([out, *pieces], -2) if training else out
    return whole.flatten(1, 2), all_codes, past._replace(values=past.values.detach())


def _attend(
    q: Tensor,
    window: Tensor,
    own: Tensor,
    values: Tensor,
    segments: Tensor | None,
    past: VQState,
    codebook: Tensor,
    bias: Tensor | None,
    places: Tensor,
    turn: tuple[Rotary, int, tuple[Tensor, ...]] | None,
) -> Tensor:
    """One softmax over codes, window and block; q is (batch, kv_heads, group, rows, dim)."""
    rows, width = own.shape[2], window.shape[2]
    far = codebook.shape[1]
    codes = codebook.expand(own.shape[0], -1, -1, -1)
    q = widen(q)
    if turn is None:
        weights = (q.flatten(2, 3) @ torch.cat((codes, window, own), 2).mT).unflatten(2, (-1, rows))
    else:
        rotary, reach, (cos, sin, far_cos, far_sin) = turn
        still = rotary.apply(q, far_cos, far_sin).flatten(2, 3) @ torch.cat((codes, window), 2).mT
        still = still.unflatten(2, (-1, rows))
        near = rotary.apply(torch.cat((window, own), 2), cos, sin)
        ahead = rotary.apply(q, cos[..., width:, :], sin[..., width:, :])
        turned = (ahead.flatten(2, 3) @ near.mT).unflatten(2, (-1, rows))
        # keys of the window may be out of reach already, those of the block never are
        close = places[..., width:, None] - places[..., None, :width] <= reach
        close = close if close.ndim == 2 else close[:, None, None]
        between = torch.where(close, turned[..., :width], still[..., far:])
        weights = torch.cat((still[..., :far], between, turned[..., width:]), -1)
    # log 0 = -inf: a code without tokens does not exist
    weights[..., :far] += past.counts.double().log().to(weights.dtype)[:, :, None, None]
    near = weights[..., far:]
    if bias is not None:
        near += bias
    later = torch.ones(rows, width + rows, dtype=torch.bool, device=q.device).triu(width + 1)
    if segments is None or past.segments is None or past.far_segment is None:
        near.masked_fill_(later, -torch.inf)
    else:
        seen = torch.cat((past.segments, segments), 1)
        other = later | (segments[:, :, None] != seen[:, None])
        near.masked_fill_(other[:, None, None], -torch.inf)
        weights[..., :far].masked_fill_((segments != past.far_segment[:, None])[:, None, None, :, None], -torch.inf)
    mixed = torch.cat((past.means, widen(past.values), widen(values)), 2)
    out = weights.softmax(-1).flatten(2, 3) @ mixed
    return out.unflatten(2, (-1, rows)).to(values.dtype)


def _fold(
    past: VQState, window: Tensor, own: Tensor, codes: Tensor, values: Tensor, segments: Tensor | None, block: int
) -> tuple[VQState, Tensor]:
    """Keep the last tokens of window and block, and add the rest to counts and means."""
    keys = torch.cat((window, own), 2)
    codes = torch.cat((past.codes, codes), 2)
    values = torch.cat((past.values, values), 2)
    leaving = max(0, keys.shape[2] - block)
    far, segment = past.far_segment, past.segments
    weight = None
    counts, means = past.counts, past.means
    if segments is not None and segment is not None and far is not None:
        segment = torch.cat((segment, segments), 1)
        if bool((segment < 0).any()):
            # padding leaves first, so that the window keeps the last real tokens
            order = (segment >= 0).to(torch.uint8).argsort(dim=1, stable=True)
            segment = segment.gather(1, order)
            order = order[:, None].expand_as(codes)
            codes = codes.gather(2, order)
            keys, values = (x.gather(2, order[..., None].expand_as(x)) for x in (keys, values))
        if leaving:
            # the only document that can reach from the counts to a later query is that of the last leaving token
            newest = segment[:, leaving - 1]
            newest = torch.where(newest < 0, far, newest)
            kept = newest == far
            far = newest
            counts = counts * kept[:, None, None]
            means = torch.where(kept[:, None, None, None], means, torch.zeros_like(means))
            weight = segment[:, :leaving] == far[:, None]
            segment = segment[:, leaving:]
    if leaving:
        with torch.no_grad():
            counts, means = _merge(counts, means, codes[:, :, :leaving], values[:, :, :leaving], weight)
    state = VQState(counts, means, codes[:, :, leaving:], values[:, :, leaving:], far, segment)
    return state, keys[:, :, leaving:]


def _merge(
    counts: Tensor, means: Tensor, codes: Tensor, values: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Means of both sets of tokens; means and not sums, so that the size of the numbers does not grow."""
    one_hot = means.new_zeros(*codes.shape, counts.shape[-1]).scatter_(-1, codes[..., None], 1.0)
    if weight is not None:
        one_hot = one_hot * weight[:, None, :, None].to(one_hot.dtype)
    new = one_hot.sum(2)
    total = counts + new.long()
    share = new.double().div(total.clamp_min(1)).to(means.dtype)[..., None]
    mean = (one_hot.mT @ widen(values).to(means.dtype)) / new.clamp_min(1.0)[..., None]
    return total, means + share * (mean - means)


def _places(past: VQState, segments: Tensor | None, rows: int) -> Tensor:
    """Place of each token of window and block, up to a constant: (width + rows,), or per row of the batch."""
    width = past.codes.shape[2]
    if segments is None or past.segments is None:
        return torch.arange(width + rows, device=past.codes.device)
    # with padding in between, a distance is the number of real tokens passed
    return (torch.cat((past.segments, segments), 1) >= 0).cumsum(1)


def _angles(rotary: Rotary, places: Tensor, reach: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Cosines and sines at the places of window and block, and of the one distance beyond."""
    return *rotary.angles(places, dtype=dtype), *rotary.angles(places.new_tensor([reach]), dtype=dtype)


def _bias(bias: Tensor, places: Tensor, codes: Tensor) -> Tensor:
    """Bias of window and block: (batch or 1, kv_heads, group, rows, width + rows)."""
    kv_heads, width = codes.shape[1:]
    table = torch.nn.functional.pad(widen(bias), (0, 1))
    distance = (places[..., width:, None] - places[..., None, :]).clamp(0, bias.shape[1])
    added = table[:, distance]
    return (added[:, None] if distance.ndim == 2 else added).transpose(0, 1).unflatten(1, (kv_heads, -1))


def _segments(k: Tensor, mask: Tensor | None, segment_ids: Tensor | None, past: VQState) -> Tensor | None:
    """Document of each token, -1 for padding; None where nothing needs to be told apart."""
    if mask is None and segment_ids is None and past.segments is None:
        return None
    # documents are numbered as they come, so that an id may be used again; the first goes on with that of the state
    first = k.new_zeros((k.shape[0], 1), dtype=torch.int64)
    if past.segments is not None and past.far_segment is not None:
        first = torch.cat((past.far_segment[:, None], past.segments), 1).amax(1, keepdim=True)
    numbers = first.expand(-1, k.shape[2])
    if segment_ids is not None:
        changed = torch.cat((first * 0, (segment_ids[:, 1:] != segment_ids[:, :-1]).long()), 1)
        numbers = first + changed.cumsum(1)[:, : k.shape[2]]
    return numbers if mask is None else numbers.masked_fill(~mask.bool(), -1)


def _start(k: Tensor, v: Tensor, codes: int) -> VQState:
    batch, heads = k.shape[:2]
    means = widen(v).new_zeros(batch, heads, codes, v.shape[-1])
    counts = torch.zeros(means.shape[:3], dtype=torch.int64, device=k.device)
    return VQState(counts, means, counts[..., :0], v[:, :, :0])


def _check(codebook: Tensor, bias: Tensor | None, heads: int, keys: Tensor, block: int) -> None:
    kv_heads, dim = keys.shape[1], keys.shape[3]
    if codebook.ndim != 3 or codebook.shape[0] != kv_heads or codebook.shape[2] != dim or not codebook.numel():
        raise ValueError(
            f"codebook must be (kv_heads, codes, dim) = ({kv_heads}, >= 1, {dim}), got {tuple(codebook.shape)}"
        )
    if bias is not None and (bias.ndim != 2 or bias.shape[0] != heads or not 1 <= bias.shape[1] <= block + 1):
        raise ValueError(
            f"bias must be (heads, reach + 1) = ({heads}, 1 to {block + 1}), as reach <= block; got {tuple(bias.shape)}"
        )
