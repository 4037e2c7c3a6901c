"""Dense float64 definitions of rotary attention, written from the formulas and sharing no code with the library.

Every function forms the whole score matrix, one pair of positions at a time where that is what the formula says.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotation_matrix(position: float, inv_freq: Tensor, head_dim: int, layout: str = "half", start: int = 0) -> Tensor:
    """Build R_position as a (head_dim, head_dim) matrix, identity on the dims that do not rotate."""
    half = len(inv_freq)
    matrix = torch.eye(head_dim, dtype=torch.float64)
    for i, frequency in enumerate(inv_freq.tolist()):
        first, second = (start + i, start + i + half) if layout == "half" else (start + 2 * i, start + 2 * i + 1)
        angle = position * frequency
        matrix[first, first] = matrix[second, second] = math.cos(angle)
        matrix[first, second], matrix[second, first] = -math.sin(angle), math.sin(angle)
    return matrix


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor, layout: str = "half", start: int = 0) -> Tensor:
    """Multiply row n of x (..., length, head_dim) by R_positions[n]."""
    matrices = [rotation_matrix(float(p), inv_freq, x.shape[-1], layout, start) for p in positions]
    return torch.einsum("nij,...nj->...ni", torch.stack(matrices).to(x), x)


def expand_groups(x: Tensor, heads: int) -> Tensor:
    """Repeat each key or value head for the query heads that it serves."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def distances(n_queries: int, n_keys: int) -> Tensor:
    """Give i - j, with queries the last of the positions."""
    return torch.arange(n_keys - n_queries, n_keys)[:, None] - torch.arange(n_keys)[None, :]


def rerope_scores(
    q: Tensor,
    k: Tensor,
    inv_freq: Tensor,
    window: int,
    stride: float = math.inf,
    scale: float | None = None,
    layout: str = "half",
    start: int = 0,
) -> Tensor:
    """Score raw q and k by scale * q_i^T R(-rho(i - j)) k_j; causal, later keys -inf."""
    heads, n_queries, head_dim = q.shape[1:]
    n_keys = k.shape[2]
    k = expand_groups(k, heads)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    scores = torch.full((*q.shape[:3], n_keys), -math.inf, dtype=q.dtype)
    rows = distances(n_queries, n_keys)
    for distance in range(n_keys):
        r, c = (rows == distance).nonzero(as_tuple=True)
        rho = distance if distance < window else window + (distance - window) / stride
        matrix = rotation_matrix(-rho, inv_freq, head_dim, layout, start).to(q)
        scores[:, :, r, c] = scale * ((q[:, :, r] @ matrix) * k[:, :, c]).sum(-1)
    return scores


def weighted(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis and average the values; rows without a key give 0 and lse -inf."""
    lse = torch.logsumexp(scores, -1)
    probabilities = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0)[..., None])
    return probabilities @ expand_groups(v, scores.shape[1]), lse


def rerope(q: Tensor, k: Tensor, v: Tensor, inv_freq: Tensor, window: int, **kwargs: object) -> tuple[Tensor, Tensor]:
    """Give the output and log-sum-exp of ReRoPE attention from its dense scores."""
    return weighted(rerope_scores(q, k, inv_freq, window, **kwargs), v)  # type: ignore[arg-type]


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend where `visible` is true; cap, then bias."""
    scores = (q @ expand_groups(k, q.shape[1]).mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    return weighted(torch.where(visible, scores, -math.inf), v)


def window_visible(n_queries: int, n_keys: int, window: int, sinks: int = 0) -> Tensor:
    """Give the visibility of a causal band with the first keys always in sight."""
    d = distances(n_queries, n_keys)
    return (d >= 0) & ((d < window) | (torch.arange(n_keys) < sinks))
