"""Straightening a flow by its own pairs, and distilling it to a few steps.

Reflow: run the flow from many samples of the prior, and train it again on the pairs ``(x_0, x_1)`` of start and end
that come out. Marginals stay, no convex transport cost grows, and trajectories become straighter, so that few Euler
steps suffice. Distillation comes after: fit the few steps alone.

Source: Scientific Spaces archive 9497; arXiv:2209.03003.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from danlu.diffusion.flow import VelocityModel, flow_matching_loss, predict
from danlu.diffusion.paths import LinearPath
from danlu.diffusion.process import per_sample, widened
from danlu.diffusion.steps import home_of
from danlu.diffusion.times import TimeSampler

logger = logging.getLogger("danlu.diffusion")

#: Called as ``loss(prediction, x0)`` on data (batch, ...); returns a loss for each sample (batch,).
DataLoss = Callable[[Tensor, Tensor], Tensor]


def distillation_loss(
    model: VelocityModel,
    x0: Tensor,
    x1: Tensor,
    steps: int = 1,
    *,
    loss: Literal["l2"] | DataLoss = "l2",
    condition: Mapping[str, Any] | None = None,
    seed: int | torch.Generator | None = None,
) -> Tensor:
    """Loss of a model that is to take a given number of Euler steps and no others.

    It is the straight-line loss at the times ``1/k, 2/k, ..., 1`` alone, on pairs of the flow that is distilled.

    Args:
        model: called as ``model(x, t, **condition)``.
        x0: end of the flow (batch, ...).
        x1: its start, the shape of ``x0``.
        steps: k, at least 1.
        loss: ``l2``, the squared distance of velocities averaged over elements; or a function that compares the data
            predicted in one step, ``x_t - t v``, with ``x0``, such as LPIPS.
        condition: keyword arguments of the model.
        seed: a seed, or a generator on the CPU, of the times; not needed for one step.

    Returns:
        Loss of each sample (batch,).

    Raises:
        ValueError: steps below 1, shapes that differ, an unknown loss, or nothing to draw from.

    Source: arXiv:2209.03003.
    """
    _check_steps(steps)
    if loss != "l2" and not callable(loss):
        raise ValueError(f"loss must be 'l2' or a function of prediction and x0, got {loss!r}")
    if steps > 1 and seed is None:
        raise ValueError("seed must be a generator or a number where the time is drawn from several, got None")
    if steps == 1:
        t = torch.ones(len(x0), dtype=torch.float64)
    else:
        generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
        t = torch.randint(1, steps + 1, (len(x0),), generator=generator).double() / steps
    if loss == "l2":
        return flow_matching_loss(model, x0, x1, t, condition=condition)
    x, _ = LinearPath().sample(x0, x1, t)
    values = loss(x - per_sample(t, x) * predict(model, x, t, condition), widened(x0))
    if values.numel() != len(x0):
        raise ValueError(f"loss must return one value for each of the {len(x0)} samples, got {tuple(values.shape)}")
    return values.flatten()


def reflow(
    model: nn.Module,
    batches: Iterable[Any],
    optimiser: torch.optim.Optimizer,
    *,
    times: TimeSampler | None = None,
    weighting: Callable[[Tensor], Tensor] | None = None,
    seed: int | torch.Generator = 0,
    accelerator: Any = None,
) -> Iterator[Tensor]:
    """Train a model on the straight lines between pairs: one step of the optimiser for each batch.

    A generator: nothing happens until it is iterated, and the loop that iterates it may log, save, step a schedule of
    rates or stop. Start from the weights of the flow that made the pairs.

    Args:
        model: called as ``model(x, t, **condition)``, see `FlowNetwork` for networks of diffusers; trained in place.
        batches: a loader over `Pairs` or `PairCache`, or anything that gives ``(x0, x1)`` or ``(x0, x1, condition)``.
        optimiser: of the model's parameters.
        times: what draws the times; ``UniformTimes()`` unless given.
        weighting: factors of the loss by the times.
        seed: of the times: a number, or a generator on the CPU.
        accelerator: an ``accelerate.Accelerator`` that has prepared model, batches and optimiser, for many devices,
            mixed precision and gradient accumulation.

    Yields:
        Mean loss of each batch, 0-d, without gradient.

    Source: Scientific Spaces archive 9497; arXiv:2209.03003.
    """
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed

    def loss(x0: Tensor, x1: Tensor, condition: Mapping[str, Any]) -> Tensor:
        return flow_matching_loss(model, x0, x1, times=times, weighting=weighting, condition=condition, seed=generator)

    return _train(model, batches, optimiser, loss, accelerator)


def distill(
    model: nn.Module,
    batches: Iterable[Any],
    optimiser: torch.optim.Optimizer,
    steps: int = 1,
    *,
    loss: Literal["l2"] | DataLoss = "l2",
    seed: int | torch.Generator = 0,
    accelerator: Any = None,
) -> Iterator[Tensor]:
    """Train a model to take few Euler steps: one step of the optimiser for each batch.

    Afterwards it is no ODE any more: more steps make it worse. The model is marked, see `mark_distilled`.

    Args:
        model: as in `reflow`; start from the latest flow.
        batches: pairs of the latest flow, as in `reflow`.
        optimiser: of the model's parameters.
        steps: that sampling will take.
        loss: see `distillation_loss`.
        seed: of the times: a number, or a generator on the CPU.
        accelerator: as in `reflow`.

    Yields:
        Mean loss of each batch, 0-d, without gradient.

    Raises:
        ValueError: steps below 1, or an unknown loss.

    Source: arXiv:2209.03003.
    """
    _check_steps(steps)
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    mark_distilled(model if accelerator is None else accelerator.unwrap_model(model), steps)

    def step_loss(x0: Tensor, x1: Tensor, condition: Mapping[str, Any]) -> Tensor:
        return distillation_loss(model, x0, x1, steps, loss=loss, condition=condition, seed=generator)

    return _train(model, batches, optimiser, step_loss, accelerator)


def mark_distilled(model: nn.Module, steps: int) -> None:
    """Make a model warn, once, when it is asked for a time off the grid ``1/k, ..., 1`` that it was distilled for.

    `distill` does it. The mark is a hook and no part of a checkpoint: call it again on loaded weights.

    Args:
        model: called as ``model(x, t)``.
        steps: k; a mark for another number is replaced.

    Raises:
        ValueError: steps below 1.
    """
    _check_steps(steps)
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _GridHook):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    model.register_forward_pre_hook(_GridHook(steps), with_kwargs=True)


def distilled_steps(model: nn.Module) -> int | None:
    """Steps that a model was distilled for, or None."""
    return next((hook.steps for hook in model._forward_pre_hooks.values() if isinstance(hook, _GridHook)), None)


class _GridHook:
    """Warn once about times off the grid; a class, so that a marked model can be copied."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.warned = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        t = args[1] if len(args) > 1 else kwargs.get("t")
        if self.warned or t is None or torch.compiler.is_compiling():
            return
        place = torch.as_tensor(t).double() * self.steps
        off = ((place - place.round()).abs() > 1e-3 * self.steps) | (place < 0.5)
        if bool(off.any()):
            self.warned = True
            wrong = float(place[off].flatten()[0]) / self.steps
            logger.warning(
                "the model was distilled for steps=%d and is asked for t = %g, off the grid of so many Euler steps: "
                "its samples will be worse than with steps=%d",
                self.steps,
                wrong,
                self.steps,
            )


def _train(
    model: nn.Module,
    batches: Iterable[Any],
    optimiser: torch.optim.Optimizer,
    loss: Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor],
    accelerator: Any,
) -> Iterator[Tensor]:
    home = home_of(model)
    optimiser.zero_grad(set_to_none=True)
    for x0, x1, *rest in batches:
        condition: Mapping[str, Any] = rest[0] if rest else {}
        if accelerator is None and home is not None:
            x0, x1 = x0.to(home[0]), x1.to(home[0])
            condition = {name: value.to(home[0]) for name, value in condition.items()}
        with nullcontext() if accelerator is None else accelerator.accumulate(model):
            value = loss(x0, x1, condition).mean()
            if accelerator is None:
                value.backward()
            else:
                accelerator.backward(value)
            optimiser.step()
            # Last, because between the batches that it accumulates over accelerate skips both.
            optimiser.zero_grad(set_to_none=True)
        yield value.detach()


def _check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
