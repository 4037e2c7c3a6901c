"""What is learned about the intervals of AMED: coefficients of one interval, and a table of them for all samples.

Source: arXiv:2312.00094.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from danlu.diffusion.process import as_time


@dataclass(frozen=True)
class Coefficients:
    """What is learned about one interval; each is 0-d or (batch,).

    Args:
        r: place of the middle on the logarithmic scale, 0 (at the start) to 1 (at the end).
        c: factor of the second step.
        a: factor of the noise ratio that the network is told in the middle.
    """

    r: Tensor
    c: Tensor
    a: Tensor


#: Asked once for each interval, after its first evaluation: the interval, z at its start, and the noise predicted
#: there, which is None where the analytical first step saved that evaluation.
Lookup = Callable[[int, Tensor, Tensor | None], Coefficients]


@dataclass(frozen=True)
class AMEDTable:
    """Coefficients that are the same for all samples: one number for each interval.

    Args:
        r: places of the middles, above 0 and at most 1.
        c: factors of the second steps, above 0; ones unless given.
        a: factors of the noise ratios told to the network, above 0; ones unless given.

    Raises:
        ValueError: lengths that differ, or a number outside its range.
    """

    r: tuple[float, ...]
    c: tuple[float, ...] = ()
    a: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("r", "c", "a"):
            values = tuple(float(value) for value in getattr(self, name)) or (1.0,) * len(self.r)
            object.__setattr__(self, name, values)
            if len(values) != len(self.r) or not values:
                raise ValueError(f"{name} must hold one number for each interval, {len(self.r)}, got {len(values)}")
            top = 1.0 if name == "r" else float("inf")
            wrong = [value for value in values if not 0 < value <= top or value == float("inf")]
            if wrong:
                raise ValueError(f"{name} must be above 0{' and at most 1' if name == 'r' else ''}, got {wrong[0]}")

    def __len__(self) -> int:
        return len(self.r)

    def __call__(self, interval: int, z: Tensor, epsilon: Tensor | None) -> Coefficients:
        """Coefficients of an interval, whatever the sample."""
        r, c, a = (torch.tensor(values[interval], dtype=torch.float64) for values in (self.r, self.c, self.a))
        return Coefficients(r, c, a)

    def told(self, ratios: Tensor | Sequence[float], afs: bool = False) -> Tensor:
        """Noise ratios that the network is told, one for each evaluation, in order.

        Args:
            ratios: ends of the intervals (intervals + 1,), descending.
            afs: whether the first direction is the analytical one, which saves the first evaluation.

        Returns:
            float64 ratios (2 * intervals - afs,).
        """
        ratios = check_ratios(ratios)
        check_length(len(self), ratios)
        r, a = (torch.tensor(values, dtype=torch.float64) for values in (self.r, self.a))
        middles = told_ratio(a, middle(ratios[:-1], ratios[1:], r), ratios)
        return torch.stack([ratios[:-1], middles], 1).flatten()[int(afs) :]


def middle(t: Tensor, u: Tensor, r: Tensor) -> Tensor:
    """The ratio ``u^r t^(1-r)`` between t and u: t where r is 0, u where r is 1."""
    r = as_time(r)
    return (r * u.log().to(r.device) + (1 - r) * t.log().to(r.device)).exp()


def told_ratio(a: Tensor, place: Tensor, ratios: Tensor) -> Tensor:
    """The ratio ``a m`` that the network is told for a place m, kept between the first of the ratios and the last."""
    return (as_time(a).to(place.device) * place).clamp(float(ratios[-1].detach()), float(ratios[0].detach()))


def check_ratios(ratios: Tensor | Sequence[float]) -> Tensor:
    """Noise ratios as float64, once they are known to descend above 0.

    Raises:
        ValueError: fewer than two, not one axis, one that is 0 or infinite, or not strictly descending.
    """
    ratios = as_time(ratios if isinstance(ratios, Tensor) else torch.tensor(ratios, dtype=torch.float64))
    if ratios.dim() != 1 or len(ratios) < 2:
        raise ValueError(f"ratios must be one axis of at least two noise ratios, got shape {tuple(ratios.shape)}")
    if not bool((torch.isfinite(ratios) & (ratios > 0)).all()):
        raise ValueError(
            f"noise ratios sigma / alpha must be finite and above 0, got {ratios.tolist()}: between a ratio and 0 "
            "there is no geometric middle; stop the grid at a small one, and start it below the time where alpha is 0"
        )
    if not bool((ratios.diff() < 0).all()):
        raise ValueError(f"noise ratios must descend strictly, got {ratios.tolist()}")
    return ratios


def check_length(length: int, ratios: Tensor) -> None:
    """Refuse a table that is for another number of intervals."""
    if length != len(ratios) - 1:
        raise ValueError(f"the table is for {length} intervals, but {len(ratios)} times make {len(ratios) - 1}")
