"""Lion: the sign of an interpolation between momentum and gradient, with one state tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from danlu.kernels.signs import SignUpdate
from danlu.optim.momentum import SignMomentum, check_number, checked_gradient, evaluated, local, shard_of


class Lion(SignMomentum):
    """Lion, as found by symbolic search: memory of one tensor per parameter, half of AdamW's.

        theta <- theta - lr * (sign(b1*m + (1-b1)*g) + weight_decay * theta)
        m     <- b2*m + (1-b2)*g

    Against AdamW's settings take the learning rate 3 to 10 times smaller and the weight decay larger by the same
    factor; language models like betas (0.95, 0.98). It wants large batches (64 and more) and, where it diverges, a
    longer warm-up. Gradients cannot be accumulated in ``m``, since the sign needs the old ``m`` and the whole gradient
    separately: ``danlu.Tiger`` can.

    The state ``momentum`` holds ``m / (1-b2)``, which has the same sign and does not underflow in float16; there it
    saturates instead of overflowing. With b1 = b2 this is ``Tiger(rule="plain")``.

    Args:
        params: parameters or groups, real and dense.
        lr: learning rate, >= 0.
        betas: weight of the momentum in the sign, and its decay, each in [0, 1).
        weight_decay: decoupled, multiplied by ``lr``, >= 0.
        maximize: ascend.
        stochastic_rounding: round half-precision parameters and states at random, so that small steps are not lost;
            the draws depend on ``seed``, the step and the parameter alone.
        state_dtype: type of the state; none is that of the parameter.
        foreach: list operations; none chooses them off the CPU.
        fused: compiled loops (CPU) or torch.compile; none uses the loops.
        seed: of the random rounding.

    Raises:
        ValueError: a number out of range, or ``foreach`` together with ``fused``.
        TypeError: complex or integer parameters.

    Source: Scientific Spaces archive 9473; arXiv:2302.06675.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        stochastic_rounding: bool = True,
        state_dtype: torch.dtype | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        seed: int = 0,
    ):
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize},
            stochastic_rounding=stochastic_rounding,
            state_dtype=state_dtype,
            foreach=foreach,
            fused=fused,
            seed=seed,
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for name, beta in zip(("betas[0]", "betas[1]"), group["betas"], strict=True):
            check_number(name, beta, 0.0, 1.0, "(0.9, 0.99) is usual, (0.95, 0.98) for language")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = evaluated(closure)
        updates: list[SignUpdate] = []
        index = -1
        for group in self.param_groups:
            rate, (b1, b2) = float(group["lr"]), group["betas"]
            for parameter in group["params"]:
                index += 1
                if parameter.grad is None:
                    continue
                gradient = local(checked_gradient(parameter, parameter.grad))
                updates.append(
                    SignUpdate(
                        local(parameter),
                        local(self._momentum(parameter)),
                        gradient,
                        look=b1 * (1 - b2) / (1 - b1),
                        decay=b2,
                        keep=1 - rate * group["weight_decay"],
                        rate=-rate if group["maximize"] else rate,
                        noise=self._noise(group["step"], index, shard_of(parameter)),
                    )
                )
            group["step"] += 1
        self._apply(updates)
        return loss
