"""How the earth-mover loss and cross entropy are mixed: per token by released ratios, over training by a schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy
from torch import Tensor

MODES = ("mix1", "mix2", "emo", "weighted")
RATIOS = ("released", "plain")

#: Below this a loss is not divided by: half precision would make the released 1e-10 a division by zero.
FLOOR = 1e-6


@dataclass(frozen=True)
class Mixture:
    """A loss of one token made of its cross entropy CE and its earth-mover loss EMO.

    ``X`` is EMO', which is EMO plus the target's own probability, for ``ratio="released"``, and EMO for
    ``ratio="plain"``; its gradient is that of EMO. Ratios are constants of the gradient.

    Args:
        mode: ``mix1``: (CE + [CE/X] X)/2, whose value is CE. ``mix2``: X + [X/CE] CE, whose value is 2 X. ``emo``:
            EMO. ``weighted``: CE + weight EMO.
        weight: for ``weighted`` alone, >= 0.
        ratio: what X is; ``released`` is what the published code computes.
        ratio_clip: for ``mix1`` alone, upper bound of the ratio, > 0; none leaves it free. Where it binds, the value
            is below CE.

    Raises:
        ValueError: an unknown mode or ratio, or a number that is missing, out of range or without a use in this mode.
    """

    mode: str = "mix1"
    weight: float | None = None
    ratio: str = "released"
    ratio_clip: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.ratio not in RATIOS:
            raise ValueError(f"ratio must be one of {', '.join(RATIOS)}, got {self.ratio!r}")
        if self.mode == "weighted":
            if self.weight is None or not 0 <= self.weight < math.inf:
                raise ValueError(f"weight must be a finite number >= 0 in mode 'weighted', got {self.weight}")
        elif self.weight is not None:
            raise ValueError(f"weight must be None in mode {self.mode!r}, got {self.weight}; use mode='weighted'")
        if self.ratio_clip is not None:
            if self.mode != "mix1":
                raise ValueError(f"ratio_clip must be None in mode {self.mode!r}, got {self.ratio_clip}; use 'mix1'")
            if not self.ratio_clip > 0:
                raise ValueError(f"ratio_clip must be > 0, got {self.ratio_clip}; 3 is what one released script uses")

    def combine(self, ce: Tensor, emo: Tensor, own: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """Value of each token's loss and what the gradients of CE and EMO are multiplied with.

        Args:
            ce: cross entropy.
            emo: earth-mover loss.
            own: what the target's own probability contributes to 1 - EMO.
            share: of this mixture, in 0..1; the rest is cross entropy.

        Returns:
            Value, weight of CE's gradient, weight of EMO's gradient, each of the shape of ``ce``.
        """
        one = ce.new_ones(()).expand_as(ce)
        x = emo + own if self.ratio == "released" else emo
        if self.mode == "mix1":
            r = ce.clamp_min(FLOOR) / x.clamp_min(FLOOR)
            if self.ratio_clip is not None:
                r = r.clamp_max(self.ratio_clip)
            value, of_ce, of_emo = 0.5 * (ce + r * x), 0.5 * one, 0.5 * r
        elif self.mode == "mix2":
            r = x.clamp_min(FLOOR) / ce.clamp_min(FLOOR)
            value, of_ce, of_emo = x + r * ce, r, one
        elif self.mode == "emo":
            value, of_ce, of_emo = emo, 0 * one, one
        else:
            weight = self.weight or 0.0
            value, of_ce, of_emo = ce + weight * emo, one, weight * one
        if share == 1:
            return value, of_ce, of_emo
        return (1 - share) * ce + share * value, (1 - share) + share * of_ce, share * of_emo


@dataclass(frozen=True)
class MixingSchedule:
    """Share of the earth-mover mixture over training, linear between points and constant outside of them.

    The loss of a step is (1 - share) CE + share L, with L the chosen mixture.

    Args:
        points: (step, share) pairs, steps >= 0 and rising, shares in 0..1. ``((0, 0.0), (1000, 1.0))`` goes from
            cross entropy to the mixture within the first thousand steps.

    Raises:
        ValueError: no points, steps that do not rise, or a share out of range.
    """

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", tuple((int(step), float(share)) for step, share in self.points))
        if not self.points:
            raise ValueError("points must hold at least one (step, share) pair, got none")
        steps = [step for step, _ in self.points]
        if steps[0] < 0 or any(a >= b for a, b in zip(steps, steps[1:], strict=False)):
            raise ValueError(f"steps in points must be >= 0 and rise, got {steps}")
        for step, share in self.points:
            if not 0 <= share <= 1:
                raise ValueError(f"share in points must lie in 0..1, got {share} at step {step}")

    def __call__(self, step: int) -> float:
        """The share at a step."""
        return float(numpy.interp(step, [s for s, _ in self.points], [share for _, share in self.points]))
