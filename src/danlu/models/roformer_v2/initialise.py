"""The initialisation of RoFormerV2 for any model: truncated normals whose variance is exactly 1/(fan_in N)."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from danlu.hosts.parameters import Kind, classify_parameters, is_norm, rests_at_zero

__all__ = ["initial_std", "roformer_v2_init_", "truncated_normal_"]

Module = TypeVar("Module", bound=nn.Module)

#: Standard deviation of a standard normal that is cut off at -2 and 2: sqrt(1 - 2a phi(a) / (2 Phi(a) - 1)), a = 2.
_CUT_STD = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))


def initial_std(fan_in: int, layers: int) -> float:
    """Sigma of the normal before it is cut at 2 sigma, such that 1/sqrt(fan_in layers) is left after the cut.

    Args:
        fan_in: inputs of a map, or width of a table, >= 1.
        layers: layers of the model, >= 1.

    Returns:
        1.13684723 / sqrt(fan_in layers).
    """
    return 1 / (_CUT_STD * math.sqrt(fan_in * layers))


@torch.no_grad()
def truncated_normal_(weight: Tensor, std: float, generator: torch.Generator | None = None) -> Tensor:
    """Fill a tensor with a normal of mean 0 that is cut off at two ``std``: the share beyond is drawn again, not moved.

    Args:
        weight: any shape, any floating dtype, any device.
        std: of the normal before the cut, > 0.
        generator: source of the numbers, on its own device; None is torch's global one.

    Returns:
        ``weight``.
    """
    place = weight.device if generator is None else generator.device
    drawn = torch.empty(weight.shape, dtype=torch.float32, device=place)
    nn.init.trunc_normal_(drawn, std=std, a=-2 * std, b=2 * std, generator=generator)
    return weight.copy_(drawn)


@torch.no_grad()
def roformer_v2_init_(model: Module, layers: int | None = None, generator: torch.Generator | None = None) -> Module:
    """Draw all matrices and tables of a model anew, as RoFormerV2 does: the deeper the model, the smaller its weights.

    Each entry of a map with ``fan_in`` inputs, and of a table of width ``fan_in``, is a truncated normal of standard
    deviation 1/sqrt(fan_in layers). Biases become 0 and gains of norms 1 (0 where the norm adds 1 to them).

    The published code takes the first axis of a Keras kernel (in, out) as ``fan_in``; here it is the axis that is
    summed over, whatever the layout: the last axis of a ``Linear``, the first of GPT-2's ``Conv1D``, all but the
    first of a convolution.

    Args:
        model: any module of linear maps, convolutions, tables and norms; shared weights are drawn once.
        layers: N; None reads ``model.config.num_hidden_layers``.
        generator: source of the numbers; None is torch's global one.

    Returns:
        ``model``.

    Raises:
        ValueError: no number of layers, or a matrix whose layout is not known, by name.

    Source: Scientific Spaces archive 8998
    """
    if layers is None:
        layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if not isinstance(layers, int) or layers < 1:
        raise ValueError(f"layers must be a whole number >= 1 (the model's config names none), got {layers!r}")
    drawn: list[tuple[Tensor, float]] = []
    kinds = classify_parameters(model)
    done: set[str] = set()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    resting: list[tuple[Tensor, float]] = []
    for module in model.modules():
        for local, parameter in module.named_parameters(recurse=False):
            name = names[id(parameter)]
            if name in done:
                continue
            done.add(name)
            if kinds[name] in (Kind.MATRIX, Kind.EMBEDDING):
                drawn.append((parameter, initial_std(_fan_in(module, local, parameter, name), layers)))
            elif kinds[name] is Kind.BIAS:
                resting.append((parameter, 0.0))
            elif kinds[name] is Kind.GAIN:
                resting.append((parameter, 0.0 if is_norm(module) and rests_at_zero(module) else 1.0))
    for weight, std in drawn:
        truncated_normal_(weight, std, generator)
    for vector, value in resting:
        vector.fill_(value)
    return model


def _fan_in(module: Any, local: str, weight: Tensor, name: str) -> int:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag | nn.Linear):
        return weight.shape[1]
    if type(module).__name__ == "Conv1D" and weight.ndim == 2:  # the host's, stored as (in, out)
        return weight.shape[0]
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return math.prod(weight.shape[1:])
    if isinstance(module, nn.MultiheadAttention) and local.endswith("proj_weight"):
        return weight.shape[1]
    raise ValueError(
        f"{name} must belong to a linear map, a convolution or a table, got {type(module).__name__}: which of its axes "
        "is summed over is not known; draw it with truncated_normal_"
    )
