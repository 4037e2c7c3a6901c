"""The earth-mover loss written out: the whole V x V cost matrix, one-hot labels, gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def cost_matrix(embedding: Tensor, vocabulary: int) -> Tensor:
    """C[i, j] = 1 - cos(E_i, E_j); 1 where a row is missing or zero."""
    cost = torch.ones(vocabulary, vocabulary, dtype=embedding.dtype)
    for i in range(len(embedding)):
        for j in range(len(embedding)):
            lengths = embedding[i].norm() * embedding[j].norm()
            if lengths > 0:
                cost[i, j] = 1 - (embedding[i] @ embedding[j]) / lengths
    return cost


def token_losses(
    logits: Tensor, targets: Tensor, cost: Tensor, mode: str, *, weight=None, ratio="released", clip=None, share=1.0
) -> Tensor:
    """Loss of each row of ``logits`` for one-hot or soft ``targets`` of the same shape."""
    p = torch.exp(logits - torch.logsumexp(logits, -1, keepdim=True))
    ce = -(targets * torch.log(p)).sum(-1)
    plan = p[:, :, None] * targets[:, None, :]
    emo = (plan * cost).sum((1, 2))
    # 1 - <p - p tau, tau> with the taken-away part a constant: value of EMO', gradient of EMO.
    own = (p * targets)[:, :, None] * targets[:, None, :] * (1 - cost)
    x = emo + own.sum((1, 2)).detach() if ratio == "released" else emo
    if mode == "mix1":
        r = (ce / x).detach()
        loss = 0.5 * (ce + (r if clip is None else r.clamp(max=clip)) * x)
    elif mode == "mix2":
        loss = x + (x / ce).detach() * ce
    elif mode == "emo":
        loss = emo
    else:
        loss = ce + weight * emo
    return (1 - share) * ce + share * loss


def one_hot(labels: Tensor, vocabulary: int, dtype: torch.dtype) -> Tensor:
    return torch.eye(vocabulary, dtype=dtype)[labels]
