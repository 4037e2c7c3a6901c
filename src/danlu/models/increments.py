"""How far one optimiser step moves a model: the diagnosis that DeepNorm is the cure for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from danlu.hosts.architecture import Architecture, Matrix, read_architecture
from danlu.hosts.parameters import Kind, classify_parameters

__all__ = ["IncrementReport", "check_increments"]

_ROLES = ("query", "key", "value", "output", "gate", "up", "down")


@dataclass(frozen=True)
class IncrementReport:
    """What one step does to a model; ``print`` shows it as a table.

    Args:
        layers: number of blocks.
        loss: before the step.
        logit_change: root mean square of the change of the logits after one step, by what the step moved.
        loss_change: of the loss on the same batch, likewise.
        gradient_norms: Frobenius norm of the gradient of each matrix of a block by role, from the first layer on.
    """

    layers: int
    loss: float
    logit_change: Mapping[str, float]
    loss_change: Mapping[str, float]
    gradient_norms: Mapping[str, tuple[float, ...]]

    def __str__(self) -> str:
        lines = [f"{self.layers} layers, loss {self.loss:.4f}", ""]
        lines += [f"{'step of':<18}{'logit change':>14}{'loss change':>14}"]
        lines += [
            f"{scope:<18}{change:>14.4g}{self.loss_change[scope]:>+14.4g}"
            for scope, change in self.logit_change.items()
        ]
        lines += ["", f"{'gradient of':<18}{'first layer':>14}{'median':>14}{'last layer':>14}"]
        for role, norms in self.gradient_norms.items():
            middle = sorted(norms)[len(norms) // 2]
            lines.append(f"{role:<18}{norms[0]:>14.4g}{middle:>14.4g}{norms[-1]:>14.4g}")
        return "\n".join(lines)


def check_increments(
    model: Any, batch: Mapping[str, Any], optimizer_factory: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> IncrementReport:
    """Measure how much one optimiser step changes the logits, and put everything back.

    Four steps are tried from the same weights and gradients: of the blocks' matrices alone, of vectors (gains, offsets,
    biases), of embeddings and head, and of all parameters. A change that grows with depth is what makes deep post-norm
    models fail without warm-up; compare depths, or a model after ``apply_deepnorm``. Where vectors dominate,
    ``vector_rate_groups`` slows them. The model runs in evaluation mode, so that dropout does not hide the change.

    Args:
        model: a host model that returns a loss and logits.
        batch: its inputs with labels, on its device.
        optimizer_factory: makes the optimiser from a list of parameters, such as ``lambda p: AdamW(p, 1e-4)``. Give
            the learning rate of the first real step.

    Returns:
        The report. Weights, gradients, buffers and mode of the model are as before; memory for one copy of the weights
        and gradients is needed meanwhile.

    Raises:
        ValueError: the batch gives no loss, the loss is not finite, or nothing can be trained.
        UnsupportedArchitecture: the model's blocks are of an unknown kind.

    Source: danlu; after Scientific Spaces archive 8978
    """
    architecture = read_architecture(model)
    scopes = _scopes(architecture)
    if not scopes["all parameters"]:
        raise ValueError("model must have parameters with requires_grad, got none")
    with _untouched(model):
        loss, logits = _run(model, batch)
        if not torch.isfinite(loss):
            raise ValueError(f"the loss on batch must be finite, got {loss.item()}")
        model.zero_grad(set_to_none=True)
        loss.backward()
        gradients = {
            role: tuple(
                _gradient_norm(matrix)
                for block in architecture.blocks
                if (matrix := getattr(block.attention, role, None) or getattr(block.feed_forward, role, None))
            )
            for role in _ROLES
        }
        if all(parameter.grad is None for parameter in scopes["all parameters"]):
            raise ValueError("backward must leave gradients, got none; take hooks that consume them off the model")
        before = {parameter: parameter.detach().clone() for parameter in scopes["all parameters"]}
        change, loss_change = {}, {}
        for scope, moved in scopes.items():
            if not moved:
                continue
            kept = [None if parameter.grad is None else parameter.grad.clone() for parameter in moved]
            optimizer_factory(moved).step()
            with torch.no_grad():
                new_loss, new_logits = _run(model, batch)
            change[scope] = float((new_logits.double() - logits.double()).square().mean().sqrt())
            loss_change[scope] = float(new_loss) - float(loss.detach())
            with torch.no_grad():
                for parameter, gradient in zip(moved, kept, strict=True):
                    parameter.copy_(before[parameter])
                    parameter.grad = gradient
    return IncrementReport(
        layers=len(architecture.blocks),
        loss=float(loss.detach()),
        logit_change=change,
        loss_change=loss_change,
        gradient_norms={role: norms for role, norms in gradients.items() if norms},
    )


def _scopes(architecture: Architecture) -> dict[str, list[nn.Parameter]]:
    inner = {id(matrix.module.weight) for matrix in architecture.matrices()}
    kinds = classify_parameters(architecture.model)
    scopes: dict[str, list[nn.Parameter]] = {
        "matrices": [], "vectors": [], "embeddings, head": [], "all parameters": []
    }  # fmt: skip
    for name, parameter in architecture.model.named_parameters():
        if parameter.requires_grad:
            vector = kinds[name] not in (Kind.MATRIX, Kind.EMBEDDING)
            scope = "matrices" if id(parameter) in inner else "vectors" if vector else "embeddings, head"
            scopes[scope].append(parameter)
            scopes["all parameters"].append(parameter)
    return scopes


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; values, gradients, buffers and mode as they were afterwards."""
    modes = {module: module.training for module in model.modules()}
    held = {parameter: (parameter.detach().clone(), parameter.grad) for parameter in model.parameters()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    for parameter in held:
        parameter.grad = None
    model.eval()
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, (value, gradient) in held.items():
                parameter.copy_(value)
                parameter.grad = gradient
            for buffer, content in buffers.items():
                buffer.copy_(content)
        for module, mode in modes.items():
            module.training = mode


def _run(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    output = model(**batch)
    if getattr(output, "loss", None) is None:
        raise ValueError(f"batch must hold what {type(model).__name__} computes its loss from, such as labels")
    logits = output.logits if getattr(output, "logits", None) is not None else output.prediction_logits
    return output.loss, logits.detach()


def _gradient_norm(matrix: Matrix) -> float:
    gradient: Any = matrix.module.weight.grad
    if gradient is None:
        return 0.0
    return float((gradient.T if matrix.transposed else gradient)[matrix.start : matrix.stop].float().norm())
