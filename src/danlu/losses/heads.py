"""Output heads of host models: the matrix behind the logits, adapters included, and how logits come of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

#: Names under which host configurations keep a factor of the logits. Some multiply by it and some divide.
_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


def host_model(model: Any) -> Any:
    """The host model inside of a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def output_head(model: Any) -> Any:
    """The module that makes logits from hidden states.

    Raises:
        ValueError: the model names none.
    """
    host = host_model(model)
    head = host.get_output_embeddings() if hasattr(host, "get_output_embeddings") else None
    if head is None:
        raise ValueError(f"model must name its output head in get_output_embeddings(), got {type(host).__name__}")
    return head


def head_weight(head: Any, *, exact: bool) -> tuple[Tensor, Tensor | None]:
    """Weight (V, d) and bias of a head as it computes now; a LoRA adapter on it is added to the weight.

    Args:
        head: a linear layer, also wrapped by PEFT.
        exact: refuse what ``x @ weight.T + bias`` would not reproduce: dropout in front of an adapter, DoRA, a bias in
            the adapter.

    Returns:
        The merged weight, differentiable in the adapter, and the bias or none.

    Raises:
        ValueError: a quantised head, or an adapter that cannot be merged.
    """
    base = head.base_layer if hasattr(head, "base_layer") else head
    weight, bias = base.weight, getattr(base, "bias", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"the output head must have a floating-point weight (V, d), got {type(base).__name__}")
    if base is head or getattr(head, "merged", False) or getattr(head, "disable_adapters", False):
        return weight, bias
    for adapter in head.active_adapters:
        if not hasattr(head, "get_delta_weight") or adapter not in getattr(head, "lora_A", {}):
            raise ValueError(f"the adapter of the output head must be LoRA, got {type(head).__name__}")
        if adapter in getattr(head, "lora_variant", {}):
            kind = type(head.lora_variant[adapter]).__name__
            raise ValueError(f"the adapter of the output head must be plain LoRA, got {kind}; leave the head out of it")
        dropout = getattr(head.lora_dropout[adapter], "p", 0.0)
        if exact and head.training and dropout > 0:
            raise ValueError(f"lora_dropout must be 0 on the output head for the fused loss, got {dropout}")
        if exact and head.lora_B[adapter].bias is not None:
            raise ValueError("lora_bias must be off on the output head for the fused loss")
        weight = weight + head.get_delta_weight(adapter).to(weight.dtype)
    return weight, bias


def logit_factor(config: Any, raw: Tensor, seen: Tensor) -> tuple[float, float | None]:
    """How a host makes logits of its head's output: factor and soft-cap, checked on logits that it made.

    Hosts use the same name for a factor and for a divisor, so all readings of the configuration are tried, and the one
    that gives the logits is taken.

    Args:
        config: of the model.
        raw: ``x @ weight.T + bias`` for some hidden states.
        seen: the host's logits for them.

    Returns:
        The factor and the soft-cap, none for no cap.

    Raises:
        ValueError: no reading gives these logits.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    tolerance = 1e-3 if seen.dtype in (torch.float32, torch.float64) else 5e-2
    seen = seen.detach().double()
    found = []
    for factor, cap in _readings(config):
        mine = raw.detach().double() * factor
        mine = mine if cap is None else cap * torch.tanh(mine / cap)
        found.append((float((mine - seen).abs().max()), factor, cap))
    error, factor, cap = min(found, key=lambda each: each[0])
    if not error <= tolerance * float(seen.abs().max()) + 1e-6:
        raise ValueError(
            f"the model's logits are not its head's output up to a scale and a soft-cap (off by {error:.2g}): use "
            "compute_loss_func=loss, which takes logits as they are"
        )
    return factor, cap


def _readings(config: Any) -> Iterator[tuple[float, float | None]]:
    factors = [1.0]
    for name in _FACTORS:
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value not in (0, 1):
            factors += [float(value), 1 / float(value)]
    cap = getattr(config, "final_logit_softcapping", None)
    for factor in factors:
        yield factor, None
        if cap is not None:
            yield factor, float(cap)
