"""The arithmetic of AMED-Solver and AMED-Plugin, one network evaluation at a time.

Everything here is in the coordinates in which a sample is data plus noise: ``z = x / alpha`` at the noise ratio
``s = sigma / alpha``, where the probability-flow ODE is ``dz/ds = epsilon(z, s)``. An interval from t down to u costs
two evaluations, at t and at ``m = u^r t^(1-r)`` between the two; the bases differ in how they put these together.

Source: Scientific Spaces archive 9881; arXiv:2312.00094 (AMED), arXiv:2210.05475 (the analytical first step).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from danlu.diffusion.amed_table import AMEDTable, Coefficients, Lookup, check_length, check_ratios, middle, told_ratio
from danlu.diffusion.multistep import ADAMS_BASHFORTH
from danlu.diffusion.process import as_time, per_sample

__all__ = [
    "BASES",
    "ORDERS",
    "AMEDStepper",
    "AMEDTable",
    "Base",
    "Coefficients",
    "Lookup",
    "check_order",
    "check_ratios",
]

Base = Literal["amed", "euler", "ipndm", "dpm2", "dpm++"]
BASES: tuple[str, ...] = get_args(Base)
#: Largest (and default) order of the bases that remember earlier evaluations.
ORDERS: dict[str, int] = {"ipndm": 4, "dpm++": 3}


class AMEDStepper:
    """Walks z from noise to data, one network evaluation at a time.

    ::

        z = stepper.begin(z)
        while not stepper.done:
            z = stepper.advance(z, epsilon_of(z, stepper.time))

    where ``epsilon_of(z, s)`` is the noise that the network predicts in z when it is told the noise ratio s: for a
    process with other coordinates, the network's input is ``alpha z`` with the alpha of the time that has this ratio.

    Args:
        ratios: noise ratios at the ends of the intervals (intervals + 1,), descending, above 0.
        lookup: gives the coefficients of an interval, an `AMEDTable` for example; ``amed`` with r = 1/2 and the others
            1 is DPM-Solver-2 (the midpoint method in the logarithm of the ratio).
        base: ``amed`` takes the middle's direction for the whole interval; the others apply a solver's own step twice,
            to the middle and from there to the end, the second one scaled by c: ``euler`` (DDIM), ``ipndm``, ``dpm++``
            (multistep on the predicted data), and ``dpm2``, whose step of two evaluations is scaled as a whole.
        order: of ``ipndm`` (1 to 4) and ``dpm++`` (1 to 3); their highest unless given.
        afs: take ``z / sqrt(1 + t^2)`` for the first direction, which costs no evaluation: right to 1e-4 for data of
            unit variance when t is 80.

    Raises:
        ValueError: an unknown base, an order that it does not have, ratios that do not descend above 0.
    """

    def __init__(
        self,
        ratios: Tensor | Sequence[float],
        lookup: Lookup,
        base: Base = "amed",
        order: int | None = None,
        afs: bool = False,
    ) -> None:
        self.ratios = check_ratios(ratios)
        if isinstance(lookup, AMEDTable):
            check_length(len(lookup), self.ratios)
        self.lookup, self.base, self.order, self.afs = lookup, base, check_order(base, order), afs
        #: Evaluations that have gone by; the first interval's first one never does under the analytical first step.
        self.calls = 0
        self._slot = 0
        self._now: Coefficients | None = None
        self._start: Tensor | None = None
        self._history: list[tuple[Tensor, Tensor]] = []

    @property
    def evaluations(self) -> int:
        """How many network evaluations the whole walk takes: two for each interval, one less with the first step."""
        return 2 * (len(self.ratios) - 1) - int(self.afs)

    @property
    def done(self) -> bool:
        """Whether the last ratio has been reached."""
        return self._slot == 2 * (len(self.ratios) - 1)

    @property
    def interval(self) -> int:
        """The interval that the next evaluation belongs to."""
        return self._slot // 2

    @property
    def place(self) -> Tensor:
        """Noise ratio at which z is now: 0-d, or (batch,) inside an interval with coefficients of each sample."""
        if self._now is None:
            return self.ratios[self.interval]
        return middle(self.ratios[self.interval], self.ratios[self.interval + 1], self._now.r)

    @property
    def time(self) -> Tensor:
        """Noise ratio that the network must be told at the next evaluation: the place, times a inside an interval.

        It stays between the first ratio and the last, where networks are trained.
        """
        return self.place if self._now is None else told_ratio(self._now.a, self.place, self.ratios)

    def begin(self, z: Tensor) -> Tensor:
        """Take the analytical first step, if there is one: z at the place of the first evaluation.

        Raises:
            ValueError: the walk has begun already.
        """
        if self._slot:
            raise ValueError(f"begin must be called once, before the first evaluation, got it after step {self._slot}")
        if not self.afs:
            return z
        return self._to_middle(z, z / per_sample((1 + self.ratios[0] ** 2).sqrt(), z), None)

    def advance(self, z: Tensor, epsilon: Tensor) -> Tensor:
        """Use one network evaluation.

        Args:
            z: what `begin` or the last `advance` returned (batch, ...).
            epsilon: noise predicted in z by the network that was told `time`, of the shape of z.

        Returns:
            z at the next `place`, in the dtype of z.

        Raises:
            ValueError: nothing left to do, `begin` forgotten, or shapes that differ.
        """
        if self.done:
            raise ValueError(f"the walk is over after {self.evaluations} evaluations: make a new AMEDStepper")
        if self.afs and self._slot == 0:
            raise ValueError("begin(z) must come before the first evaluation when afs is on")
        if epsilon.shape != z.shape:
            raise ValueError(f"epsilon must have the shape of z {tuple(z.shape)}, got {tuple(epsilon.shape)}")
        self.calls += 1
        epsilon = epsilon.to(z.dtype)
        return self._to_middle(z, epsilon, epsilon) if self._now is None else self._to_end(z, epsilon)

    def detach(self) -> None:
        """Cut what is remembered out of the graph of gradients."""
        self._history = [(ratio.detach(), direction.detach()) for ratio, direction in self._history]

    def _to_middle(self, z: Tensor, d: Tensor, epsilon: Tensor | None) -> Tensor:
        self._start = z
        self._now = self.lookup(self.interval, z, epsilon)
        start, stop = self.ratios[self.interval], self.place
        self._remember(start, z, d)
        moved = z + self._step(z, start, stop)
        self._slot += 1
        return moved

    def _to_end(self, y: Tensor, epsilon: Tensor) -> Tensor:
        now, z = self._now, self._start
        assert now is not None and z is not None
        t, u, m = self.ratios[self.interval], self.ratios[self.interval + 1], self.place
        # The network was told a m, but the noise is what moves y to the data over the ratio m: (y - D) / m.
        d_m = per_sample(self.time / m, y) * epsilon
        self._remember(m, y, d_m)
        c = per_sample(as_time(now.c), y)
        if self.base == "amed":
            moved = z + c * per_sample(u - t, z) * d_m
        elif self.base == "dpm2":
            d = self._history[-2][1]
            share = per_sample(1 / (2 * as_time(now.r)), y)
            moved = z + c * per_sample(u - t, z) * (d + share * (d_m - d))
        else:
            moved = y + c * self._step(y, m, u)
        self._slot += 1
        self._now = self._start = None
        return moved

    def _remember(self, ratio: Tensor, z: Tensor, direction: Tensor) -> None:
        """Keep the newest directions, or what they say about the data where the base works on that."""
        value = z - per_sample(ratio, z) * direction if self.base == "dpm++" else direction
        keep = 2 if self.base == "dpm2" else self.order
        self._history = [*self._history, (ratio, value)][-keep:]

    def _step(self, z: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        """The base's own step from ``start`` to ``stop``: what it adds to z."""
        newest = self._history[::-1]
        if self.base == "dpm++":
            left = 2 * (len(self.ratios) - 1) - self._slot
            return data_step(z, start, stop, newest[: min(self.order, left)])
        direction = newest[0][1]
        if self.base == "ipndm":
            terms = zip(ADAMS_BASHFORTH[len(newest) - 1], newest, strict=True)
            direction = sum((weight * d for weight, (_, d) in terms), torch.zeros_like(z))
        return per_sample(_across(stop, start), z) * direction


def data_step(z: Tensor, start: Tensor, stop: Tensor, newest: list[tuple[Tensor, Tensor]]) -> Tensor:
    """What a step of DPM-Solver++ adds to z, with the coefficients of the published code (and of diffusers).

    Args:
        z: at the ratio ``start``.
        start: noise ratio, 0-d or (batch,).
        stop: noise ratio of the end of the step, likewise.
        newest: ratio and predicted data of one to three evaluations, newest first; as many as the order.

    Returns:
        A tensor of the shape of z.

    Source: arXiv:2211.01095.
    """
    h = _log_across(start, stop)
    gone = -torch.expm1(-h)
    data = newest[0][1]
    moved = per_sample(gone, z) * (data - z)
    if len(newest) == 1:
        return moved
    r0 = _log_across(newest[1][0], newest[0][0]) / h
    slope = (data - newest[1][1]) / per_sample(r0, z)
    if len(newest) == 2:
        return moved + per_sample(gone / 2, z) * slope
    r1 = _log_across(newest[2][0], newest[1][0]) / h
    older = (newest[1][1] - newest[2][1]) / per_sample(r1, z)
    bend = (slope - older) / per_sample(r0 + r1, z)
    slope = slope + per_sample(r0, z) * bend
    return moved + per_sample(1 - gone / h, z) * slope + per_sample(0.5 - (h - gone) / h**2, z) * bend


def check_order(base: str, order: int | None) -> int:
    """The order a base runs at.

    Raises:
        ValueError: an unknown base, or an order that it does not have.
    """
    if base not in BASES:
        raise ValueError(f"base must be one of {', '.join(BASES)}, got {base!r}")
    highest = ORDERS.get(base)
    if highest is None:
        if order is not None:
            raise ValueError(f"order is a choice of {' and '.join(ORDERS)} alone, got {order} for base {base!r}")
        return 1
    if order is None:
        return highest
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= highest:
        raise ValueError(f"order must be an integer in 1..{highest} for base {base!r}, got {order!r}")
    return order


def _across(stop: Tensor, start: Tensor) -> Tensor:
    """``stop - start`` on the device of the one that has a batch."""
    device = stop.device if stop.dim() else start.device
    return stop.to(device) - start.to(device)


def _log_across(start: Tensor, stop: Tensor) -> Tensor:
    """``log(start / stop)``, the step in the half log signal-to-noise ratio."""
    return _across(start.log(), stop.log())
