"""Multi-head, grouped-query and latent attention by definition: one token pair and one head at a time, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None = None) -> Tensor:
    """Plain multi-head attention; (heads, T, d), (heads, L, d), (heads, L, e) give (T, heads * e); queries are last."""
    heads, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    rows = []
    for t in range(queries):
        parts = []
        for s in range(heads):
            seen = [
                i
                for i in range(keys)
                if (i <= t + keys - queries if visible is None else bool(visible[s % len(visible), t, i]))
            ]
            if not seen:
                parts.append(torch.zeros(v.shape[2], dtype=torch.float64))
                continue
            scores = torch.stack([scale * (q[s, t] * k[s, i]).sum() for i in seen])
            weights = (scores - scores.max()).exp()
            parts.append((weights[:, None] * v[s, seen]).sum(0) / weights.sum())
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Grouped-query attention: head s of h reads group floor(s * g / h)."""
    heads, groups = q.shape[0], k.shape[0]
    own = [s * groups // heads for s in range(heads)]
    return attention(q, k[own], v[own], scale)


def rotate(x: Tensor, position: float, base: float, layout: str) -> Tensor:
    """One vector turned to a position, pair by pair."""
    dim = len(x)
    out = x.clone()
    for i in range(dim // 2):
        a, b = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + dim // 2)
        angle = position * base ** (-2 * i / dim)
        out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
        out[b] = x[a] * math.sin(angle) + x[b] * math.cos(angle)
    return out


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation of one vector."""
    return gain * x / math.sqrt((x**2).mean().item() + eps)


def latent_attention(
    x: Tensor,
    positions: list[int],
    weights: dict[str, Tensor],
    *,
    heads: int,
    nope_dim: int,
    rope_dim: int,
    value_dim: int,
    base: float,
    layout: str = "interleaved",
    eps: float = 1e-6,
    visible: Tensor | None = None,
) -> Tensor:
    """A whole latent attention layer on one row (length, hidden), from weights by their checkpoint names."""
    w = {name: weight.double() for name, weight in weights.items()}

    def linear(name: str, vector: Tensor) -> Tensor:
        out = w[f"{name}.weight"] @ vector
        return out + w[f"{name}.bias"] if f"{name}.bias" in w else out

    rank = len(w["kv_a_layernorm.weight"])
    queries, keys, values = [], [], []
    for token, position in zip(x.double(), positions, strict=True):
        if "q_proj.weight" in w:
            q = linear("q_proj", token)
        else:
            q = linear("q_b_proj", rms_norm(linear("q_a_proj", token), w["q_a_layernorm.weight"], eps))
        down = linear("kv_a_proj_with_mqa", token)
        up = linear("kv_b_proj", rms_norm(down[:rank], w["kv_a_layernorm.weight"], eps))
        shared = rotate(down[rank:], position, base, layout)
        q_heads, k_heads, v_heads = [], [], []
        for s in range(heads):
            own = q[s * (nope_dim + rope_dim) : (s + 1) * (nope_dim + rope_dim)]
            q_heads.append(torch.cat([own[:nope_dim], rotate(own[nope_dim:], position, base, layout)]))
            kv = up[s * (nope_dim + value_dim) : (s + 1) * (nope_dim + value_dim)]
            k_heads.append(torch.cat([kv[:nope_dim], shared]))
            v_heads.append(kv[nope_dim:])
        queries.append(torch.stack(q_heads))
        keys.append(torch.stack(k_heads))
        values.append(torch.stack(v_heads))
    q, k, v = (torch.stack(part, 1) for part in (queries, keys, values))
    out = attention(q, k, v, (nope_dim + rope_dim) ** -0.5, visible)
    return torch.stack([linear("o_proj", row) for row in out])
