"""What decoding with a smaller cache costs, predicted from the sizes of a host model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from danlu.hosts.architecture import Architecture, UnsupportedArchitecture, read_architecture

__all__ = ["RecomputeCost", "recompute_cost"]

Policy = Literal["kv", "x", "ids"]


@dataclass(frozen=True)
class RecomputeCost:
    """What a policy keeps for a prefix, and what it computes again at every step.

    Attributes:
        numbers: floating-point numbers kept, per text; the integer ids and positions come on top.
        flops: floating-point operations of one step's recomputation, per text; attention counted as a full square.
    """

    numbers: int
    flops: int


def recompute_cost(model: nn.Module, tokens: int, policy: Policy = "x", every: int = 1) -> RecomputeCost:
    """Predict memory and arithmetic of a policy.

    Args:
        model: a host decoder of the Llama kind.
        tokens: length of the prefix, >= 0.
        policy: as for :class:`danlu.attention.streaming.recompute.RecomputeCache`.
        every: see there.

    Returns:
        The cost for one text.

    Raises:
        ValueError: as :class:`danlu.attention.streaming.recompute.RecomputeCache`.
    """
    architecture, every = read_policy(model, policy, every)
    blocks, hidden = architecture.blocks, architecture.config.hidden_size
    if policy == "kv":
        return RecomputeCost(sum(2 * b.attention.kv_heads * b.attention.head_dim for b in blocks) * tokens, 0)
    if every == 1 and policy == "x":
        flops = sum(2 * tokens * (b.attention.key.weight.numel() + b.attention.value.weight.numel()) for b in blocks)
        return RecomputeCost(len(blocks) * hidden * tokens, flops)
    starts = range(0, len(blocks), every)
    flops = 0
    for start in starts:
        *whole, last = blocks[start : start + every]
        for block in whole:
            a, f = block.attention, block.feed_forward
            matrices = [a.query, a.key, a.value, a.output, f.up, f.down, *([f.gate] if f.gate else [])]
            flops += 2 * tokens * sum(m.weight.numel() for m in matrices) + 4 * tokens**2 * a.heads * a.head_dim
        a = last.attention
        flops += 2 * tokens * sum(m.weight.numel() for m in (a.query, a.key, a.value))
    return RecomputeCost(0 if policy == "ids" else len(starts) * hidden * tokens, flops)


def read_policy(model: nn.Module, policy: str, every: int) -> tuple[Architecture, int]:
    """Check a policy against a model; returns how the model is built, and how many layers a kept input serves."""
    if policy not in ("kv", "x", "ids"):
        raise ValueError(f'policy must be "kv", "x" or "ids", got {policy!r}')
    if every < 1 or (every > 1 and policy != "x"):
        raise ValueError(f"every must be >= 1, and 1 but for policy 'x', got {every} with policy {policy!r}")
    architecture = read_architecture(model)
    config = architecture.config
    kinds = set(getattr(config, "layer_types", None) or ())
    if policy != "kv" and (architecture.family != "llama" or len(kinds) > 1 or "sliding_attention" in kinds):
        raise UnsupportedArchitecture(
            f"model must be of the Llama kind with full attention in every layer, got {type(model).__name__} "
            f"({', '.join(sorted(kinds)) or architecture.family})"
        )
    return architecture, len(architecture.blocks) if policy == "ids" else every
