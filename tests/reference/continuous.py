"""Autoregression over continuous patches written out: walks, masks and heads by loops, sampling without a cache."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def walk(order: str, rows: int, columns: int) -> list[int]:
    """Raster indices in the order of a walk over a grid."""
    if order == "raster":
        return [row * columns + column for row in range(rows) for column in range(columns)]
    cells: list[tuple[int, int]] = []
    if order == "zigzag":
        for diagonal in range(rows + columns - 1):
            line = [(row, diagonal - row) for row in range(rows) if 0 <= diagonal - row < columns]
            cells += line if diagonal % 2 else line[::-1]
    else:
        row, column, down, right = 0, 0, 0, 1
        seen: set[tuple[int, int]] = set()
        for _ in range(rows * columns):
            seen.add((row, column))
            cells.append((row, column))
            ahead = (row + down, column + right)
            if not (0 <= ahead[0] < rows and 0 <= ahead[1] < columns) or ahead in seen:
                down, right = right, -down
            row, column = row + down, column + right
    return [row * columns + column for row, column in cells]


def cut(image: Tensor, high: int, wide: int, order: list[int]) -> Tensor:
    """Patches of one image (channels, height, width), pixel by pixel."""
    channels, _, width = image.shape
    tokens = []
    for place in order:
        row, column = divmod(place, width // wide)
        tokens.append(
            [image[c, row * high + i, column * wide + j] for c in range(channels) for i in range(high)
             for j in range(wide)]
        )  # fmt: skip
    return torch.tensor(tokens, dtype=image.dtype)


def joint_mask(text: int, patches: int, levels: int, later: int) -> Tensor:
    """Mode I, from the kinds of the tokens."""
    kinds: list[tuple[str, int, int]] = [("text", i, 0) for i in range(text)]
    kinds += [("clean", i, 0) for i in range(patches)]
    kinds += [("noisy", i, k) for i in range(patches) for k in range(levels)]
    kinds += [("later", i, 0) for i in range(later)]
    mask = torch.zeros(len(kinds), len(kinds), dtype=torch.bool)
    for a, (query, i, k) in enumerate(kinds):
        for b, (key, j, m) in enumerate(kinds):
            mask[a, b] = {
                "text": key == "text" and j <= i,
                "clean": key == "text" or (key == "clean" and j <= i),
                "noisy": key == "text" or (key == "clean" and j < i) or (key == "noisy" and (i, k) == (j, m)),
                "later": key in ("text", "clean") or (key == "later" and j <= i),
            }[query]
    return mask


def head(weights: dict[str, Tensor], depth: int, y: Tensor, t: float, z: Tensor) -> Tensor:
    """The diffusion head on one token, in float64: AdaLN blocks by their formula."""
    w = {name: value.detach().double() for name, value in weights.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def silu(x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-6)

    angles = torch.tensor([1000 * t * 10000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    wave = torch.cat([torch.cos(angles), torch.sin(angles)])
    c = silu(linear("time.2", silu(linear("time.0", wave))) + linear("condition", z.double()))
    s = linear("token", y.double())
    for i in range(depth):
        shift, scale, gate = linear(f"blocks.{i}.modulation", c).chunk(3)
        inner = norm(s) * w[f"blocks.{i}.norm.weight"] + w[f"blocks.{i}.norm.bias"]
        inner = inner * (1 + scale) + shift
        s = s + gate * linear(f"blocks.{i}.mlp.2", silu(linear(f"blocks.{i}.mlp.0", inner)))
    shift, scale = linear("modulation", c).chunk(2)
    return linear("output", norm(s) * (1 + scale) + shift)


def flow_token(weights: dict[str, Tensor], depth: int, z: Tensor, null: Tensor, w: float, noise: Tensor, steps: int):
    """One token by Euler's steps of the flow from t = 1 to t = 0, guided."""
    y = noise.double()
    for step in range(steps):
        t = 1 - step / steps
        c, u = head(weights, depth, y, t, z), head(weights, depth, y, t, null)
        y = y - (u + w * (c - u)) / steps
    return y


def generate(model: Any, classes: list[int], count: int, steps: int, w: float, ramp: str, order: Any, seed: int):
    """Guided sampling of a model of patches with classes: every patch by a full pass, every token on its own."""
    generator = torch.Generator().manual_seed(seed)
    table, depth = model.start_embedding.weight.double(), model.config.head_depth
    weights = dict(model.diffusion_head.state_dict())
    mean, std = model.config.token_mean[0], model.config.token_std[0]
    tokens = torch.zeros(len(classes), 0, model.config.token_dim, dtype=torch.float64)

    def condition(start: Tensor, before: Tensor, places: Any) -> Tensor:
        rows = [start]
        for j, token in enumerate(before):
            row = model.patch_embedding.weight.double() @ token + model.patch_embedding.bias.double()
            rows.append(row if places is None else row + model.place_embedding.weight[places[j]].double())
        if places is not None:
            rows = [row + model.target_embedding.weight[places[j]].double() for j, row in enumerate(rows)]
        embeds = torch.stack(rows)[None]
        return model.backbone(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, -1]

    for i in range(count):
        noise = torch.randn(len(classes), model.config.token_dim, generator=generator, dtype=torch.float64)
        strength = w if ramp == "constant" else 1 + (w - 1) * (i + 1) / count
        new = []
        for b, label in enumerate(classes):
            places = None if order is None else order[b]
            c = condition(table[label], tokens[b], places)
            u = condition(table[-1], tokens[b], places)
            new.append(flow_token(weights, depth, c, u, strength, noise[b], steps))
        tokens = torch.cat([tokens, torch.stack(new)[:, None]], 1)
    return tokens * std + mean


def two_point_floor(t: float) -> float:
    """Least squared error of the velocity for a token that is 1 or -1, by quadrature over the noise."""
    eps = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    density = torch.exp(-(eps**2) / 2) / math.sqrt(2 * math.pi)
    y = (1 - t) + t * eps  # the token is 1; the other case is its mirror image
    mean = torch.tanh(y * (1 - t) / t**2)
    return float(torch.trapezoid(density * (1 - mean**2), eps)) / t**2
