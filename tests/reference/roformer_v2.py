"""RoFormerV2 in float64, token by token and head by head from the formulas; shares no code with the library."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def norm(row: Tensor, eps: float) -> Tensor:
    return row / torch.sqrt((row * row).sum() / row.numel() + eps)


def turn(vector: Tensor, position: float) -> Tensor:
    """Rotate the pairs (0, 1), (2, 3), ... of one head by position * 10000^(-2i/d)."""
    out = torch.empty_like(vector)
    size = vector.numel()
    for i in range(size // 2):
        angle = position * 10000.0 ** (-2 * i / size)
        a, b = vector[2 * i], vector[2 * i + 1]
        out[2 * i] = a * math.cos(angle) - b * math.sin(angle)
        out[2 * i + 1] = b * math.cos(angle) + a * math.sin(angle)
    return out


def encode(
    state: dict[str, Tensor],
    ids: list[int],
    heads: int,
    eps: float,
    *,
    types: list[int] | None = None,
    positions: list[float] | None = None,
    real: list[bool] | None = None,
    alpha: float = 1.0,
) -> Tensor:
    """Hidden states (length, hidden) of one row; ``state`` has the published names."""
    weight = {name.removeprefix("roformer."): value.double() for name, value in state.items()}
    types = types or [0] * len(ids)
    positions = positions or [float(i) for i in range(len(ids))]
    real = real or [True] * len(ids)
    rows = [
        norm(weight["embeddings.word_embeddings.weight"][i] + weight["embeddings.token_type_embeddings.weight"][t], eps)
        for i, t in zip(ids, types, strict=True)
    ]
    if "embeddings_project.weight" in weight:
        rows = [weight["embeddings_project.weight"] @ row for row in rows]
    layer = 0
    while (name := f"encoder.layer.{layer}.") + "output.dense.weight" in weight:
        maps = {part: weight[f"{name}attention.self.{part}.weight"] for part in ("query", "key", "value")}
        size = len(rows[0]) // heads
        mixed = [torch.zeros_like(row) for row in rows]
        for head in range(heads):
            cut = slice(head * size, (head + 1) * size)
            q = [turn((maps["query"] @ row)[cut], p) for row, p in zip(rows, positions, strict=True)]
            k = [turn((maps["key"] @ row)[cut], p) for row, p in zip(rows, positions, strict=True)]
            v = [(maps["value"] @ row)[cut] for row in rows]
            for i in range(len(rows)):
                seen = [j for j in range(len(rows)) if real[j]]
                scores = torch.stack([q[i] @ k[j] / math.sqrt(size) for j in seen])
                weights = torch.exp(scores - scores.max())
                weights = weights / weights.sum()
                mixed[i][cut] = sum(w * v[j] for w, j in zip(weights, seen, strict=True))
        out = weight[name + "attention.output.dense.weight"]
        rows = [norm(row + alpha * (out @ one), eps) for row, one in zip(rows, mixed, strict=True)]
        up, down = weight[name + "intermediate.dense.weight"], weight[name + "output.dense.weight"]
        rows = [norm(row + alpha * (down @ (up @ row).clamp(min=0)), eps) for row in rows]
        layer += 1
    return torch.stack(rows)
