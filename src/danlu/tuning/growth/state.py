"""After growth: the optimiser's state for the grown model, and how far copies have moved apart."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from danlu.tuning.growth.plan import GrowthPlan, plan_growth, read_growable
from danlu.tuning.growth.sizes import sizes_of

__all__ = ["grow_optimizer", "symmetry_gap"]

#: State entries by their power of the gradient; entries of one element count steps and are kept.
POWERS = {"exp_avg": 1, "momentum_buffer": 1, "momentum": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}


def grow_optimizer(
    optimizer: Optimizer, old: Any, new: Any, *, placement: str | Sequence[int] = "even", widening: str = "auto"
) -> Optimizer:
    """An optimiser for the grown model that goes on where the small model's stood.

    A parameter that grew by factors (a, b) has a gradient that grew by the same map with other factors, see
    ``growth_maps``: momenta grow by those, second moments by their squares. Adam's steps then have the same absolute
    size as before, and weights that were divided among k copies move k times as fast relative to their size: divide the
    learning rate by k, or use a rule with relative steps, and warm up again for 1 to 2 % of the steps.

    Entries of which the small model knew no gradient (new blocks, silent channels) start without momentum; their second
    moment is the mean of their parameter's others. Close, not exact, are the moments of what is written into a stream
    padded under LayerNorm, and of rows of queries and keys where ``head_dim`` grows under a norm over the head. The
    noise of ``grow`` is not part of the map.

    Args:
        optimizer: over parameters of ``old``: Adam, AdamW, SGD, Lion, Tiger and others whose state is ``exp_avg``,
            ``exp_avg_sq``, ``max_exp_avg_sq``, ``momentum`` or ``momentum_buffer`` beside step counters; not in the
            middle of a window of accumulated gradients.
        old: the small model.
        new: what ``grow`` made of it, not trained since.
        placement: as given to ``grow``.
        widening: as given to ``grow``.

    Returns:
        A new optimiser of the same class with the same groups and options; parameters of new blocks are in the groups
        of the blocks that they copy.

    Raises:
        ValueError: a state that is not known, parameters that are not ``old``'s, or a ``new`` that was not grown so.

    Source: Scientific Spaces archive 8444 (the growth; the map of the state is this library's).
    """
    kind = type(optimizer).__name__
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.numel() > 1 and key not in POWERS:
                raise ValueError(
                    f"optimizer must hold only {', '.join(POWERS)} per parameter, but {kind} holds {key!r}, whose "
                    "growth is not known: start it anew"
                )
    plan = _plan_again(old, new, placement, widening)
    _check_grown(plan, old, new)
    names = {id(parameter): name for name, parameter in old.named_parameters()}
    grown_parameters = dict(new.named_parameters())
    places: dict[str, list[str]] = {}
    for name, made in plan.maps.items():
        places.setdefault(made.source, []).append(name)
    groups = []
    for group in optimizer.param_groups:
        if unknown := [parameter for parameter in group["params"] if id(parameter) not in names]:
            raise ValueError(
                f"optimizer must hold parameters of old, got one of shape {tuple(unknown[0].shape)} that is not"
            )
        wanted = [place for parameter in group["params"] for place in places[names[id(parameter)]]]
        groups.append({**group, "params": [grown_parameters[name] for name in wanted]})
    # The way that copy and pickle take: options that are no defaults come along, hooks do not.
    result = copy.copy(optimizer)
    result.param_groups, result.state = groups, defaultdict(dict)
    old_parameters = dict(old.named_parameters())
    for name, made in plan.maps.items():
        state = optimizer.state.get(old_parameters[made.source], {})
        for key, value in state.items():
            mapped = value
            if isinstance(value, Tensor):
                known = key in POWERS and value.shape == old_parameters[made.source].shape
                mapped = made.apply_to_gradient(value, POWERS[key]).to(value.dtype) if known else value.clone()
            result.state[grown_parameters[name]][key] = mapped
    return result


@torch.no_grad()
def symmetry_gap(
    old: Any, new: Any, *, placement: str | Sequence[int] = "even", widening: str = "auto"
) -> dict[str, float]:
    """How far the copies of a channel are apart, by parameter of the grown model.

    Args:
        old: the small model; only its sizes count.
        new: what ``grow`` made of it, trained since or not.
        placement: as given to ``grow``.
        widening: as given to ``grow``.

    Returns:
        For each parameter that writes copied channels: the root-mean-square difference of a copy from the first one,
        over the root-mean-square of the parameter. 0 means copies that never part.
    """
    gaps = {}
    for name, made in _plan_again(old, new, placement, widening).maps.items():
        tensor = new.get_parameter(name).double()
        for i, dimension in enumerate(made.dimensions):
            if dimension is None or dimension.reads:
                continue
            index = dimension.axis.heard
            first = torch.stack([(index == source).int().argmax() for source in index])
            again = (first != torch.arange(len(index))) & (index >= 0)
            if bool(again.any()):
                copies = tensor.index_select(i, again.nonzero().flatten())
                originals = tensor.index_select(i, first[again])
                size = tensor.square().mean().sqrt()
                gaps[name] = float((copies - originals).square().mean().sqrt() / size) if size > 0 else 0.0
    return gaps


def _plan_again(old: Any, new: Any, placement: str | Sequence[int], widening: str) -> GrowthPlan:
    return plan_growth(old, sizes_of(read_growable(new)), placement=placement, widening=widening)


def _check_grown(plan: GrowthPlan, old: Any, new: Any) -> None:
    """Vectors are grown without noise, so they tell whether the plan is the one that was used."""
    parameters, grown = dict(old.named_parameters()), dict(new.named_parameters())
    for name, made in plan.maps.items():
        source = parameters[made.source]
        if source.ndim == 1 and not torch.equal(made.apply(source).to(source.dtype), grown[name].detach()):
            raise ValueError(
                f"new must be what grow made of old with the same placement and widening, and not trained since; "
                f"{name} is not"
            )
