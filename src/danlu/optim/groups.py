"""Parameter groups that give each parameter of a model the rule that suits it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from danlu.hosts.parameters import Kind, classify_parameters, rests_at_zero


def tiger_param_groups(
    model: nn.Module, overrides: Mapping[str, Kind | str] | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Parameter groups of a model with the rule that suits each parameter, by the module that owns it.

    Matrices get ``rms``, embeddings ``row_rms``, biases, gains and other vectors ``half``; gains shrink towards 1, or
    towards 0 where the norm multiplies by 1 + weight. Frozen parameters are left out.

    Args:
        model: any module.
        overrides: regular expression in parameter names to kind, see ``danlu.hosts.parameters.classify_parameters``.
        options: further options for all groups, such as ``min_rms``.

    Returns:
        Groups for ``Tiger``.

    Raises:
        ValueError: nothing to train, or parameters that old FSDP has flattened.

    Source: Scientific Spaces archive 9512 and its reference code.
    """
    refuse_flattened(model)
    rules = {Kind.MATRIX: "rms", Kind.EMBEDDING: "row_rms"}
    at_zero = {
        id(parameter)
        for module in model.modules()
        if rests_at_zero(module)
        for parameter in module.parameters(recurse=False)
    }
    parameters = dict(model.named_parameters())
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, kind in classify_parameters(model, overrides).items():
        parameter = parameters[name]
        if parameter.requires_grad:
            centre = 1.0 if kind is Kind.GAIN and id(parameter) not in at_zero else 0.0
            groups.setdefault((rules.get(kind, "half"), centre), []).append(parameter)
    if not groups:
        raise ValueError("model must have parameters that require gradients, got none")
    return [{"params": params, "rule": rule, "centre": centre, **options} for (rule, centre), params in groups.items()]


def refuse_flattened(model: nn.Module) -> None:
    """Refuse FSDP1, whose flat parameters have lost the shapes that the rules need.

    Raises:
        ValueError: a module is wrapped so.
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError(
            "FullyShardedDataParallel flattens parameters, and their RMS with them; use fully_shard (FSDP2) instead"
        )
