"""What Tiger has to know of a parameter before it moves: finite gradients, sums of squares, rows with a gradient."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from danlu.kernels import signloops
from danlu.kernels.signs import is_finite
from danlu.optim.momentum import local, shard_dims, shard_of

_ROWS_AT_ONCE = 1 << 18  # elements


@dataclass(slots=True)
class Item:
    """One parameter in one call of ``step``."""

    parameter: Tensor
    group: dict[str, Any]
    index: int
    gradient: Tensor | None
    rule: str = ""
    shard: int | None = None  # number of this rank's part; none for a tensor that is whole

    def __post_init__(self) -> None:
        self.rule = self.group["rule"]
        if self.rule == "auto":
            self.rule = "rms" if self.parameter.ndim > 1 else "half"
        if shard_dims(self.parameter):
            self.shard = shard_of(self.parameter)


@dataclass(slots=True)
class Facts:
    """Numbers on the host: is the gradient finite, sum of squares of theta, finite and other gradients so far."""

    finite: bool
    squares: float
    folded: int
    bad: int


def facts_of(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    windows: Sequence[Tensor | None],
    squares: Sequence[Tensor | float],
    across: bool = True,
    look: bool = True,
) -> list[Facts]:
    """Measure many parameters with one transfer per device and one reduction per mesh.

    Args:
        parameters: ordinary or sharded.
        gradients: this rank's part of each, or none.
        windows: counts of finite and other gradients so far, (2,), or none.
        squares: this rank's sum of squares of each.
        across: add up the parts of sharded parameters.
        look: whether to look for NaN and infinities; otherwise every gradient passes.

    Returns:
        Facts of each whole parameter.
    """
    finite = [gradient is None or not look or is_finite(gradient) for gradient in gradients]
    if len(parameters) == 1 and windows[0] is None and isinstance(squares[0], float) and finite[0] is True:
        facts = [Facts(True, squares[0], 0, 0)]  # the usual case of a parameter on the CPU, which needs no more
        if across:
            _add_shards(parameters, facts)
        return facts
    counts = [0 if window is None else window[place] for place in (0, 1) for window in windows]
    numbers = _numbers([*finite, *squares, *counts])
    size = len(parameters)
    columns = [numbers[start : start + size] for start in range(0, 4 * size, size)]
    facts = [Facts(bool(a), b, int(c), int(d)) for a, b, c, d in zip(*columns, strict=True)]
    if across:
        _add_shards(parameters, facts)
    return facts


def touched_rows(gradient: Tensor) -> Tensor:
    """Which rows of a table (rows, width) have an entry that is not zero: (rows,), bool."""
    if signloops.takes(gradient):
        return signloops.touched(gradient)
    rows = max(1, _ROWS_AT_ONCE // max(1, gradient.shape[-1]))
    return torch.cat([(part != 0).any(-1) for part in gradient.split(rows)])


def row_decay(state: dict[str, Any], gradient: Tensor, beta: float) -> Tensor:
    """Factor of the momentum for each row of a table, (rows, 1); marks rows that now have a gradient in the window."""
    touched = touched_rows(gradient)
    seen = state.get("rows")
    first = touched if seen is None else touched & ~seen
    state["rows"] = touched if seen is None else seen | touched
    return beta_where(first, beta, gradient)[:, None]


def beta_where(first: Tensor, beta: float, gradient: Tensor) -> Tensor:
    """The decay of what has its first gradient of a window, and 1 for the rest."""
    one = torch.ones((), dtype=torch.promote_types(gradient.dtype, torch.float32), device=gradient.device)
    return torch.where(first, one * beta, one)


def row_rms(parameter: Tensor) -> Tensor:
    """RMS of each row of a table, (rows of this rank, 1), in float32 or better.

    Raises:
        ValueError: rows are cut over ranks.
    """
    if any(parameter.placements[dim].dim == parameter.ndim - 1 for dim in shard_dims(parameter)):  # type: ignore[attr-defined]
        raise ValueError("rule row_rms needs whole rows on each rank, got a table cut along its rows; shard it by rows")
    own = local(parameter)
    if signloops.takes(own):
        return (signloops.row_squares(own.detach())[:, None] / parameter.shape[-1]).sqrt()
    wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(own, dim=-1, keepdim=True, dtype=wide) / parameter.shape[-1] ** 0.5


def _numbers(values: Sequence[Any]) -> list[float]:
    """Python numbers of numbers and of tensors without dimensions, with one transfer per device."""
    found = [float(value) if not isinstance(value, Tensor) else 0.0 for value in values]
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for place, value in enumerate(values):
        if isinstance(value, Tensor):
            by_device[value.device].append(place)
    for device, places in by_device.items():
        wide = torch.float32 if device.type == "mps" else torch.float64
        for place, number in zip(places, torch.stack([values[i].to(wide) for i in places]).tolist(), strict=True):
            found[place] = number
    return found


def _add_shards(parameters: Sequence[Tensor], facts: Sequence[Facts]) -> None:
    by_mesh: dict[Any, list[int]] = defaultdict(list)
    for place, parameter in enumerate(parameters):
        if dims := shard_dims(parameter):
            by_mesh[parameter.device_mesh, tuple(dims)].append(place)  # type: ignore[attr-defined]
    for (mesh, dims), places in by_mesh.items():
        rows = [[facts[i].squares, float(not facts[i].finite)] for i in places]
        total = torch.tensor(rows, dtype=torch.float64, device=mesh.device_type)
        for dim in dims:
            torch.distributed.all_reduce(total, group=mesh.get_group(dim))
        for place, (square, wrong) in zip(places, total.tolist(), strict=True):
            facts[place].squares, facts[place].finite = square, wrong == 0
