"""Dense float64 references of latent attention and of what a conversion to it may change. Shares no code with danlu."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate adjacent pairs of (..., length, 2 m) by angles (length, m), one pair at a time as complex numbers."""
    z = torch.complex(x[..., 0::2].contiguous(), x[..., 1::2].contiguous())
    z = z * torch.exp(1j * angles)
    return torch.view_as_real(z).flatten(-2)


def grouped_attention(x: Tensor, module, frequencies: Tensor, scale: float) -> Tensor:
    """Causal attention of a Llama-like module, head by head, from its weights: (length, hidden)."""
    weights = {name: parameter.detach().double() for name, parameter in module.named_parameters()}

    def project(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    dim = 2 * len(frequencies)
    q, k, v = (project(name, x).split(dim, -1) for name in ("q_proj", "k_proj", "v_proj"))
    angles = torch.arange(len(x)).double()[:, None] * frequencies
    half = dim // 2
    order = torch.arange(dim).view(2, half).T.flatten()  # pairs (p, p + half) made adjacent
    out = []
    for s, query in enumerate(q):
        j = s // (len(q) // len(k))
        out.append(causal(turn(query[:, order], angles), turn(k[j][:, order], angles), v[j], scale))
    return project("o_proj", torch.cat(out, -1))


def latent_attention(x: Tensor, module, frequencies: Tensor) -> Tensor:
    """Causal attention of a DeepSeek-like module from its weights, norms in float64: (length, hidden)."""
    weights = {name: parameter.detach().double() for name, parameter in module.named_parameters()}
    nope, rope, value = module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim

    def project(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def normed(name: str, c: Tensor) -> Tensor:
        eps = getattr(module, name).variance_epsilon
        return weights[f"{name}.weight"] * c / (c.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    if "q_proj.weight" in weights:
        queries = project("q_proj", x)
    else:
        queries = project("q_b_proj", normed("q_a_layernorm", project("q_a_proj", x)))
    latent, key = project("kv_a_proj_with_mqa", x).split([module.kv_lora_rank, rope], -1)
    joint = project("kv_b_proj", normed("kv_a_layernorm", latent)).split(nope + value, -1)
    angles = torch.arange(len(x)).double()[:, None] * frequencies
    key = turn(key, angles)
    out = []
    for query, both in zip(queries.split(nope + rope, -1), joint, strict=True):
        q = torch.cat((query[:, :nope], turn(query[:, nope:], angles)), -1)
        out.append(causal(q, torch.cat((both[:, :nope], key), -1), both[:, nope:], (nope + rope) ** -0.5))
    return project("o_proj", torch.cat(out, -1))


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One head, row by row."""
    rows = []
    for t in range(len(q)):
        weight = torch.exp(scale * (k[: t + 1] @ q[t]) - (scale * (k[: t + 1] @ q[t])).max())
        rows.append((weight[:, None] * v[: t + 1]).sum(0) / weight.sum())
    return torch.stack(rows)


def turned_scores(q: Tensor, k: Tensor, frequencies: Tensor) -> Tensor:
    """Scores (heads, length, length) of queries (heads, length, d) and keys (groups, length, d), pairs (p, p + d/2)."""
    heads, length, dim = q.shape
    out = torch.zeros(heads, length, length, dtype=torch.float64)
    for s in range(heads):
        key = k[s // (heads // len(k))]
        for p in range(dim // 2):
            a, b = (torch.complex(x[:, p], x[:, p + dim // 2]) for x in (q[s], key))
            distance = torch.arange(length)[:, None] - torch.arange(length)[None].double()
            out[s] += (a[:, None] * b.conj()[None] * torch.exp(1j * distance * frequencies[p])).real
    return out


def default_frequencies(dim: int, base: float) -> Tensor:
    return torch.tensor([math.exp(-2 * p / dim * math.log(base)) for p in range(dim // 2)], dtype=torch.float64)
