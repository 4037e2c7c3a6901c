"""Initial weights of a host model's blocks, and how to tell a model that has left them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from danlu.hosts.architecture import Architecture
from danlu.hosts.parameters import is_norm, rests_at_zero

__all__ = ["initialise", "signs_of_training", "xavier_normal_"]


@torch.no_grad()
def xavier_normal_(weight: Tensor, gain: float, generator: torch.Generator) -> Tensor:
    """Fill a matrix with gain sqrt(2 / (fan_in + fan_out)) times a standard normal.

    Unlike PyTorch's function of this name it takes a view of a fused or transposed parameter, whose own fan_out counts,
    and draws in float32 on the generator's device, so that a seed gives the same weights everywhere.

    Args:
        weight: (fan_out, fan_in), any floating dtype, on any device.
        gain: factor of the standard deviation.
        generator: source of the numbers.

    Returns:
        ``weight``.
    """
    noise = torch.randn(weight.shape, generator=generator, device=generator.device)
    return weight.copy_(noise * (gain * (2 / sum(weight.shape)) ** 0.5))


@torch.no_grad()
def initialise(architecture: Architecture, gain: float, generator: torch.Generator) -> None:
    """Draw all matrices of the blocks anew, set their biases to 0 and norms (the final one too) to rest.

    Args:
        architecture: reading of the model.
        gain: of value, attention output and feed-forward matrices; query and key have 1.
        generator: source of the numbers.
    """
    done = set()
    for block in architecture.blocks:
        if id(block.module) in done:
            continue
        done.add(id(block.module))
        attention, feed = block.attention, block.feed_forward
        for matrix in (attention.query, attention.key):
            xavier_normal_(matrix.weight, 1.0, generator)
        for scaled in (attention.value, attention.output, feed.gate, feed.up, feed.down):
            if scaled is not None:
                xavier_normal_(scaled.weight, gain, generator)
        for module in block.module.modules():
            _rest(module)
    if architecture.final_norm is not None:
        _rest(architecture.final_norm[1])


@torch.no_grad()
def signs_of_training(architecture: Architecture) -> str | None:
    """Why a model seems to be trained, in words, or None if nothing says so.

    The host marks parameters that ``from_pretrained`` has filled. A model trained in this process has moved gains or
    biases, which start at known values. A model with neither can only be told by its owner.
    """
    model: Any = architecture.model
    parameters = (parameter for block in architecture.blocks for parameter in block.module.parameters())
    if any(getattr(parameter, "_is_hf_initialized", False) for parameter in parameters):
        return f"its weights were loaded from {model.config.name_or_path or 'a checkpoint'}"
    for block in architecture.blocks:
        for name, module in block.module.named_modules():
            bias = getattr(module, "bias", None)
            # Hosts start gains at 0 or 1, not always at the one that does nothing (Nemotron's multiply by 2 at first).
            if is_norm(module) and bool(((module.weight != 0) & (module.weight != 1)).any()):
                return f"{block.name}.{name}.weight has moved from its initial value"
            if isinstance(bias, nn.Parameter) and bool(bias.any()):
                return f"{block.name}.{name}.bias has moved from its initial value"
    return None


def _rest(module: Any) -> None:
    if is_norm(module):
        module.weight.fill_(_resting_gain(module))
    if isinstance(getattr(module, "bias", None), nn.Parameter):
        module.bias.zero_()


def _resting_gain(norm: nn.Module) -> float:
    return 0.0 if rests_at_zero(norm) else 1.0
