"""From the inner products of task gradients to weights, by method, and the record of one combination."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from danlu.optim.gradient_solvers import solve_min_norm, solve_mixed, solve_primary

METHODS = ("primary_auxiliary", "min_norm", "mixed", "grad_norm", "geo_mean", "sum")
#: Methods for which gradients of length 1 make a difference that is not one of the other methods.
SOLVED = ("primary_auxiliary", "min_norm", "mixed")


@dataclass(frozen=True)
class Combination:
    """What one call combined; tensors stay on their device until they are looked at.

    Args:
        names: of the tasks, main tasks first.
        losses: (tasks,), means over all processes.
        weights: (tasks,), the step is their sum of gradients; None for an aggregator that has no weights.
        gram: (tasks, tasks), inner products of the gradients that the weights came from; None where none were needed.
        target: (tasks - 1,), inner products with the step that drift control asked for; None without it.
    """

    names: tuple[str, ...]
    losses: Tensor
    weights: Tensor | None
    gram: Tensor | None = None
    target: Tensor | None = None

    @property
    def cosines(self) -> Tensor | None:
        """(tasks, tasks), cosines between gradients; 0 beside a zero gradient."""
        if self.gram is None:
            return None
        lengths = self.gram.diagonal().clamp(min=0).sqrt()
        return self.gram / (lengths * lengths[:, None]).clamp(min=torch.finfo(self.gram.dtype).tiny)

    @property
    def conflicts(self) -> Tensor | None:
        """(tasks, tasks), bool: a step along the gradient of one task raises the loss of the other."""
        return None if self.gram is None else self.gram < 0

    @property
    def progress(self) -> Tensor | None:
        """(tasks,), by how much each loss falls per unit of the step, to first order."""
        return None if self.gram is None or self.weights is None else self.gram @ self.weights.to(self.gram)


def find_method(method: Any) -> Any:
    """A method's name, or an aggregator of TorchJD, made from its class name or passed on.

    Raises:
        ImportError: TorchJD is needed and missing.
        ValueError: no such method.
        TypeError: neither a name nor an aggregator.
    """
    if isinstance(method, str) and method in METHODS:
        return method
    if isinstance(method, str) and not method[:1].isupper():
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}, or an aggregator of TorchJD such as 'UPGrad', got {method!r}"
        )
    try:
        from torchjd import aggregation
    except ImportError as error:
        raise ImportError(f"method {method!r} is TorchJD's: pip install 'danlu[multitask]'") from error
    if isinstance(method, str):
        found = getattr(aggregation, method, None)
        if not (isinstance(found, type) and issubclass(found, aggregation.Aggregator)):
            known = [name for name in aggregation.__all__ if "Weighting" not in name and "Aggregator" not in name]
            raise ValueError(f"method must be an aggregator of TorchJD ({', '.join(known)}), got {method!r}")
        return found()
    if not isinstance(method, aggregation.Aggregator):
        raise TypeError(f"method must be a name or an aggregator of TorchJD, got {type(method).__name__}")
    return method


def needs_rows(method: Any) -> bool:
    """Whether a method looks at whole gradients, which inner products cannot replace."""
    return not isinstance(method, str) and not hasattr(method, "gramian_weighting")


def check_options(
    method: Any, normalize: bool, metric: Any, via: str, gradients: str, refresh: int, drift: float
) -> None:
    """Refuse options out of range, and options that do not go together.

    Raises:
        ValueError: names the option.
    """
    if via not in ("losses", "features"):
        raise ValueError(f"via must be 'losses' or 'features', got {via!r}")
    if gradients not in ("kept", "layerwise"):
        raise ValueError(f"gradients must be 'kept' or 'layerwise', got {gradients!r}")
    if refresh < 1:
        raise ValueError(f"refresh must be at least 1, got {refresh}")
    if not 0 <= drift < float("inf"):
        raise ValueError(f"drift must be a finite rate of at least 0, got {drift}")
    if drift and method != "primary_auxiliary":
        raise ValueError(f"drift is for method 'primary_auxiliary', got method {method!r}")
    if via == "features" and (metric is not None or gradients == "layerwise"):
        raise ValueError("via='features' never sees gradients of parameters: leave metric and gradients alone")
    if normalize and (needs_rows(method) or method in ("sum", "geo_mean", "grad_norm")):
        raise ValueError(f"normalize is for methods that solve for weights, got method {method!r}")
    if needs_rows(method) and (via == "features" or gradients == "layerwise" or refresh > 1 or metric is not None):
        raise ValueError(f"{method} needs whole gradients: use gradients='kept', via='losses', no metric, refresh=1")
    for parameter, diagonal in metric.items() if isinstance(metric, Mapping) else ():
        if diagonal.shape != parameter.shape:
            raise ValueError(f"metric must have shape {tuple(parameter.shape)}, got {tuple(diagonal.shape)}")


def weigh(
    method: Any,
    gram: Tensor,
    losses: Tensor,
    primaries: int,
    *,
    normalize: bool,
    target: Tensor | None,
    precision: float,
) -> Tensor:
    """Weights of the tasks by a method.

    Args:
        method: a name or an aggregator, as ``find_method`` gives it.
        gram: (tasks, tasks).
        losses: (tasks,).
        primaries: number of main tasks, which come first.
        normalize: solve for gradients of length 1.
        target: (tasks - 1,) for ``primary_auxiliary``, or None.
        precision: relative error of the inner products.

    Returns:
        (tasks,), in the dtype of ``gram``.
    """
    lengths = gram.diagonal().clamp(min=0).sqrt()
    if method == "sum":
        return torch.ones_like(lengths)
    if method == "geo_mean":
        return losses.to(gram).reciprocal()
    if method == "grad_norm":
        return torch.where(lengths > 0, 1 / lengths, torch.zeros_like(lengths))
    inverse = torch.ones_like(lengths)
    if normalize:
        inverse = torch.where(lengths > 0, 1 / lengths, inverse)
        gram = gram * inverse * inverse[:, None]
        target = None if target is None else target * inverse[1:] * inverse[0]
    if method == "primary_auxiliary":
        weights = torch.ones_like(lengths)
        if len(gram) > 1:
            weights[1:] = solve_primary(gram[1:, 1:], gram[1:, 0], target, precision=precision)
    elif method == "min_norm":
        weights = solve_min_norm(gram, precision=precision)
    elif method == "mixed":
        weights = solve_mixed(gram, primaries, precision=precision)
    else:
        # In the dtype that says how exact the numbers are: some aggregators take their tolerances from it.
        exact = precision < torch.finfo(torch.float32).eps
        weights = method.gramian_weighting(gram if exact else gram.float()).to(gram)
    return weights * inverse
