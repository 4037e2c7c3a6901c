"""Linear attention and attention to quantised keys in their quadratic form, one query at a time, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def favor_weight(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """Mean over rows w of exp(w.q - q^2/2) exp(w.k - k^2/2)."""
    return torch.stack([torch.exp(w @ q - q @ q / 2) * torch.exp(w @ k - k @ k / 2) for w in rows]).mean()


def exp_weight(q: Tensor, k: Tensor) -> Tensor:
    return (q.exp() * k.exp()).sum()


def elu_weight(q: Tensor, k: Tensor) -> Tensor:
    return ((torch.nn.functional.elu(q) + 1) * (torch.nn.functional.elu(k) + 1)).sum()


def soft_vq_weight(q: Tensor, k: Tensor, codebook: Tensor, tau: float) -> Tensor:
    share = torch.softmax(-((k - codebook) ** 2).sum(-1) / (2 * tau), -1)
    return (torch.exp(codebook @ q) * share).sum()


def hard_vq_weight(q: Tensor, k: Tensor, codebook: Tensor) -> Tensor:
    nearest = ((k - codebook) ** 2).sum(-1).argmin()
    return torch.exp(codebook[nearest] @ q)


def weighted_attention(q, k, v, weight, *, causal=True, mask=None, segments=None) -> Tensor:  # type: ignore[no-untyped-def]
    """Mean of v_j over the visible j with weights weight(q_i, k_j, kv_head); pads of ``mask`` are unseen."""
    batch, heads, length, _ = q.shape
    group = heads // k.shape[1]
    out = []
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                num, den = torch.zeros(v.shape[-1], dtype=v.dtype), torch.zeros((), dtype=v.dtype)
                for j in range(length):
                    seen = (j <= i or not causal) and (mask is None or bool(mask[b, j]))
                    if segments is not None:
                        first, last = min(i, j), max(i, j)
                        seen = seen and all(segments[b, t] == segments[b, i] for t in range(first, last + 1))
                    if seen:
                        w = weight(q[b, h, i], k[b, h // group, j], h // group)
                        num, den = num + w * v[b, h // group, j], den + w
                out.append(num / den if den > 0 else num)
    return torch.stack(out).reshape(batch, heads, length, -1)


def quantised(k: Tensor, codebook: Tensor) -> Tensor:
    """The nearest code of every key (batch, kv_heads, length, dim), by its distance."""
    distance = (k[:, :, :, None] - codebook[None, :, None]).square().sum(-1)
    codes = distance.argmin(-1)
    return torch.stack([torch.stack([codebook[h][codes[b, h]] for h in range(k.shape[1])]) for b in range(len(k))])


def vq_dense(
    q, k, v, codebook, *, scale, bias=None, mask=None, segments=None, block=None, turn=None, reach=None
) -> Tensor:  # type: ignore[no-untyped-def] # noqa: E501
    """Softmax over quantised keys; with ``block``, gradients stop at keys and values before the previous block."""
    batch, heads, length, _ = q.shape
    group = heads // k.shape[1]
    hat = quantised(k.detach(), codebook)
    through = k + (hat - k).detach()
    out = []
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                scores, values = [], []
                for j in range(i + 1):
                    if mask is not None and not mask[b, j]:
                        continue
                    if segments is not None and not all(segments[b, t] == segments[b, i] for t in range(j, i + 1)):
                        continue
                    near = block is None or j // block >= i // block - 1
                    key, value = through[b, h // group, j], v[b, h // group, j]
                    distance = i - j if mask is None else int(mask[b, j:i].sum())
                    query = q[b, h, i] if turn is None else turn(q[b, h, i], min(distance, reach))
                    score = scale * (query @ (key if near else key.detach()))
                    if bias is not None and distance < bias.shape[1]:
                        score = score + bias[h, distance]
                    scores.append(score)
                    values.append(value if near else value.detach())
                if scores:
                    out.append(torch.stack(scores).softmax(-1) @ torch.stack(values))
                else:
                    out.append(torch.zeros(v.shape[-1], dtype=v.dtype))
    return torch.stack(out).reshape(batch, heads, length, -1)
