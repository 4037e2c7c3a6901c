"""One classification of a model's parameters, for methods that treat matrices, vectors and embeddings differently."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import torch
from torch import nn


class Kind(StrEnum):
    """What a parameter is, by the module that owns it.

    ``MATRIX`` mixes features (linear maps, convolutions, expert banks). ``EMBEDDING`` is a table whose rows are looked
    up. ``GAIN`` multiplies normalised features and rests at 1, or at 0 where the host adds 1 to it. ``BIAS`` is added:
    biases of linear maps and offsets of norms. ``VECTOR`` is any other parameter with at most one dimension.
    """

    MATRIX = "matrix"
    EMBEDDING = "embedding"
    GAIN = "gain"
    BIAS = "bias"
    VECTOR = "vector"


def classify_parameters(model: nn.Module, overrides: Mapping[str, Kind | str] | None = None) -> dict[str, Kind]:
    """The kind of every parameter, by module type; names decide only where ``overrides`` says so.

    Args:
        model: any module.
        overrides: regular expression to kind; the first that is found anywhere in a parameter's name wins.

    Returns:
        Kind by the names of ``model.named_parameters()``, tied parameters once. A table that is also an output head
        counts as an embedding.

    Raises:
        ValueError: an override that matches no parameter, or is no kind.
    """
    patterns = []
    for pattern, kind in (overrides or {}).items():
        if kind not in list(Kind):
            raise ValueError(f"overrides[{pattern!r}] must be one of {', '.join(Kind)}, got {kind!r}")
        patterns.append((re.compile(pattern), Kind(kind)))
    kinds: dict[str, Kind] = {}
    used = set()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        for local, parameter in module.named_parameters(recurse=False):
            name = names[id(parameter)]
            found = _by_owner(module, local, parameter)
            # A tied table is met twice: as an embedding and as a head.
            if name not in kinds or found is Kind.EMBEDDING:
                kinds[name] = found
    for name in kinds:
        for compiled, kind in patterns:
            if compiled.search(name):
                kinds[name] = kind
                used.add(compiled.pattern)
                break
    if unused := {compiled.pattern for compiled, _ in patterns} - used:
        raise ValueError(f"overrides must match parameter names, got {sorted(unused)[0]!r}, which matches none")
    return {name: kinds[name] for name, _ in model.named_parameters()}


def is_norm(module: Any) -> bool:
    """Whether a module normalises its input: PyTorch's norms, or a host's class whose name says so."""
    named = type(module).__name__.lower()
    return "norm" in named and isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.ndim <= 1


def rests_at_zero(module: Any) -> bool:
    """Whether a norm multiplies by 1 + weight instead of by weight, as Gemma's does."""
    if not is_norm(module) or type(module).__module__.startswith("torch."):
        return False
    # Asked and not told by name: with its weights at zero such a norm still lets its input through.
    weights = {name: torch.zeros(weight.shape) for name, weight in module.named_parameters(recurse=False)}
    probe = torch.arange(1.0, len(weights["weight"]) + 1)[None]
    try:
        with torch.no_grad():
            answer = torch.func.functional_call(module, weights, (probe,))
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False  # wants more than an input, as gated norms do; those multiply by their weight
    return isinstance(answer, torch.Tensor) and bool(answer.abs().max() > 0)


def _by_owner(module: nn.Module, local: str, parameter: nn.Parameter) -> Kind:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Kind.EMBEDDING
    if is_norm(module):
        return Kind.GAIN if local == "weight" else Kind.BIAS
    if "bias" in local:
        return Kind.BIAS
    return Kind.MATRIX if parameter.ndim > 1 else Kind.VECTOR
