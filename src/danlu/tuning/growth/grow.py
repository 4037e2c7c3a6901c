"""Exact growth: a larger model that computes what the small one computes, to train on from there."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from danlu.tuning.growth.plan import GrowthPlan, plan_growth, read_growable
from danlu.tuning.growth.sizes import resolve_sizes

__all__ = ["GrowthCheck", "grow", "verify_growth"]

logger = logging.getLogger("danlu.tuning")

SYMMETRIES = ("antisymmetric", "none", "independent")


def grow(
    model: Any,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    num_hidden_layers: int | None = None,
    *,
    symmetry: str = "antisymmetric",
    noise: float = 1.0,
    placement: str | Sequence[int] = "even",
    widening: str = "auto",
    allow_lossy: bool = False,
    seed: int = 0,
) -> Any:
    """Make a larger model of the same class that gives the same outputs as ``model``.

    All sizes may grow at once. Copies are made in place (0, 0, 1, 1, ...) and what reads them is divided by their
    number, so that no norm's epsilon and no activation sees a difference. Copies of one channel would receive the same
    gradients for ever; noise that cancels between them sets them apart without a change of the output.

    Departures from the source: channels are repeated without the factor 1/sqrt(k), which keeps every epsilon; rotated
    heads grow exactly, by moving pair j to pair k*j; padding enlarges the stream by sqrt(new/old) instead of shrinking
    the epsilons; norms over the head carry the scale of the scores in their gains.

    Args:
        model: a ``transformers`` model: Llama, Mistral, Qwen2, Qwen3, Gemma 1 to 3 (text), Phi-3, Granite, SmolLM3,
            GPT-2, BERT or RoBERTa, with any head. It is not changed.
        hidden_size: None keeps it, like every other size. A multiple of the model's for BERT and for tied GPT-2; any
            larger size elsewhere. For BERT and GPT-2 it must be ``num_attention_heads * head_dim``.
        intermediate_size: any size not below the model's.
        num_attention_heads: a multiple of ``num_key_value_heads``; no key head loses query heads.
        num_key_value_heads: any number not below the model's; whole groups are copied.
        head_dim: a multiple of the model's where heads are rotated.
        num_hidden_layers: pre-norm models only; new blocks copy a neighbour and add nothing at first.
        symmetry: ``antisymmetric`` (exact), ``none`` (copies stay equal for ever) or ``independent`` (lossy).
        noise: standard deviation of the (uniform) noise in units of each output's root-mean-square weight, >= 0.
        placement: ``even``, ``end``, or the places of the new blocks in the grown stack, counted from 0.
        widening: how ``hidden_size`` grows: ``repeat``, ``pad`` with silent channels, or ``auto``, which repeats where
            the sizes divide.
        allow_lossy: go on, with a warning, where the growth is not exact.
        seed: of the noise.

    Returns:
        A new model with a valid configuration, in the mode, dtype and place of ``model``.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size below the model's or one that does not divide, a model of another family
            (``UnsupportedArchitecture``), or a growth that is not exact, with the reason, unless ``allow_lossy``.

    Source: Scientific Spaces archive 8444; arXiv:1511.05641 (Net2Net), arXiv:2110.07143 (bert2BERT), arXiv:2401.02415
    (new blocks that add nothing).
    """
    if symmetry not in SYMMETRIES:
        raise ValueError(f"symmetry must be one of {', '.join(SYMMETRIES)}, got {symmetry!r}")
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise must be a finite number of at least 0, got {noise}")
    arch = read_growable(model)
    wanted = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
        "num_hidden_layers": num_hidden_layers,
    }
    plan = plan_growth(model, resolve_sizes(arch, wanted), placement=placement, widening=widening)
    reasons = [
        *plan.lossy,
        *(["symmetry='independent': its noise changes the outputs"] if symmetry == "independent" else []),
    ]
    if reasons and not allow_lossy:
        raise ValueError(f"this growth is not exact: {'; '.join(reasons)}. Pass allow_lossy=True to grow all the same")
    for reason in reasons:
        logger.warning("not exact: %s", reason)
    _fill(model, plan, 0.0 if symmetry == "none" else noise, symmetry == "independent", seed)
    return plan.model


@torch.no_grad()
def _fill(model: Any, plan: GrowthPlan, noise: float, lossy: bool, seed: int) -> None:
    grown = plan.model
    generator = torch.Generator().manual_seed(seed)
    old = dict(model.named_parameters())
    for name, made in plan.maps.items():
        source = old[made.source]
        tensor = made.add_noise(made.apply(source), noise, generator, lossy=lossy)
        _put(grown, name, nn.Parameter(tensor.to(source.dtype), requires_grad=source.requires_grad))
    names = {id(parameter): name for name, parameter in old.items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name != names[id(parameter)]:
            _put(grown, name, grown.get_parameter(names[id(parameter)]))
    buffers = dict(model.named_buffers())
    for name, buffer in grown.named_buffers():
        before = buffers.get(name)
        if before is not None:
            # Frequencies may have been rounded or replaced in the small model; other buffers may depend on a size.
            kept = name.endswith("inv_freq") and before.shape == buffer.shape
            buffer.data = before.clone() if kept else buffer.data.to(before)
    grown.train(model.training)
    if getattr(model, "generation_config", None) is not None:
        grown.generation_config = copy.deepcopy(model.generation_config)


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, local = name.rpartition(".")
    setattr(model.get_submodule(owner), local, parameter)


@dataclass(frozen=True)
class GrowthCheck:
    """How far the logits of two models are apart.

    Args:
        max_error: largest absolute difference.
        relative_error: that, over the largest absolute logit.
        agreement: share of positions where both rank the same token first.
        positions: number of positions compared.
    """

    max_error: float
    relative_error: float
    agreement: float
    positions: int


@torch.no_grad()
def verify_growth(old: Any, new: Any, batch: Tensor | Mapping[str, Any]) -> GrowthCheck:
    """Compare the logits of a model and of the model grown from it.

    Args:
        old: the small model.
        new: the grown model; both are run in evaluation mode and left in theirs.
        batch: token ids (batch, length), or all inputs by name.

    Returns:
        The differences, in float64.

    Raises:
        ValueError: a model that has no logits, or logits of different shapes.
    """
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    answers = []
    for model in (old, new):
        training = model.training
        output = model.eval()(**inputs)
        model.train(training)
        logits = getattr(output, "logits", getattr(output, "prediction_logits", None))
        if logits is None:
            raise ValueError(
                f"models must have logits to compare, {type(model).__name__} has none: load one with a head"
            )
        answers.append(logits.double())
    before, after = answers
    if before.shape != after.shape:
        raise ValueError(f"logits must have one shape, got {tuple(before.shape)} and {tuple(after.shape)}")
    error = (before - after).abs().max().item()
    return GrowthCheck(
        max_error=error,
        relative_error=error / before.abs().max().item(),
        agreement=(before.argmax(-1) == after.argmax(-1)).double().mean().item(),
        positions=before[..., 0].numel(),
    )
