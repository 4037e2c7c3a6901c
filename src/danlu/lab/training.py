"""The one training loop of the lab, for experiments too small for the host library's Trainer, and its weight cache."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.files import replacing
from danlu.lab.claim import Context

logger = logging.getLogger("danlu.lab.training")

Batch = Callable[[torch.Generator], dict[str, Any]]
#: Of logits (tokens, vocabulary) and targets (tokens,), -100 where a token does not count.
Loss = Callable[[Tensor, Tensor], Tensor]

_MEMORY: dict[str, nn.Module] = {}


@dataclass(frozen=True)
class Schedule:
    """AdamW with a cosine to zero after a short linear warm-up."""

    steps: int = 1000
    batch: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup: int = 20

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def factor(self, step: int) -> float:
        """Learning rate of a step as a share of the peak."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


def train(
    model: nn.Module,
    batches: Batch,
    schedule: Schedule,
    seed: int,
    context: Context,
    label: str = "training",
    loss_function: Loss = F.cross_entropy,
    groups: list[dict[str, Any]] | None = None,
) -> list[float]:
    """Train in place and return the loss of every step; two runs with one seed give identical losses.

    Args:
        model: a host model whose output has ``logits``.
        batches: draws model inputs and ``targets`` (int64, -100 = not counted) from a generator.
        schedule: steps and rates.
        seed: of the data.
        context: for its progress bar.
        label: text beside the bar.
        loss_function: of the float32 logits and targets of a batch.
        groups: parameter groups with peak learning rates of their own, in place of all parameters at one rate.

    Returns:
        One loss per step.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(
        model.parameters() if groups is None else groups, schedule.learning_rate, weight_decay=schedule.weight_decay
    )
    rates = torch.optim.lr_scheduler.LambdaLR(optimiser, schedule.factor)
    losses = []
    model.train()
    for _ in context.track(range(schedule.steps), description=label, total=schedule.steps):
        inputs = batches(generator)
        targets = inputs.pop("targets")
        logits = model(**inputs).logits
        loss = loss_function(logits.flatten(0, -2).float(), targets.flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rates.step()
        losses.append(loss.item())
    model.eval()
    return losses


def tens(losses: list[float]) -> tuple[float, ...]:
    """Means of ten losses each, for a curve; what is left at the end is dropped."""
    return tuple(sum(losses[start : start + 10]) / 10 for start in range(0, len(losses) - 9, 10))


def trained(
    key: str, build: Callable[[], nn.Module], fit: Callable[[nn.Module], Any], seed: int, context: Context
) -> nn.Module:
    """A trained model from memory, else from the cache folder, else trained now and kept in both.

    Args:
        key: names everything the weights depend on.
        build: makes the untrained model.
        fit: trains it in place.
        seed: of the initial weights.
        context: names the cache folder.

    Returns:
        The model in evaluation mode; do not change it.
    """
    if key in _MEMORY:
        return _MEMORY[key]
    from safetensors import SafetensorError
    from safetensors.torch import load_model, save_model

    with seeded(seed):
        model = build()
    path = context.cache / f"{key}.safetensors"
    if path.is_file():
        try:
            load_model(model, path)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error
        logger.debug("weights %s from the cache", key)
    else:
        fit(model)
        with replacing(path) as part:
            save_model(model, str(part))
    _MEMORY[key] = model.eval()
    return _MEMORY[key]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Host models draw their initial weights from the global state, which is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
