"""Data, models and sampling of the claims on continuous tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.lab.claim import Context
from danlu.lab.training import Schedule, seeded, train

#: Points of a sequence, the radius of their circle, the angle between two, and the noise on each coordinate.
TOKENS, RADIUS, TURN, NOISE = 4, 1.5, math.pi / 3, 0.08
#: Pixels of a digit's side.
SIDE = 8


class Readout(nn.Module):
    """The backbone of a continuous model under another head: what it says in front of each token.

    Args:
        model: gives inputs and backbone; its own head stays unused.
        outputs: width of the answer; 3 layers of 128 before it, as in the diffusion head.
        seed: of the weights.
    """

    def __init__(self, model: Any, outputs: int, seed: int) -> None:
        super().__init__()
        self.model = model
        width = model.config.backbone_config.hidden_size
        with seeded(seed):
            layers = [nn.Linear(width, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU()]
            self.head = nn.Sequential(*layers, nn.Linear(128, outputs))

    def forward(self, **inputs: Any) -> Tensor:
        """Answers (batch, tokens, outputs)."""
        answers: Tensor = self.head(self.model(return_loss=False, **inputs).conditions)
        return answers


def turning_points(count: int, generator: torch.Generator) -> Tensor:
    """Four noisy points on a circle (count, 4, 2), each a sixth of a turn to the left or right of the one before."""
    first = 2 * math.pi * torch.rand(count, 1, generator=generator)
    turns = TURN * (2.0 * torch.randint(2, (count, TOKENS - 1), generator=generator) - 1)
    angles = torch.cat([first, turns], 1).cumsum(1)
    points = RADIUS * torch.stack([angles.cos(), angles.sin()], -1)
    return points + NOISE * torch.randn(points.shape, generator=generator)


def valid_turns(tokens: Tensor) -> tuple[Tensor, float | None]:
    """Which sequences (count, 4, 2) are right in every turn and radius, and the share of left turns among those."""
    turns = torch.atan2(tokens[..., 1], tokens[..., 0]).diff(dim=1)
    turns = torch.remainder(turns + math.pi, 2 * math.pi) - math.pi
    right = ((turns.abs() - TURN).abs() <= 0.35).all(1) & ((tokens.norm(dim=-1) - RADIUS).abs() <= 0.3).all(1)
    return right, float((turns[right] > 0).float().mean()) if right.any() else None


@torch.no_grad()
def unroll(
    model: Any, answer: Callable[..., Tensor], rows: int, count: int, draw: Callable[[Tensor], Tensor], **inputs: Any
) -> Tensor:
    """Sample token by token from a readout, by whole passes (a few short sequences need no cache).

    Args:
        model: the readout, for its token width.
        answer: called with ``patches`` and the inputs; returns (rows, tokens, outputs).
        rows: sequences.
        count: tokens of each.
        draw: from the answer (rows, outputs) to tokens (rows, token_dim).
        inputs: of the answer beside the patches.

    Returns:
        Tokens (rows, count, token_dim).
    """
    tokens = torch.zeros(rows, count, model.model.config.token_dim)
    for i in range(count):
        tokens[:, i] = draw(answer(patches=tokens[:, : i + 1], **inputs)[:, -1])
    return tokens


def draw_code(book: Tensor, generator: torch.Generator, logits: Tensor) -> Tensor:
    """Patches (rows, token_dim) of codes drawn by their logits (rows, codes)."""
    return book[torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]]


def decoder(seed: int, **options: Any) -> Any:
    """A continuous model on a Llama of 2 layers of width 64, with a head of 3 x 128."""
    from transformers import LlamaConfig, LlamaModel

    from danlu.models.continuous import ContinuousCausalLM

    config = LlamaConfig(
        vocab_size=1, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with seeded(seed):
        return ContinuousCausalLM.from_backbone(LlamaModel(config), head_width=128, head_depth=3, **options)


def fit(
    model: nn.Module,
    loss: Callable[..., Tensor],
    batches: Callable[[torch.Generator], dict[str, Any]],
    schedule: Schedule,
    seed: int,
    context: Context,
    label: str,
) -> list[float]:
    """The lab's training loop on a loss that the model computes itself."""
    wrapped = _Loss(model, loss)
    return train(wrapped, batches, schedule, seed, context, label, lambda values, _: values.mean())


class _Loss(nn.Module):
    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.loss(**inputs).view(1, 1))


def digit_reader(pixels: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """A small reader of digits, trained to the end."""
    with seeded(seed):
        reader = nn.Sequential(nn.Linear(SIDE**2, 128), nn.ReLU(), nn.Linear(128, 10))
    optimiser = torch.optim.AdamW(reader.parameters(), 3e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(600):
        rows = torch.randint(len(pixels), (128,), generator=generator)
        optimiser.zero_grad()
        F.cross_entropy(reader(pixels[rows]), labels[rows]).backward()
        optimiser.step()
    return reader.eval()
