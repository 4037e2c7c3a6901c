"""Linear attention in chunks: matrix products inside a chunk, a state of fixed size between chunks.

The state keeps for each feature the largest logarithm so far and sums relative to it, so that exponential maps never
overflow. Inside a chunk the reference of a feature is the larger of that maximum and the chunk's first key: no later
key moves it, which makes the result causal to the last bit. Where a feature rises too far within one chunk the chunk is
halved, down to single tokens if need be; a single token is always safe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from danlu.attention.linear.feature_maps import FeatureMap
from danlu.attention.linear.inputs import check_inputs, widen

# Key factors reach exp(_RISE), query factors 1: their products stay finite in float32, summed over features and keys.
_RISE = 60.0
# Rows that a later key has pressed below this are computed again in shorter chunks.
_LEAST = 1e-20


class LinearState(NamedTuple):
    """What a causal pass remembers of its past: float32 (float64 for float64 inputs), independent of the length.

    Attributes:
        peak: (batch, kv_heads, features), the largest logarithm of each feature so far; -inf before any key.
        mass: (batch, kv_heads, features), sum of exp(log feature - peak) over keys.
        total: (batch, kv_heads, features, value_dim), sum of exp(log feature - peak) v over keys.
    """

    peak: Tensor
    mass: Tensor
    total: Tensor

    def detach(self) -> LinearState:
        """The same numbers without their history, for truncated back-propagation through time."""
        return LinearState(*(x.detach() for x in self))


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    *,
    causal: bool = True,
    chunk: int = 256,
    mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    state: LinearState | None = None,
    scale: float | None = None,
) -> tuple[Tensor, LinearState]:
    """Attention whose weights are sums over features, in time and memory linear in the length.

    Every ``chunk`` gives the same result up to rounding; 1 is the recurrent form. Memory beyond the output does not
    depend on the length; with gradients, one state per chunk is kept and the rest is computed again.

    Args:
        q: (batch, heads, length, dim).
        k: (batch, kv_heads, length, dim); kv_heads divides heads.
        v: (batch, kv_heads, length, value_dim).
        feature_map: gives the features.
        causal: a token sees itself and those before it; False: all tokens.
        chunk: tokens that are worked on at once, >= 1.
        mask: (batch, length) bool, True = real token; others are seen by nobody.
        segment_ids: (batch, length) integers; a change starts a new document that does not see the one before. Chunks
            are cut at every change in any row, so that many tiny documents are slow. Causal only.
        state: of an earlier call, to go on from; its document is that of the first token. Causal only.
        scale: of the logits q.k, split evenly between both; default dim ** -0.5 for maps that stand for softmax,
            and 1 for the others.

    Returns:
        Output (batch, heads, length, value_dim) in the dtype of ``v`` and the state after the last token. A row that
        sees no key is 0.

    Raises:
        ValueError: shapes disagree, chunk < 1, scale <= 0, or an argument that does not go with ``causal``.

    Source: Scientific Spaces archives 7546, 7921, 9862; arXiv:2006.16236; arXiv:2009.14794
    """
    check_inputs(q, k, v, mask, segment_ids, "chunk", chunk)
    if causal and feature_map.bidirectional_only:
        raise ValueError(f"causal must be False with {type(feature_map).__name__}, which normalises over all keys")
    if not causal and (state is not None or segment_ids is not None):
        raise ValueError("state and segment_ids must be None with causal=False; call once per document")
    factor = _root_of_scale(scale, feature_map, q.shape[-1])
    kv_heads, length = k.shape[1:3]
    grouped = q.unflatten(1, (kv_heads, -1))
    sums = _start(k, v, feature_map.features) if state is None else state
    changes = _changes(segment_ids)
    training = torch.is_grad_enabled() and any(
        x.requires_grad for x in (q, k, v, sums.mass, sums.total, *feature_map.parameters())
    )
    run = _recomputed if training else _now
    spans = _spans(length, chunk, changes)

    def part(start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        rows = slice(start, stop)
        valid = None if mask is None else mask[:, rows].bool()
        return grouped[..., rows, :], k[:, :, rows], v[:, :, rows], valid

    if not causal:
        for start, stop in spans:
            _, keys, values, valid = part(start, stop)
            sums = LinearState(*run(_collect, feature_map, factor, keys, values, valid, *sums))
    # autograd wants the pieces; without it they are written in place, so that only the output grows with the length
    pieces: list[Tensor] = []
    out = v.new_empty(*grouped.shape[:3], 0 if training else length, v.shape[-1])
    for start, stop in spans:
        queries, keys, values, valid = part(start, stop)
        if causal:
            if changes is not None and start and (fresh := changes[:, start]).any():
                sums = _forget(sums, fresh)
            rows, *rest = run(_advance, feature_map, factor, queries, keys, values, valid, *sums)
            sums = LinearState(*rest)
        else:
            rows = run(_read, feature_map, factor, queries, *sums)
        if training:
            pieces.append(rows.to(v.dtype))
        else:
            out[..., start:stop, :] = rows
    return torch.cat([out, *pieces], -2).flatten(1, 2) if training else out.flatten(1, 2), sums


def linear_attention_weights(
    q: Tensor, k: Tensor, feature_map: FeatureMap, *, causal: bool = True, scale: float | None = None
) -> Tensor:
    """The normalised weights themselves, to look at: the quadratic form, features one by one in the log domain.

    Args:
        q: (batch, heads, length, dim).
        k: (batch, kv_heads, length, dim).
        feature_map: gives the features.
        causal: as in :func:`linear_attention`.
        scale: there.

    Returns:
        (batch, heads, length, length), float32 or better; rows sum to 1.

    Raises:
        ValueError: as there.
    """
    check_inputs(q, k, k)
    if causal and feature_map.bidirectional_only:
        raise ValueError(f"causal must be False with {type(feature_map).__name__}, which normalises over all keys")
    factor = _root_of_scale(scale, feature_map, q.shape[-1])
    kv_heads, length = k.shape[1:3]
    a = feature_map.log_query(widen(q).unflatten(1, (kv_heads, -1)).flatten(2, 3) * factor)
    a = a.unflatten(2, (-1, length))
    b = feature_map.log_key(widen(k) * factor)
    if feature_map.bidirectional_only:
        b = b.log_softmax(-2)
    logits = a.new_full((*a.shape[:-1], length), -torch.inf)
    for y in range(feature_map.features):
        logits = torch.logaddexp(logits, a[..., y, None] + b[:, :, None, None, :, y])
    if causal:
        later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(later, -torch.inf)
    return logits.softmax(-1).flatten(1, 2)


def _now(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _advance(
    feature_map: FeatureMap,
    factor: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    peak: Tensor,
    mass: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Causal attention of one chunk: q (batch, kv_heads, group, length, dim); gives its output and the next sums."""
    groups = q.shape[2]
    a = feature_map.log_query(widen(q).flatten(2, 3) * factor).unflatten(2, (groups, -1))
    b = feature_map.log_key(widen(k) * factor)
    if valid is not None:
        b = b.masked_fill(~valid[:, None, :, None], -torch.inf)
    return _chunk(a, b, widen(v), valid, LinearState(peak, mass, total))


def _chunk(
    a: Tensor, b: Tensor, v: Tensor, valid: Tensor | None, sums: LinearState
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    length = b.shape[-2]
    with torch.no_grad():
        top = b.amax(-2)
        first = b[:, :, 0]
        if valid is not None:
            at = valid.to(torch.uint8).argmax(-1)[:, None, None, None].expand(-1, *b.shape[1:2], 1, b.shape[-1])
            first = b.gather(2, at)[:, :, 0]
        reference = torch.maximum(sums.peak, first)
        # a feature that is zero at first (codes) cannot have its reference from the past: see the check below
        reference = torch.where(reference == -torch.inf, top, reference)
        known = reference > -torch.inf
        finite = torch.where(known, reference, torch.zeros_like(reference))
        lifted = a.detach() + reference[:, :, None, None]
        stable = lifted.amax(-1, keepdim=True)
        stable = torch.where(stable > -torch.inf, stable, torch.zeros_like(stable))
        safe = length == 1 or bool(((top - finite) <= _RISE).all())
    if safe:
        weight_q = (a + reference[:, :, None, None] - stable).exp().flatten(2, 3)
        weight_k = (b - finite[:, :, None]).exp()
        decay = (sums.peak - finite).exp()
        mass, total = sums.mass * decay, sums.total * decay[..., None]
        local = (weight_q @ weight_k.mT).unflatten(2, (-1, length)).tril().flatten(2, 3)
        norm = local.sum(-1) + (weight_q @ mass[..., None])[..., 0]
        if length == 1 or bool(((norm.detach() >= _LEAST) | ~_sees(valid, norm, mass.detach(), length)).all()):
            out = (local @ v + weight_q @ total) / torch.where(norm > 0, norm, torch.ones_like(norm))[..., None]
            peak = torch.maximum(sums.peak, top)
            back = torch.where(known, (finite - peak).exp(), torch.zeros_like(peak))
            mass = back * (mass + weight_k.sum(-2))
            total = back[..., None] * (total + weight_k.mT @ v)
            return out.unflatten(2, (-1, length)), peak, mass, total
    half = length // 2
    outs = []
    for rows in (slice(0, half), slice(half, length)):
        part = None if valid is None else valid[:, rows]
        out, *rest = _chunk(a[..., rows, :], b[..., rows, :], v[..., rows, :], part, sums)
        sums = LinearState(*rest)
        outs.append(out)
    return torch.cat(outs, -2), *sums


def _sees(valid: Tensor | None, norm: Tensor, mass: Tensor, length: int) -> Tensor:
    """Which rows have a key at all."""
    if valid is None:
        return torch.ones_like(norm, dtype=torch.bool)
    seen = valid.cumsum(-1)[:, None] > 0
    seen = seen | (mass.sum(-1) > 0)[..., None]
    return seen.repeat(1, 1, norm.shape[-1] // length)


def _collect(
    feature_map: FeatureMap,
    factor: float,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    peak: Tensor,
    mass: Tensor,
    total: Tensor,
) -> LinearState:
    b = feature_map.log_key(widen(k) * factor)
    if valid is not None:
        b = b.masked_fill(~valid[:, None, :, None], -torch.inf)
    with torch.no_grad():
        new = torch.maximum(peak, b.amax(-2))
        finite = torch.where(new > -torch.inf, new, torch.zeros_like(new))
        decay = (peak - finite).exp()
    weight = (b - finite[:, :, None]).exp()
    return LinearState(new, mass * decay + weight.sum(-2), total * decay[..., None] + weight.mT @ widen(v))


def _read(feature_map: FeatureMap, factor: float, q: Tensor, peak: Tensor, mass: Tensor, total: Tensor) -> Tensor:
    """Answers to queries (batch, kv_heads, group, length, dim) from complete sums."""
    a = feature_map.log_query(widen(q).flatten(2, 3) * factor)
    filled = torch.where(mass > 0, mass, torch.ones_like(mass))
    # a feature that is normalised over the keys has total mass 1, and without keys it has none
    level = (
        torch.where(mass > 0, torch.zeros_like(peak), peak) if feature_map.bidirectional_only else filled.log() + peak
    )
    logits = a + level[:, :, None]
    with torch.no_grad():
        stable = logits.amax(-1, keepdim=True)
        stable = torch.where(stable > -torch.inf, stable, torch.zeros_like(stable))
    weight = (logits - stable).exp()
    norm = weight.sum(-1, keepdim=True)
    mean = total / filled[..., None]
    return ((weight / torch.where(norm > 0, norm, torch.ones_like(norm))) @ mean).unflatten(2, (q.shape[2], -1))


def _start(k: Tensor, v: Tensor, features: int) -> LinearState:
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    peak = k.new_full((*k.shape[:2], features), -torch.inf, dtype=dtype)
    return LinearState(peak, torch.zeros_like(peak), peak.new_zeros(*peak.shape, v.shape[-1]))


def _forget(sums: LinearState, rows: Tensor) -> LinearState:
    """Start anew in the rows (batch,) that are True."""
    rows = rows[:, None, None]
    return LinearState(
        sums.peak.masked_fill(rows, -torch.inf),
        sums.mass.masked_fill(rows, 0.0),
        sums.total.masked_fill(rows[..., None], 0.0),
    )


def _changes(segment_ids: Tensor | None) -> Tensor | None:
    """(batch, length), True at the first token of a document other than the first."""
    if segment_ids is None:
        return None
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    return torch.cat((torch.zeros_like(segment_ids[:, :1], dtype=torch.bool), changed), 1)


def _spans(length: int, chunk: int, changes: Tensor | None) -> list[tuple[int, int]]:
    edges = set(range(0, length, chunk)) | {length}
    if changes is not None:
        edges |= set(changes.any(0).nonzero()[:, 0].tolist())
    ordered = sorted(edges)
    return list(zip(ordered[:-1], ordered[1:], strict=True))


def _root_of_scale(scale: float | None, feature_map: FeatureMap, dim: int) -> float:
    if scale is None:
        scale = dim**-0.5 if feature_map.estimates_softmax else 1.0
    if not scale > 0:
        raise ValueError(f"scale must be > 0, got {scale}")
    return float(scale) ** 0.5
