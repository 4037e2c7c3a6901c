"""Gradients of several losses, their inner products, and what optimisers make of them: the parts of multitask.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from danlu.optim.gradient_solvers import solve_primary

Metric = torch.optim.Optimizer | Mapping[nn.Parameter, Tensor]


def backward(
    outputs: Sequence[Tensor],
    params: Sequence[Tensor],
    seeds: Sequence[Tensor | None] | None = None,
    *,
    retain: bool = False,
) -> None:
    """Add the gradient of a sum of outputs, or of their products with seeds, to ``.grad``, as a mean over processes."""
    if world() == 1:
        # The ordinary pass, so that hooks that use up gradients as they appear do run.
        torch.autograd.backward(outputs, seeds, inputs=params, retain_graph=retain)
        return
    deposit(params, torch.autograd.grad(outputs, params, seeds, retain_graph=retain, allow_unused=True))


def deposit(params: Sequence[Tensor], gradients: Iterable[Tensor | None], *, averaged: bool = False) -> None:
    """Add gradients to ``.grad``, as means over processes unless they are such means."""
    for parameter, gradient in zip(params, gradients, strict=True):
        if world() > 1 and not averaged:  # every process takes part, with or without a gradient of its own
            gradient = average(torch.zeros_like(parameter) if gradient is None else gradient)
        if gradient is not None:
            parameter.grad = plus(parameter.grad, gradient.detach())


def world() -> int:
    """Number of processes whose gradients are averaged."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def average(tensor: Tensor) -> Tensor:
    """The mean over all processes, in float32 or wider; the tensor itself where there is one process."""
    if world() == 1:
        return tensor
    total = tensor.to(wide(tensor.dtype), copy=True).contiguous()
    dist.all_reduce(total)
    return (total / world()).to(tensor.dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over gradients of ``dtype`` are formed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def task_gradients(name: str, loss: Tensor, inputs: Sequence[Tensor], *, retain: bool) -> tuple[Tensor | None, ...]:
    """The gradient of one loss; None where it does not depend on an input.

    Raises:
        ValueError: a sparse gradient.
    """
    gradients = torch.autograd.grad(loss, inputs, retain_graph=retain, allow_unused=True)
    for gradient in gradients:
        check_dense(gradient, name)
    return gradients


def check_dense(gradient: Tensor | None, name: str) -> None:
    """Refuse a sparse gradient.

    Raises:
        ValueError: names the task.
    """
    if gradient is not None and gradient.layout != torch.strided:
        raise ValueError(f"task {name!r} must have dense gradients, got {gradient.layout}; use sparse=False embeddings")


def rows(gradients: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """One parameter's gradients of all tasks as a matrix (tasks, numel) in float32 or wider; a missing one is zero."""
    matrix = torch.zeros(len(gradients), like.numel(), dtype=wide(like.dtype), device=like.device)
    for row, gradient in zip(matrix, gradients, strict=True):
        if gradient is not None:
            row.copy_(gradient.reshape(-1))
    return matrix


def inner_products(matrix: Tensor, scale: Tensor | None = None) -> Tensor:
    """Gram matrix of the rows, with a diagonal metric if ``scale`` is given; float64 so that layers add up exactly."""
    other = matrix if scale is None else matrix * scale.reshape(-1)
    # Half precision and TF32 lose the sign of small inner products: no autocast, and matrix-vector products on CUDA.
    with torch.autocast(matrix.device.type, enabled=False):
        gram = torch.stack([other.mv(row) for row in matrix]) if matrix.is_cuda else matrix @ other.T
    return gram if matrix.device.type == "mps" else gram.double()


class KeptGradients:
    """The gradients of several tasks, added up over the calls of a window.

    Args:
        params: parameters that the tasks share, or other tensors with gradients.
        tasks: number of tasks.
    """

    def __init__(self, params: Sequence[Tensor], tasks: int):
        self.params = params
        self.losses: Any = 0.0
        self.parts: list[list[Tensor | None]] = [[None] * tasks for _ in params]

    def add(self, task: int, gradients: Sequence[Tensor | None]) -> None:
        """Add one gradient of one task, by parameter; None is zero."""
        for parts, gradient in zip(self.parts, gradients, strict=True):
            parts[task] = plus(parts[task], gradient)

    def average(self) -> None:
        """Put the means over all processes in place of the gradients of this one."""
        for index, parameter in enumerate(self.params):
            if world() > 1:
                matrix = average(self.matrix(index)).to(parameter.dtype)
                self.parts[index] = [row.view_as(parameter) for row in matrix]

    def matrix(self, index: int, first: int = 0) -> Tensor:
        """One parameter's gradients of the tasks from ``first`` on, as ``rows``."""
        return rows(self.parts[index][first:], self.params[index])

    def gram(self, metric: Mapping[Any, Tensor]) -> Tensor:
        """(tasks, tasks), inner products, with a diagonal metric where there is one."""
        total: Any = 0
        for index, parameter in enumerate(self.params):
            part = inner_products(self.matrix(index), metric.get(parameter))
            total = part.to(total.device) + total if index else part
        return total

    def sums(self, weights: Tensor, first: int = 0, *, free: bool = False) -> Iterator[Tensor | None]:
        """By parameter, the weighted sum of gradients of the tasks from ``first`` on; None where no task has one."""
        for index, parameter in enumerate(self.params):
            if all(part is None for part in self.parts[index][first:]):
                yield None
                continue
            matrix = self.matrix(index, first)
            if free:
                self.parts[index] = []
            yield weighted(matrix, weights, parameter)

    def constrain(self, optimizer: torch.optim.Optimizer, first: int, precision: float) -> Tensor:
        """An optimiser's step, projected on the steps that make no task from ``first`` on worse; the multipliers."""
        before = [parameter.detach().clone() for parameter in self.params]
        optimizer.step()
        total: Any = 0
        for index, parameter in enumerate(self.params):
            step = before[index].sub_(parameter.detach())
            part = inner_products(rows([step, *self.parts[index][first:]], parameter))
            total = part.to(total.device) + total if index else part
        if len(total) == 1:
            return total.new_zeros(0)
        multipliers = solve_primary(total[1:, 1:], total[1:, 0], precision=precision)
        with torch.no_grad():
            for parameter, change in zip(self.params, self.sums(multipliers, first, free=True), strict=True):
                if change is not None:
                    parameter.sub_(change)
        return multipliers

    def aggregated(self, aggregator: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """By parameter, what an aggregator makes of the whole gradients."""
        matrix = torch.cat([self.matrix(index) for index in range(len(self.params))], dim=1)
        parts = aggregator(matrix).split([parameter.numel() for parameter in self.params])
        return [part.view_as(like).to(like.dtype) for part, like in zip(parts, self.params, strict=True)]


def weighted(matrix: Tensor, weights: Tensor, like: Tensor) -> Tensor:
    """The weighted sum of rows, in the shape and dtype of ``like``; the matrix is used up."""
    return matrix.mul_(weights.to(matrix)[:, None]).sum(0).view(like.shape).to(like.dtype)


def plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """A sum in which None is zero. Never in place: autograd may hand out one tensor twice."""
    if one is None or other is None:
        return other if one is None else one
    return one + other


class _Reduced(torch.autograd.Function):
    """Hands the gradients of all tasks for one parameter to ``sink`` and puts a zero of no size in their place."""

    @staticmethod
    def forward(gradient: Tensor, sink: Callable[[Tensor], None]) -> Tensor:
        return gradient.new_zeros(()).expand(gradient.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, gradient: Tensor, sink: Callable[[Tensor], None]) -> tuple[Tensor, None]:
        sink(gradient.movedim(in_dims[0], 0))
        return gradient.new_zeros(()).expand(gradient.movedim(in_dims[0], 0).shape[1:]), None


def layerwise_gram(
    losses: Sequence[Tensor], params: Sequence[nn.Parameter], metric: Mapping[nn.Parameter, Tensor]
) -> Tensor:
    """Gram matrix of all tasks from one batched backward pass that keeps no gradient beyond the layer it is in."""
    total: list[Tensor] = []

    def hook(parameter: nn.Parameter) -> Callable[[Tensor], Tensor]:
        def sink(batched: Tensor) -> None:
            matrix = batched.reshape(len(losses), -1).to(wide(batched.dtype))
            part = inner_products(matrix, metric.get(parameter))
            total[:] = [total[0].add_(part.to(total[0].device)) if total else part]

        return lambda gradient: _Reduced.apply(gradient, sink)

    def one(row: Tensor) -> tuple[Tensor, ...]:
        seeds = [seed.to(loss.dtype).reshape(loss.shape) for seed, loss in zip(row.unbind(), losses, strict=True)]
        return torch.autograd.grad(losses, params, seeds, retain_graph=True, allow_unused=True, materialize_grads=True)

    handles = [parameter.register_hook(hook(parameter)) for parameter in params]
    try:
        torch.func.vmap(one)(torch.eye(len(losses), dtype=losses[0].dtype, device=losses[0].device))
    finally:
        for handle in handles:
            handle.remove()
    return total[0]


def preconditioner(metric: Metric | None, params: Sequence[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """The diagonal by which an optimiser multiplies a gradient, per parameter; parameters that are left out have 1.

    For Adam and its kin this is lr / (sqrt(v) + eps) with v as the last step left it, bias-corrected, and lr in
    multiples of the largest one.

    Raises:
        TypeError: an optimiser without second moments.
    """
    if metric is None:
        return {}
    if isinstance(metric, Mapping):
        return dict(metric)
    wanted = {id(parameter) for parameter in params}
    largest = max(float(group["lr"]) for group in metric.param_groups) or 1.0
    found: dict[nn.Parameter, Tensor] = {}
    for group in metric.param_groups:
        for parameter in group["params"]:
            state = metric.state.get(parameter)
            if id(parameter) not in wanted or not state:
                continue
            moment = state.get("max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq")
            if moment is None or moment.shape != parameter.shape:
                raise TypeError(
                    f"metric must be an optimizer with exp_avg_sq (Adam, AdamW), got {type(metric).__name__}; "
                    "pass a mapping of parameters to diagonals instead"
                )
            correction = 1 - group["betas"][1] ** float(state["step"])
            root = (moment.to(wide(moment.dtype)) / correction).sqrt_().add_(group["eps"])
            found[parameter] = (float(group["lr"]) / largest) / root
    return found
