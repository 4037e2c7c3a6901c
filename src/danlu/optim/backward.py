"""Gradients that are used up as they appear: one hook per parameter takes a gradient, hands it on, and frees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Consume = Callable[[nn.Parameter, Tensor], None]


class GradientConsumer:
    """Calls ``consume(parameter, gradient)`` inside the backward pass for each parameter, and leaves ``.grad`` empty.

    A gradient is handed on once per backward pass (per re-computed segment under re-entrant checkpointing), after all
    uses of a tied parameter are summed. While the consumer is attached at most one of its gradients is alive at a time,
    so the peak of the backward pass falls by the size of all the others.

    Args:
        parameters: leaves that require gradients; frozen ones are refused, because they would never be seen.
        consume: runs without gradient recording; the gradient is its own to change.

    Raises:
        ValueError: a frozen parameter, or a ``.grad`` that is already there and would be lost.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], consume: Consume):
        self.parameters = list(parameters)
        for parameter in self.parameters:
            if not parameter.requires_grad:
                raise ValueError("parameters must require gradients, got one that is frozen; leave it out")
            if parameter.grad is not None:
                raise ValueError("parameters must have no gradient yet, got one that has; call zero_grad() first")
        self._consume = consume
        self._handles = [parameter.register_post_accumulate_grad_hook(self._take) for parameter in self.parameters]

    def _take(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            with torch.no_grad():
                self._consume(parameter, gradient)  # type: ignore[arg-type]

    def remove(self) -> None:
        """Detach from the backward pass; gradients accumulate in ``.grad`` again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
