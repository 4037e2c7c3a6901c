"""Learning rates that are straight lines between given steps."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping


def piecewise_linear(knots: Mapping[int, float]) -> Callable[[int], float]:
    """A multiplier of the learning rate, linear between knots and constant after the last.

    Before the first knot the line starts from 0 at step 0, which is a warm-up; with a knot at 0 it starts there. The
    unit is the optimiser step. The result suits ``torch.optim.lr_scheduler.LambdaLR`` and the ``schedule`` of
    ``danlu.Tiger`` alike: the first update reads step 0, so with a warm-up from 0 it moves nothing.

    Args:
        knots: multipliers by step, both at least 0; ``{1000: 1.0, 10000: 0.1}`` warms up over 1000 steps and falls to a
            tenth at step 10000.

    Returns:
        A function of the number of updates done.

    Raises:
        ValueError: no knots, or a negative step or multiplier.
        TypeError: a step that is not an integer.

    Source: Scientific Spaces archive 9512.
    """
    if not knots:
        raise ValueError("knots must hold at least one step, got none; {0: 1.0} is a constant")
    for step, value in knots.items():
        if isinstance(step, bool) or not isinstance(step, int):
            raise TypeError(f"knots must have integer steps, got {step!r}")
        if step < 0 or not 0 <= value < float("inf"):
            raise ValueError(f"knots must have steps and multipliers >= 0, got {step}: {value}")
    points = dict(sorted({0: 0.0, **knots}.items()))
    steps, values = list(points), list(points.values())

    def multiplier(step: int) -> float:
        right = bisect.bisect_right(steps, step)
        if right == len(steps):
            return values[-1]
        start, stop = steps[right - 1], steps[right]
        share = (step - start) / (stop - start)
        return values[right - 1] + share * (values[right] - values[right - 1])

    return multiplier
