"""State dicts of the low-rank optimiser: the host library's form, plain tensors and numbers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from danlu.optim.low_rank_schemes import Factors

if TYPE_CHECKING:
    from danlu.optim.low_rank import LowRankOptimizer

_FORMAT = 1


def header_of(optimizer: LowRankOptimizer) -> dict[str, Any]:
    """What is not about one parameter."""
    return {
        "format": _FORMAT,
        "scheme": optimizer.change.scheme.name,
        "resync": "exact" if optimizer.change.exact else "incremental",
        "resync_every": optimizer.change.resync_every,
        "restart_every": optimizer.change.restart_every,
        "steps": optimizer.steps,
        "restarts": optimizer.change.restarts,
        "seed": optimizer.change.seed,
    }


def state_of(optimizer: LowRankOptimizer) -> dict[Tensor, dict[str, Any]]:
    """The state of every parameter, without copies: factors and W0 of a matrix, and what ``base`` keeps for them."""
    inner = optimizer.base.state
    states: dict[Tensor, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not group["low_rank"]:
                states[parameter] = dict(inner.get(parameter, {}))
                continue
            site = optimizer.change[parameter]
            states[parameter] = {
                "A": site.A.detach(),
                "B": site.B.detach(),
                "scale": site.scale,
                "fixed": dict(site.fixed._asdict()),
                "base": {"A": dict(inner.get(site.A, {})), "B": dict(inner.get(site.B, {}))},
            }
            if site.kept is not None:
                states[parameter]["W0"] = site.kept
    return states


@torch.no_grad()
def load_state(optimizer: LowRankOptimizer, state_dict: Mapping[str, Any]) -> None:
    """Bring an optimiser to a saved state; nothing is changed when the state does not fit."""
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        state_dict = hook(optimizer, state_dict) or state_dict  # type: ignore[arg-type]
    _check(optimizer, state_dict)
    header, groups = state_dict["low_rank"], state_dict["param_groups"]
    # Indices of the base optimiser: two factors for one matrix.
    states: dict[int, Any] = {}
    inner_groups = []
    count = 0
    for outer, saved in zip(optimizer.param_groups, groups, strict=True):
        first = count
        for parameter, index in zip(outer["params"], saved["params"], strict=True):
            state = state_dict["state"].get(index, {})
            if outer["low_rank"]:
                site = optimizer.change[parameter]
                for name, factor in (("A", site.A), ("B", site.B)):
                    factor.data = state[name].to(factor.device, factor.dtype, copy=True)
                    factor.grad = None
                site.scale = state["scale"]
                site.fixed = Factors(**{k: v.to(site.A.device, site.wide) for k, v in state["fixed"].items()})
                if site.kept is not None:
                    site.kept.copy_(state["W0"])
                parts = [state["base"]["A"], state["base"]["B"]]
            else:
                parts = [state]
            for part in parts:
                if part:
                    states[count] = part
                count += 1
        options = {key: value for key, value in saved.items() if key not in ("params", "param_names", "low_rank")}
        inner_groups.append({**copy.deepcopy(options), "params": list(range(first, count))})
        outer.update(copy.deepcopy(options))
    # A copy, because an optimiser keeps the tensors that it loads, and the state may belong to another one.
    optimizer.base.load_state_dict({"state": copy.deepcopy(states), "param_groups": inner_groups})
    change = optimizer.change
    optimizer.steps, change.restarts, change.seed = header["steps"], header["restarts"], header["seed"]
    change.detached = False
    if change.exact:
        change.attach()
    for load_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        load_hook(optimizer)


def _check(optimizer: LowRankOptimizer, state_dict: Mapping[str, Any]) -> None:
    header = state_dict.get("low_rank")
    if header is None:
        raise ValueError("state_dict must be one of LowRankOptimizer, got one without the key 'low_rank'")
    for name, here in header_of(optimizer).items():
        if name in ("format", "scheme", "resync", "resync_every", "restart_every") and header[name] != here:
            raise ValueError(
                f"state_dict must be of an optimiser with {name}={here!r}, got {header[name]!r}; build it alike"
            )
    groups = state_dict["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in optimizer.param_groups]:
        raise ValueError("state_dict must have the groups of this optimiser, got other numbers of parameters")
    for outer, saved in zip(optimizer.param_groups, groups, strict=True):
        if saved["low_rank"] != outer["low_rank"]:
            raise ValueError(f"state_dict must have groups with low_rank={outer['low_rank']}, got {saved['low_rank']}")
        for parameter, index in zip(outer["params"], saved["params"], strict=True):
            if not outer["low_rank"]:
                continue
            site, state = optimizer.change[parameter], state_dict["state"][index]
            *banks, out, inp = site.shape
            rank = state["A"].shape[-2]
            if state["A"].shape != (*banks, rank, inp) or state["B"].shape != (*banks, out, rank):
                raise ValueError(
                    f"state_dict must hold factors of {site.name} {tuple(site.shape)}, got A {tuple(state['A'].shape)} "
                    f"and B {tuple(state['B'].shape)}"
                )
