"""Naive-Bayes context extension step by step in NumPy and by whole forward passes; shares no code with danlu."""

from __future__ import annotations

import numpy as np
import torch


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def cut(row: np.ndarray, top_p: float) -> np.ndarray:
    """The host library's rule on one row of log probabilities: ascending mass up to 1 - top_p goes, one token stays."""
    if top_p == 1:
        return row
    order = np.argsort(row, kind="stable")
    mass = 0.0
    kept = row.copy()
    for token in order[:-1]:
        mass += np.exp(row[token])
        if mass <= 1 - top_p:
            kept[token] = -np.inf
    return kept


def entropy(row: np.ndarray) -> float:
    total = 0.0
    for value in row:
        if value > -np.inf:
            total -= np.exp(value) * min(max(value, -100.0), 0.0)
    return total


def step(
    logits: np.ndarray, beta: float, eta: float, top_p: float, pooling: str = "min_entropy", before: int | None = None
) -> tuple[np.ndarray, int | None, list[float]]:
    """Scores, chosen context from 0, and entropies; row 0 of ``logits`` has no context."""
    rows = [cut(row, top_p) for row in log_softmax(logits.astype(np.float64))]
    prior, rows = rows[0], rows[1:]
    entropies = [entropy(row) for row in rows]
    vocabulary, chosen = len(prior), None
    pooled = np.empty(vocabulary)
    if pooling == "min_entropy":
        ranked = [h - eta if i == before else h for i, h in enumerate(entropies)]
        chosen = ranked.index(min(ranked))
        pooled = rows[chosen]
    for token in range(vocabulary):
        values = [row[token] for row in rows]
        if pooling == "max":
            pooled[token] = max(values)
        if pooling == "mean":
            alive = any(value > -np.inf for value in values)
            pooled[token] = sum(-100.0 if v == -np.inf and alive else v for v in values) / len(values)
    out = np.empty(vocabulary)
    for token in range(vocabulary):
        if prior[token] <= -100:
            out[token] = pooled[token]
        elif beta == -1:
            out[token] = prior[token]
        elif pooled[token] == -np.inf:
            out[token] = -np.inf
        else:
            out[token] = (1 + beta) * pooled[token] - beta * prior[token]
    return out, chosen, entropies


@torch.no_grad()
def greedy(
    model: torch.nn.Module, rows: list[list[int]], count: int, **settings: object
) -> tuple[list[int], list[int | None], list[np.ndarray]]:
    """Tokens, chosen contexts and scores by a whole pass over each row, alone and without a cache, at every step."""
    rows = [list(row) for row in rows]
    tokens: list[int] = []
    chosen: list[int | None] = []
    scores = []
    for _ in range(count):
        logits = [model(torch.tensor([row]), use_cache=False).logits[0, -1].double().numpy() for row in rows]
        out, k, _ = step(np.stack(logits), before=chosen[-1] if chosen else None, **settings)  # type: ignore[arg-type]
        token = int(out.argmax())
        tokens.append(token)
        chosen.append(k)
        scores.append(out)
        for row in rows:
            row.append(token)
    return tokens, chosen, scores
