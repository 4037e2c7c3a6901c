"""Residual warm-up: a post-norm model learns its branches one small step after the other."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import TrainerCallback

__all__ = ["ResidualWarmupCallback", "set_residual_alpha"]

logger = logging.getLogger("danlu.models")


def set_residual_alpha(model: nn.Module, value: float) -> int:
    """Set the factor of the branches, x <- N(x + alpha F(x)), everywhere in a model.

    Args:
        model: has buffers ``residual_alpha`` of no dimension: RoFormerV2, or post-norm blocks of your own.
        value: alpha, 0..1.

    Returns:
        How many buffers there are.

    Raises:
        ValueError: ``value`` out of range, or no such buffer.

    Source: Scientific Spaces archive 8998
    """
    if not 0 <= value <= 1:
        raise ValueError(f"value must be in 0..1, got {value}")
    found = [buffer for name, buffer in model.named_buffers() if name.split(".")[-1] == "residual_alpha"]
    if not found:
        raise ValueError(
            f"model must have a buffer residual_alpha, as RoFormerV2 has, got {type(model).__name__} without one"
        )
    for buffer in found:
        buffer.fill_(value)
    return len(found)


class ResidualWarmupCallback(TrainerCallback):
    """Raise alpha from 0 to 1 over the first steps of the host's Trainer, then leave it at 1.

    Alpha is a function of the global step, so a resumed run goes on where it stood. It is not a learning-rate
    schedule, and does not replace one. ``ReZero`` would train alpha; here it is not trained.

    Args:
        steps: optimiser steps until alpha is 1, >= 1; the source says "slowly" (tens of thousands in a long
            pre-training); half of a short run was good in the lab.

    Raises:
        ValueError: ``steps`` is not a positive whole number.

    Source: Scientific Spaces archive 8998
    """

    def __init__(self, steps: int) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a whole number >= 1, got {steps!r}")
        self.steps = steps

    def alpha(self, step: int) -> float:
        """The factor at an optimiser step, counted from 0."""
        return min(1.0, step / self.steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Set alpha for the step that begins."""
        set_residual_alpha(model, self.alpha(state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Set alpha for the model as trained, and say so when the warm-up is not over."""
        last = self.alpha(state.global_step)
        set_residual_alpha(model, last)
        if last < 1:
            logger.warning(
                "training ended at step %d of the residual warm-up's %d: the model needs residual_alpha = %.4g",
                state.global_step, self.steps, last,
            )  # fmt: skip
