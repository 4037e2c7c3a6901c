"""Claim on low-rank adaptation seen from the gradient: an optimiser on the full matrix is LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from danlu.lab.claim import Check, Context, Evidence, Plot, Table
from danlu.lab.runner import claim

_ROWS, _WIDTH, _OUT, _STEPS = 512, 64, 8, 500


@claim(
    name="low-rank-optimiser",
    title="LoRA is an optimiser on the full matrix",
    source="archive 9590; arXiv:2106.09685",
    statement="Projecting the full gradient to two small factors, updating those and writing the product back into the "
    "weight is LoRA itself; the other families of the view are trained in the same way.",
    measurement="A 64x64 matrix inside tanh learns a shift of rank 4 from 512 rows in 500 full-batch steps of AdamW: "
    "full training, LoRA as modules and as an optimiser at ranks 4 and 1, the symmetric, additive and random families, "
    "restarts, and bfloat16 weights rewritten, incremented and rounded stochastically; the worst over seeds.",
    seeds=(0, 1, 2),
    budget=60,
)
def low_rank_optimiser(context: Context) -> Evidence:
    """All runs on every seed."""
    from danlu.optim.low_rank import LowRankOptimizer

    def low_rank(rank: int, base: Any = torch.optim.AdamW, lr: float = 1e-2, **options: Any) -> Run:
        def build(layer: nn.Linear) -> torch.optim.Optimizer:
            return LowRankOptimizer(layer, base, rank=rank, alpha=rank, base_kwargs={"lr": lr}, **options)

        return lambda task, dtype: train(task, build, dtype)

    def full(task: Task, dtype: torch.dtype) -> list[float]:
        return train(task, lambda layer: torch.optim.AdamW(layer.parameters(), 1e-2), dtype)

    single, half = torch.float32, torch.bfloat16
    runs: dict[str, tuple[Run, torch.dtype]] = {
        "all of the matrix": (full, single),
        "LoRA optimiser, r = 4": (low_rank(4), single),
        "LoRA modules, r = 4": (lambda task, dtype: train_modules(task, 4, 1e-2), single),
        "LoRA optimiser, r = 1": (low_rank(1), single),
        "r = 1, restart every 50": (low_rank(1, restart_every=50), single),
        "symmetric, r = 4": (low_rank(4, scheme="lora_symmetric"), single),
        "additive, r = 4": (low_rank(4, scheme="additive"), single),
        "additive, r = 8": (low_rank(8, scheme="additive"), single),
        "random, r = 4, SGD at 1": (low_rank(4, torch.optim.SGD, 1.0, scheme="random"), single),
        "r = 4 at 0.003": (low_rank(4, lr=3e-3), single),
        "bfloat16, rewritten": (low_rank(4, lr=3e-3), half),
        "bfloat16, stochastic increments": (low_rank(4, lr=3e-3, resync="incremental"), half),
        "bfloat16, rounded increments": (lambda task, dtype: train_naive(task, 4, 3e-3), half),
    }
    curves: dict[str, list[list[float]]] = {name: [] for name in runs}
    tasks = [Task.draw(seed) for seed in context.seeds]
    total = len(tasks) * len(runs)
    for task, name in context.track(((t, n) for t in tasks for n in runs), description="runs", total=total):
        run, dtype = runs[name]
        curves[name].append(run(task, dtype))
    left = {name: [curve[-1] / curve[0] for curve in found] for name, found in curves.items()}
    worst = {name: max(values) for name, values in left.items()}
    pairs = zip(curves["LoRA optimiser, r = 4"], curves["LoRA modules, r = 4"], strict=True)
    apart = max(abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))
    rewritten, plain = left["bfloat16, rewritten"], left["r = 4 at 0.003"]
    naive = left["bfloat16, rounded increments"]
    ratio = min(n / r for n, r in zip(naive, rewritten, strict=True))
    checks = (
        Check("optimiser and modules give one curve (largest difference 1e-5)", apart <= 1e-5, f"{apart:.1e}"),
        Check(
            "rank 4 learns it: at most 1e-3 of the loss is left",
            worst["LoRA optimiser, r = 4"] <= 1e-3,
            f"{worst['LoRA optimiser, r = 4']:.1e}",
        ),
        Check(
            "rank 1 cannot: at least .3 is left",
            min(left["LoRA optimiser, r = 1"]) >= 0.3,
            f"{min(left['LoRA optimiser, r = 1']):.2f}",
        ),
        Check(
            "bfloat16 rewritten: at most 3 times what float32 leaves, plus 1e-5",
            all(r <= 3 * p + 1e-5 for r, p in zip(rewritten, plain, strict=True)),
            f"{max(rewritten):.1e}, {max(plain):.1e}",
        ),
        Check("bfloat16 incremented leaves 10 times more than rewritten", ratio >= 10, f"{ratio:.0f} times"),
    )
    shown = [name for name in runs if "modules" not in name]
    steps = tuple(float(step) for step in range(0, _STEPS, 10))
    lines = {
        name: tuple(curves[name][0][int(step)] / curves[name][0][0] for step in steps)
        for name in shown
        if "bfloat16" not in name and "0.003" not in name
    }
    return Evidence(
        summary=f"Optimiser and modules differ by {apart:.0e}; left of the loss: rank 4 "
        f"{worst['LoRA optimiser, r = 4']:.0e}, rank 1 {worst['LoRA optimiser, r = 1']:.2f} "
        f"({worst['r = 1, restart every 50']:.3f} with restarts), symmetric {worst['symmetric, r = 4']:.2f}, additive "
        f"{worst['additive, r = 4']:.2f}; in bfloat16 {max(rewritten):.0e} rewritten, {max(naive):.0e} incremented.",
        checks=checks,
        tables=(
            Table(
                "Final loss as a share of the first",
                ("run", *(f"seed {seed}" for seed in context.seeds)),
                tuple((name, *left[name]) for name in runs),
            ),
        ),
        plots=(Plot("A shift of rank 4 in a 64x64 matrix", "step", "loss / first loss", steps, lines),),
        notes=(
            "With a symmetric start the factors have to reach the shift plus their own start, which rank r generally "
            "cannot express.",
            "The additive family has as many parameters and up to twice the rank, and fits a generic shift of low rank "
            "worse than LoRA.",
            "The random family takes plain SGD at a rate of its own: its row says that it learns, not how it compares.",
            "Restarts and stochastic increments are not in the source.",
        ),
    )


@dataclass(frozen=True)
class Task:
    """Rows, the weight at the start, the map after tanh, and the targets of the shifted weight."""

    rows: Tensor
    weight: Tensor
    after: Tensor
    targets: Tensor

    @classmethod
    def draw(cls, seed: int) -> Task:
        """A shift of rank 4 with entries of about 0.1."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(_ROWS, _WIDTH, generator=generator)
        weight = torch.randn(_WIDTH, _WIDTH, generator=generator) / _WIDTH**0.5
        after = torch.randn(_WIDTH, _OUT, generator=generator) / _WIDTH**0.5
        left, right = (torch.randn(shape, generator=generator) for shape in ((_WIDTH, 4), (4, _WIDTH)))
        shifted = weight + 0.05 * left @ right
        return cls(rows, weight, after, torch.tanh(rows @ shifted.T) @ after)

    def loss(self, weight: Tensor) -> Tensor:
        """Mean square error, in float32 whatever the type of the weight."""
        return (torch.tanh(self.rows @ weight.float().T) @ self.after - self.targets).square().mean()


Run = Callable[[Task, torch.dtype], list[float]]


def train(
    task: Task,
    build: Callable[[nn.Linear], torch.optim.Optimizer],
    dtype: torch.dtype = torch.float32,
    steps: int = _STEPS,
) -> list[float]:
    """Train the weight in place with an optimiser on the full matrix, and return the losses."""
    layer = nn.Linear(_WIDTH, _WIDTH, bias=False, dtype=dtype)
    layer.weight.data.copy_(task.weight)
    optimizer = build(layer)
    losses = []
    for _ in range(steps):
        loss = task.loss(layer.weight)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_modules(task: Task, rank: int, lr: float, steps: int = _STEPS) -> list[float]:
    """The same with LoRA as a branch beside a frozen weight, from the factors that the optimiser draws."""
    A, B = _start(rank)
    optimizer = torch.optim.AdamW([A, B], lr)
    losses = []
    for _ in range(steps):
        hidden = task.rows @ task.weight.T + (task.rows @ A.T) @ B.T
        loss = (torch.tanh(hidden) @ task.after - task.targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_naive(task: Task, rank: int, lr: float, steps: int = _STEPS) -> list[float]:
    """What not to do: add the change of every step to a bfloat16 weight, rounded to nearest."""
    A, B = _start(rank)
    optimizer = torch.optim.AdamW([A, B], lr)
    weight = task.weight.bfloat16()
    losses = []
    for _ in range(steps):
        leaf = weight.detach().requires_grad_()
        loss = task.loss(leaf)
        loss.backward()
        G = leaf.grad.float()  # type: ignore[union-attr]
        A.grad, B.grad = B.detach().T @ G, G @ A.detach().T
        before = (B @ A).detach()
        optimizer.step()
        weight = weight + ((B @ A).detach() - before).bfloat16()
        losses.append(loss.item())
    return losses


def _start(rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    from danlu.optim.low_rank import LowRankOptimizer

    site = LowRankOptimizer(nn.Linear(_WIDTH, _WIDTH, bias=False), rank=rank, alpha=rank).sites[0]
    return site.A, site.B
