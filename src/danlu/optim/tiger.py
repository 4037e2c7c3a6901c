"""Tiger: sign momentum with one learning rate for all sizes, whose momentum is also the gradient accumulator."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from danlu.kernels.signs import SignUpdate, apply, is_finite, sum_of_squares
from danlu.optim.momentum import SignMomentum, check_number, checked_gradient, evaluated, local
from danlu.optim.schedule import piecewise_linear
from danlu.optim.windows import Facts, Item, beta_where, facts_of, row_decay, row_rms

logger = logging.getLogger("danlu.optim")

RULES = ("auto", "rms", "row_rms", "half", "plain")
NONFINITE = ("shrink", "skip", "raise", "ignore")


class Tiger(SignMomentum):
    """Tiger: one state tensor per parameter, which also accumulates gradients, and rates relative to the parameter.

        m     <- b*m + (1-b) * mean of the window's gradients
        theta <- theta - eta * (sign(m) + lambda*theta)

    ``eta`` and ``lambda`` follow the ``rule`` of the parameter, with alpha = ``lr`` times the schedule:

    - ``rms``: eta = alpha * RMS(theta) of the whole tensor before the update, lambda = ``weight_decay``; for matrices.
    - ``row_rms``: the same for each row of a table; for embeddings. With ``lazy_rows`` a row whose gradient is exactly
      zero in the whole window keeps its m and theta, so that a token seen once does not drift for ever.
    - ``half``: eta = alpha / 2, lambda = 0; for biases and gains.
    - ``plain``: eta = alpha, lambda = ``weight_decay``; this is Signum.
    - ``auto``: ``rms`` for two dimensions and more, else ``half``. ``tiger_param_groups`` knows better.

    **Accumulation.** ``step`` closes a micro-batch; every ``accumulation_steps``-th call closes the window and moves
    the parameters. It takes the gradients (``.grad`` becomes None where ``accumulation_steps`` > 1), so there is no
    buffer beside m. ``danlu.fold_in_backward`` takes them inside the backward pass. The state ``momentum`` holds
    M = m*k/(1-b), k = gradients per window: M <- b*M + sum of the gradients. It has the sign of m, does not underflow
    in float16 (it saturates there instead of overflowing), and no loop has to divide its loss by k.

    **Gradients that are not finite** leave the parameter's m as it is, and with ``nonfinite="shrink"`` theta moves
    towards its centre: theta <- (theta - c)*s + c, once for each such micro-batch. The others of the window count.

    The sum of squares of a parameter is kept from its last update where that gave it for nothing, as long as PyTorch's
    version counter shows no other change; a change through ``.data`` is seen one step late.

    Args:
        params: parameters or groups, real and dense. Groups may set ``lr``, ``beta``, ``weight_decay``, ``rule``,
            ``centre``, ``min_rms``, ``lazy_rows``, ``maximize``.
        lr: alpha, the relative learning rate, >= 0; 1e-3 to 2e-3 is usual at any size.
        beta: b in [0, 1); 0.965 for language, 0.945 for vision.
        weight_decay: lambda >= 0, multiplied by eta.
        accumulation_steps: calls of ``step`` per window, >= 1; leave it at 1 in loops that accumulate by themselves.
        rule: see above.
        centre: c, where a parameter shrinks to; 1 for gains.
        min_rms: floor of the RMS, >= 0. A matrix of zeros has RMS 0 and never moves without one.
        lazy_rows: see above.
        nonfinite: "shrink", "skip" (leave theta too), "raise" (FloatingPointError before anything moves), or "ignore":
            not to look, as other optimisers do, which saves a pass over the gradients and lets a NaN into m.
        shrink: s in (0, 1].
        schedule: multipliers of ``lr`` by update, piecewise linear, see ``piecewise_linear``; none is 1.
        maximize: ascend.
        stochastic_rounding: round half-precision parameters and states at random, so that small steps are not lost;
            the draws depend on ``seed``, the step and the parameter alone, hence resuming repeats them.
        state_dtype: type of the momentum; none is that of the parameter.
        foreach: list operations; none chooses them off the CPU.
        fused: compiled loops (CPU) or torch.compile; none uses the loops.
        seed: of the random rounding.

    Raises:
        ValueError: a number or name out of range, or ``foreach`` together with ``fused``.
        TypeError: complex or integer parameters, or an ``accumulation_steps`` that is no integer.

    Source: Scientific Spaces archives 9512, 8634, 9736.
    """

    _attributes = (*SignMomentum._attributes, "accumulation_steps", "nonfinite", "shrink", "schedule")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        beta: float = 0.965,
        weight_decay: float = 0.01,
        *,
        accumulation_steps: int = 1,
        rule: str = "auto",
        centre: float = 0.0,
        min_rms: float = 0.0,
        lazy_rows: bool = True,
        nonfinite: str = "shrink",
        shrink: float = 0.99,
        schedule: Mapping[int, float] | None = None,
        maximize: bool = False,
        stochastic_rounding: bool = True,
        state_dtype: torch.dtype | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        seed: int = 0,
    ):
        if isinstance(accumulation_steps, bool) or not isinstance(accumulation_steps, int):
            raise TypeError(f"accumulation_steps must be an integer, got {accumulation_steps!r}")
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps must be at least 1, got {accumulation_steps}")
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite must be one of {', '.join(NONFINITE)}, got {nonfinite!r}")
        if not 0 < shrink <= 1:
            raise ValueError(f"shrink must be in (0, 1], got {shrink}; 0.99 is usual")
        if schedule is not None:
            piecewise_linear(schedule)
        self.accumulation_steps, self.nonfinite, self.shrink = accumulation_steps, nonfinite, shrink
        self.schedule = None if schedule is None else dict(schedule)
        self._reset()
        super().__init__(
            params,
            {
                "lr": lr,
                "beta": beta,
                "weight_decay": weight_decay,
                "rule": rule,
                "centre": centre,
                "min_rms": min_rms,
                "lazy_rows": lazy_rows,
                "maximize": maximize,
            },
            stochastic_rounding=stochastic_rounding,
            state_dtype=state_dtype,
            foreach=foreach,
            fused=fused,
            seed=seed,
        )

    def _reset(self) -> None:
        """What is not saved: sums of squares, what folding attaches, and whether a warning was given."""
        self._squares: dict[int, tuple[int, int, float]] = {}
        self._agree: Callable[[], None] | None = None
        self._folded = False
        self._warned = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._reset()
        super().__setstate__(state)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_number("beta", group["beta"], 0.0, 1.0, "0.965 is usual for language")
        check_number("min_rms", group["min_rms"], 0.0, math.inf, "0 is off, 1e-3 lets matrices of zeros start")
        if group["rule"] not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {group['rule']!r}")
        if group["rule"] == "row_rms" and (odd := [p.ndim for p in group["params"] if p.ndim != 2]):
            raise ValueError(f"rule row_rms is for tables of two dimensions, got {odd[0]}; use rule='rms'")
        group["micro"] = self.param_groups[0].get("micro", 0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Close a micro-batch, and at the end of a window move the parameters; returns the closure's loss."""
        loss = evaluated(closure)
        if getattr(self, "grad_scale", None) is not None:
            raise ValueError(
                "a GradScaler changes its scale between gradients that are already folded together; use bfloat16, or a "
                "constant factor on the loss, which cancels in the sign"
            )
        micro = self.param_groups[0]["micro"] + 1
        boundary = micro % self.accumulation_steps == 0
        if boundary and self._agree is not None:
            self._agree()
        items = list(self._items())
        # Reading a flag is free on the CPU, so each tensor is measured and updated while it is in the cache. Elsewhere,
        # across ranks, and where an error must come before any change, all are measured first.
        apart = self.nonfinite != "raise" and self.foreach is not True
        apart = apart and all(item.parameter.device.type == "cpu" and item.shard is None for item in items)
        multiplier = 1.0
        if self.schedule is not None and boundary:
            multiplier = piecewise_linear(self.schedule)(self.param_groups[0]["step"])
        for batch in [[item] for item in items] if apart else [items]:
            self._advance(batch, boundary, multiplier)
        for group in self.param_groups:
            group["micro"] = micro % self.accumulation_steps
            group["step"] += boundary
        return loss

    def _items(self) -> Iterator[Item]:
        index = -1
        for group in self.param_groups:
            for parameter in group["params"]:
                index += 1
                gradient = parameter.grad
                if gradient is not None:
                    yield Item(parameter, group, index, local(checked_gradient(parameter, gradient)))
                elif "arrived" in self.state[parameter]:
                    yield Item(parameter, group, index, None)

    def _advance(self, batch: list[Item], boundary: bool, multiplier: float) -> None:
        """Take the gradients of a batch of parameters, shrink what was not finite, and step at the end of a window."""
        measured = facts_of(
            [item.parameter for item in batch],
            [item.gradient for item in batch],
            [self.state[item.parameter].get("window") for item in batch],
            [self._known_squares(item) if boundary and item.rule == "rms" else 0.0 for item in batch],
            look=self.nonfinite != "ignore",
        )
        if self.nonfinite == "raise":
            for item, facts in zip(batch, measured, strict=True):
                self._raise_if(not facts.finite, item)
        updates: list[SignUpdate] = []
        stepped: list[Item | None] = []
        for item, facts in zip(batch, measured, strict=True):
            state = self.state[item.parameter]
            update = self._fed(item, facts)
            if facts.bad and self.nonfinite == "shrink":
                centre = item.group["centre"]
                local(item.parameter).sub_(centre).mul_(self.shrink**facts.bad).add_(centre)
                if boundary and item.rule == "rms":  # the rate is relative to what is there now
                    again = sum_of_squares(local(item.parameter))
                    facts.squares = facts_of([item.parameter], [None], [None], [again])[0].squares
            if boundary and facts.folded:
                updates.append(self._stepped(item, facts, update, multiplier))
                stepped.append(item)
            elif update is not None:
                updates.append(update)
                stepped.append(None)
            if boundary:
                for key in ("window", "arrived", "rows"):
                    state.pop(key, None)
            else:
                device = local(item.parameter).device
                state["window"] = torch.tensor([facts.folded, 0], device=device)
            if self.accumulation_steps > 1:
                item.parameter.grad = None
        for found, square in zip(stepped, self._apply(updates), strict=True):
            if found is not None and square is not None and found.shard is None:
                parameter = found.parameter
                self._squares[id(parameter)] = (parameter._version, parameter.data_ptr(), square)

    def _known_squares(self, item: Item) -> float | Tensor:
        parameter = item.parameter
        version, address, square = self._squares.get(id(parameter), (-1, -1, 0.0))
        if version == parameter._version and address == parameter.data_ptr() and item.shard is None:
            return square
        return sum_of_squares(local(parameter))

    def _fed(self, item: Item, facts: Facts) -> SignUpdate | None:
        """Feeding the gradient to the momentum, or none if there is none that is finite; counts it."""
        state, group = self.state[item.parameter], item.group
        count = state.get("arrived", 0)
        if item.gradient is None:
            return None
        state["arrived"] = count + 1
        if not facts.finite:
            facts.bad += 1
            return None
        decay: float | Tensor = 1.0 if facts.folded else float(group["beta"])
        if item.rule == "row_rms" and group["lazy_rows"]:
            decay = row_decay(state, item.gradient, group["beta"])
        facts.folded += 1
        noise = self._noise(group["step"], item.index, item.shard or 0)
        momentum = local(self._momentum(item.parameter))
        return SignUpdate(None, momentum, item.gradient, decay, decay, noise=noise, count=count)

    def _stepped(self, item: Item, facts: Facts, update: SignUpdate | None, multiplier: float) -> SignUpdate:
        """The same update with the step along the sign."""
        parameter, group = item.parameter, item.group
        alpha = float(group["lr"]) * multiplier
        if update is None:
            noise = self._noise(group["step"], item.index, item.shard or 0)
            update = SignUpdate(None, local(self._momentum(parameter)), None, noise=noise)
        rate: float | Tensor = alpha
        if item.rule == "rms":
            rms = math.sqrt(facts.squares / max(1, parameter.numel()))
            self._warn_if(rms == 0 and not group["min_rms"], item)
            rate = alpha * max(rms, group["min_rms"])
        elif item.rule == "row_rms":
            rows = self.state[parameter].get("rows")
            by_row = row_rms(parameter)
            if group["step"] == 0 and not group["min_rms"]:
                zero = by_row == 0 if rows is None else (by_row == 0) & rows[:, None]
                self._warn_if(bool(zero.any()), item)
            rate = alpha * by_row.clamp(min=group["min_rms"])
            rate = rate if rows is None else torch.where(rows[:, None], rate, 0.0)
        elif item.rule == "half":
            rate = alpha / 2
        update.parameter = local(parameter)
        update.keep = 1.0 if item.rule == "half" else 1.0 - rate * group["weight_decay"]
        update.rate = -rate if group["maximize"] else rate
        return update

    def _fold(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], index: int) -> None:
        """Take one gradient inside the backward pass: it is fed to the momentum, and theta stays until ``step``."""
        item = Item(parameter, group, index, local(checked_gradient(parameter, gradient)))
        state, fed = self.state[parameter], item.gradient
        if fed is None or fed.device.type == "cpu":
            window = state.get("window")
            (facts,) = facts_of([parameter], [fed], [window], [0.0], across=False, look=self.nonfinite != "ignore")
            self._raise_if(not facts.finite, item)
            update = self._fed(item, facts)
            state["window"] = torch.tensor([facts.folded, facts.bad])
        else:
            update = self._fold_unread(item, fed)
        if update is not None:
            apply(update, loops=self.fused is not False, compiled=bool(self.fused))

    def _fold_unread(self, item: Item, gradient: Tensor) -> SignUpdate:
        """The same without reading anything back from the device, which would stop the backward pass."""
        state, group = self.state[item.parameter], item.group
        good = torch.as_tensor(self.nonfinite == "ignore" or is_finite(gradient), device=gradient.device)
        if self.nonfinite == "raise":
            self._raise_if(not good, item)
        if self.nonfinite != "ignore":
            gradient.masked_fill_(~good, 0.0)
        window = state.get("window", torch.zeros(2, dtype=torch.int64, device=gradient.device))
        if item.rule == "row_rms" and group["lazy_rows"]:
            decay = row_decay(state, gradient, group["beta"])
        else:
            decay = beta_where(good & (window[0] == 0), group["beta"], gradient)
        state["window"] = window + torch.stack([good, ~good])
        count, state["arrived"] = state.get("arrived", 0), state.get("arrived", 0) + 1
        noise = self._noise(group["step"], item.index, item.shard or 0)
        momentum = local(self._momentum(item.parameter))
        return SignUpdate(None, momentum, gradient, decay, decay, noise=noise, count=count)

    def _raise_if(self, wrong: bool, item: Item) -> None:
        if wrong and self.nonfinite == "raise":
            raise FloatingPointError(
                f"the gradient of parameter {item.index}, shape {tuple(item.parameter.shape)}, is not finite; "
                "nonfinite='shrink' goes on without it"
            )

    def _warn_if(self, wrong: bool, item: Item) -> None:
        if wrong and not self._warned:
            self._warned = True
            logger.warning(
                "parameter %d of shape %s, or a row of it, is all zeros: a rate relative to its RMS never moves it; "
                "set min_rms, 1e-3 for example",
                item.index,
                tuple(item.parameter.shape),
            )
