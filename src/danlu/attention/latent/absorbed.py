"""Latent attention in its absorbed form: every head reads the same cached latent, nothing is expanded."""

from __future__ import annotations

import torch
from torch import Tensor

from danlu.kernels.flash import merge

# At most this many scores at once (16 MiB of float32), and at most this many slots widened to float32 at once.
_SCORES = 1 << 22
_WIDENED = 1024


def prefers_absorbed(queries: int, keys: int, *, kv_rank: int, nope_dim: int, rope_dim: int, value_dim: int) -> bool:
    """Tell which form of latent attention multiplies less for a block of new tokens over a cache.

    Per head, expanding the latents costs `keys * kv_rank * (nope_dim + value_dim)` once, absorbing the up-projections
    costs the same per query instead of per key, and then each pair of query and key costs `2 * kv_rank + rope_dim`
    in absorbed form against `nope_dim + rope_dim + value_dim` in expanded form. Where the cache is much longer than the
    block, that is `queries * (2 * kv_rank - nope_dim - value_dim) < kv_rank * (nope_dim + value_dim)`: up to 170 new
    tokens in DeepSeek-V2 and V3. With `keys == queries` (training, a first prefill) the expanded form wins unless the
    latent is very small.

    Args:
        queries: new tokens per row, >= 1.
        keys: tokens to attend to per row, the new ones included.
        kv_rank: width of the latent.
        nope_dim: width of a head's key without positions.
        rope_dim: width of the shared rotary key; both forms read it, so it does not decide.
        value_dim: width of a head's value.

    Returns:
        True where the absorbed form is cheaper.

    Source: Scientific Spaces archive 10091; arXiv:2405.04434.
    """
    up = kv_rank * (nope_dim + value_dim)
    absorbed = queries * keys * (2 * kv_rank + rope_dim) + queries * up
    expanded = queries * keys * (nope_dim + rope_dim + value_dim) + keys * up
    return absorbed < expanded


def absorbed_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_key: Tensor,
    w_value: Tensor,
    scale: float,
    *,
    mask: Tensor | None = None,
    causal: bool = True,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute multi-head latent attention with the up-projections moved to the query and to the output.

    The scores are `(q_nope w_key) . latent + q_rope . k_rope`, the output is `(P latent) w_value'`: an attention with
    one key, one value and `heads * queries` rows. The key projection is applied to the query, never merged with the
    query projection (that would be a larger matrix, more work and one more rounding), and nothing of size heads x keys
    x head width is ever made. Long caches are read in stretches, merged by their log-sum-exp, so that at most 16 MiB of
    scores exist. Scores, softmax and sums are float32 (float64 for float64), which reads 16-bit caches a stretch at a
    time. Equal to the expanded form up to rounding; differentiable.

    Args:
        q_nope: (batch, heads, queries, nope_dim) queries without positions.
        q_rope: (batch, heads, queries, rope_dim) rotated queries; rope_dim may be 0.
        latent: (batch, keys, kv_rank) normalised latents, key and value in one.
        k_rope: (batch, keys, rope_dim) rotated keys, shared by all heads.
        w_key: (heads, nope_dim, kv_rank) up-projection of the keys; views of a larger weight are fine.
        w_value: (heads, value_dim, kv_rank) up-projection of the values.
        scale: factor of the scores, usually `(nope_dim + rope_dim) ** -0.5`.
        mask: broadcastable to (batch, heads, queries, keys), bool (True: visible) or additive.
        causal: hide later keys; the queries are the last of the keys.
        sinks: (heads,) score of one more key without a value, as in models with learnt sinks.

    Returns:
        Tensor of shape (batch, heads, queries, value_dim) and the dtype of the queries; 0 for a row that sees no key.

    Raises:
        ValueError: shapes disagree, or `causal` with more queries than keys.

    Source: Scientific Spaces archive 10091; arXiv:2405.04434.
    """
    _check(q_nope, q_rope, latent, k_rope, w_key, w_value, mask, causal)
    batch, heads, queries, _ = q_nope.shape
    keys, rank = latent.shape[1:]
    high = torch.float64 if latent.dtype == torch.float64 else torch.float32
    rows = heads * queries
    content = (_per_head(q_nope, w_key).to(high) * scale).reshape(batch, rows, rank)
    position = (q_rope.to(high) * scale).reshape(batch, rows, q_rope.shape[3])
    step = max(1, _SCORES // max(1, batch * rows))
    if latent.dtype != high:
        step = min(step, _WIDENED)
    total: tuple[Tensor, Tensor] | None = None
    for start in range(0, keys, step):
        stop = min(keys, start + step)
        shared = latent[:, start:stop].to(high)
        # keys first: the long side as rows is what a CPU's matrix product is quick at
        scores = torch.bmm(shared, content.transpose(1, 2))
        scores = scores + torch.bmm(k_rope[:, start:stop].to(high), position.transpose(1, 2))
        scores = scores.transpose(1, 2).reshape(batch, heads, queries, stop - start)
        scores = _hide(scores, mask, causal, keys, start, stop)
        top = scores.detach().amax(-1, keepdim=True)
        top = torch.where(torch.isfinite(top), top, torch.zeros_like(top))
        weights = (scores - top).exp()
        mass = weights.sum(-1, keepdim=True)
        # a row without a visible key has mass 0 and weights 0: dividing by 1 keeps it, and its gradient, at 0
        seen = mass > 0
        mass = torch.where(seen, mass, torch.ones_like(mass))
        weights = weights / mass
        lse = torch.where(seen, mass.log() + top, torch.full_like(top, -torch.inf))[..., 0]
        out = torch.bmm(weights.view(batch, rows, stop - start), shared).view(batch, heads, queries, rank)
        total = (out, lse) if total is None else merge([total[0], out], [total[1], lse])
    if total is None:
        return q_nope.new_zeros(batch, heads, queries, w_value.shape[1])
    out, lse = total
    if sinks is not None:  # its only effect is to take a share of the weight
        out = out * torch.sigmoid(lse - sinks.to(high).view(1, -1, 1))[..., None]
    return _per_head(out.to(q_nope.dtype), w_value.transpose(1, 2))


def _per_head(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply (batch, heads, length, in) by (heads, in, out) without copying the weight for each row of the batch."""
    batch, heads, length, width = x.shape
    product = torch.bmm(x.transpose(0, 1).reshape(heads, batch * length, width), weight)
    return product.view(heads, batch, length, weight.shape[2]).transpose(0, 1)


def _hide(scores: Tensor, mask: Tensor | None, causal: bool, keys: int, start: int, stop: int) -> Tensor:
    """Apply the mask and causality to the scores of keys [start, stop)."""
    queries = scores.shape[2]
    if mask is not None:
        part = mask if mask.shape[-1] == 1 else mask[..., start:stop]
        scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part.to(scores.dtype)
    first = keys - queries  # the slot of the first query
    if causal and stop - 1 > first:
        slots = torch.arange(start, stop, device=scores.device)
        own = torch.arange(first, keys, device=scores.device)
        scores = scores.masked_fill(slots > own[:, None], -torch.inf)
    return scores


def _check(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_key: Tensor,
    w_value: Tensor,
    mask: Tensor | None,
    causal: bool,
) -> None:
    if q_nope.ndim != 4 or q_rope.ndim != 4 or q_nope.shape[:3] != q_rope.shape[:3]:
        raise ValueError(
            "q_nope and q_rope must be (batch, heads, queries, width) with equal first three sizes, got "
            f"{tuple(q_nope.shape)} and {tuple(q_rope.shape)}"
        )
    batch, heads, queries, nope = q_nope.shape
    if latent.ndim != 3 or latent.shape[0] != batch or k_rope.shape != (*latent.shape[:2], q_rope.shape[3]):
        raise ValueError(
            f"latent must be ({batch}, keys, kv_rank) and k_rope ({batch}, keys, {q_rope.shape[3]}), got "
            f"{tuple(latent.shape)} and {tuple(k_rope.shape)}"
        )
    rank = latent.shape[2]
    if w_key.shape != (heads, nope, rank) or w_value.ndim != 3 or w_value.shape[::2] != (heads, rank):
        raise ValueError(
            f"w_key must be ({heads}, {nope}, {rank}) and w_value ({heads}, value_dim, {rank}), got "
            f"{tuple(w_key.shape)} and {tuple(w_value.shape)}"
        )
    if causal and queries > latent.shape[1]:
        raise ValueError(
            f"causal attention needs at least as many keys as queries, got {latent.shape[1]} keys and {queries} "
            "queries; put the latents of the new tokens into the cache first"
        )
    full = (batch, heads, queries, latent.shape[1])
    if mask is not None and (mask.ndim != 4 or any(m not in (1, n) for m, n in zip(mask.shape, full, strict=True))):
        raise ValueError(f"mask must be broadcastable to {full}, got {tuple(mask.shape)}")
