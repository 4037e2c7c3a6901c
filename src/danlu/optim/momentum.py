"""What Lion and Tiger share: one state tensor per parameter, of any floating type, and how a step is carried out."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from danlu.kernels.signs import SignUpdate, apply, apply_lists

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class SignMomentum(Optimizer):
    """An optimiser whose state is one tensor ``momentum`` per parameter, and whose update is a sign.

    Args:
        params: parameters or groups.
        defaults: options of groups.
        stochastic_rounding: round half-precision parameters and states at random.
        state_dtype: type of the state; none is that of the parameter.
        foreach: list operations; none chooses them off the CPU.
        fused: one compiled kernel per tensor: loops on the CPU, torch.compile elsewhere and for half precision; none
            chooses the loops.
        seed: of the random rounding.
    """

    _attributes: tuple[str, ...] = ("stochastic_rounding", "state_dtype", "foreach", "fused", "seed")

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        stochastic_rounding: bool,
        state_dtype: torch.dtype | None,
        foreach: bool | None,
        fused: bool | None,
        seed: int,
    ):
        if state_dtype is not None and state_dtype not in FLOATS:
            raise ValueError(f"state_dtype must be None or a floating type of 16 to 64 bits, got {state_dtype}")
        if foreach and fused:
            raise ValueError("foreach and fused must not both be True; choose one")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an integer, got {seed!r}")
        self.stochastic_rounding, self.state_dtype, self.seed = stochastic_rounding, state_dtype, seed
        self.foreach, self.fused = foreach, fused
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with its options checked."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            for parameter in group["params"]:
                if parameter.dtype not in FLOATS:
                    raise TypeError(
                        f"parameters must be real floating-point tensors of 16 to 64 bits, got {parameter.dtype}"
                    )
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        group["step"] = self.param_groups[0].get("step", 0)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_number("lr", group["lr"], 0.0, math.inf, "1e-3 is usual for Tiger, 1e-4 for Lion")
        check_number("weight_decay", group["weight_decay"], 0.0, math.inf, "0.01 is usual")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; its tensors keep their types (PyTorch would give them that of the parameter)."""
        super().load_state_dict(state_dict)
        saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        ours = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for key, parameter in zip(saved, ours, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    dtype = self.state_dtype or parameter.dtype if name == "momentum" else value.dtype
                    self.state[parameter][name] = value.to(parameter.device, dtype, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._attributes}}

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter, dtype=self.state_dtype, requires_grad=False)
        return state["momentum"]

    def _noise(self, *key: int) -> tuple[int, ...] | None:
        return (self.seed, *key) if self.stochastic_rounding else None

    def _apply(self, updates: Iterable[SignUpdate]) -> list[float | None]:
        """Carry out updates; a sum of squares for each where it came for nothing."""
        results: list[float | None] = []
        lists: dict[Any, list[SignUpdate]] = defaultdict(list)
        for update in updates:
            device = update.momentum.device
            listed = (device.type != "cpu" and not self.fused) if self.foreach is None else self.foreach
            if listed and update.wide and not update.by_row:
                lists[device, update.momentum.dtype].append(update)
                results.append(None)
            else:
                results.append(apply(update, loops=self.fused is not False, compiled=bool(self.fused)))
        for listed_updates in lists.values():
            apply_lists(listed_updates)
        return results


def check_number(name: str, value: Any, low: float, high: float, advice: str) -> None:
    """Refuse what is not a number in low <= value < high.

    Raises:
        TypeError: not a number.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not low <= float(value) < high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}), got {float(value):g}; {advice}")


def checked_gradient(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient, if it is dense and real.

    Raises:
        ValueError: it is sparse.
    """
    if gradient.layout != torch.strided:
        raise ValueError(
            f"gradients must be dense, got a {gradient.layout} one for a parameter of shape {tuple(parameter.shape)}; "
            "use nn.Embedding(sparse=False): rows without a gradient are left alone anyway by Tiger's lazy rows"
        )
    return gradient


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """What a closure returns, with gradients on."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def shard_dims(tensor: Tensor) -> list[int]:
    """Dimensions of the device mesh over which a tensor is cut; empty for an ordinary or replicated tensor."""
    return [dim for dim, place in enumerate(getattr(tensor, "placements", ())) if place.is_shard()]


def shard_of(tensor: Tensor) -> int:
    """Number of this rank's part among those of a sharded tensor; the same on ranks that hold the same part."""
    number = 0
    for dim in shard_dims(tensor):
        mesh = tensor.device_mesh  # type: ignore[attr-defined]
        number = number * mesh.size(dim) + mesh.get_local_rank(dim)
    return number
