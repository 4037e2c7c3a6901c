"""Which sample of the data travels to which sample of the prior.

Any joint distribution with the right marginals makes a flow; a better one makes a straighter flow.

Source: Scientific Spaces archive 9497; arXiv:2209.03003, arXiv:2302.00482 and arXiv:2304.14772 (optimal transport
inside a batch).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from danlu.diffusion.process import widened

#: Called as ``coupling(x0, x1, generator)``; returns data and prior in one order.
Coupling = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Independent:
    """Any with any: the prior's samples in random order."""

    def __call__(self, x0: Tensor, x1: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Shuffle ``x1`` (batch, ...)."""
        _check(x0, x1)
        return x0, x1[torch.randperm(len(x1), generator=generator).to(x1.device)]


@dataclass(frozen=True)
class MinibatchOT:
    """The pairing of a batch that costs least in all: the exact optimal transport between its two halves.

    It needs SciPy. The time of the assignment grows with the cube of the batch in the worst case; at a few hundred
    samples it is milliseconds. The marginals stay right at any size of batch, the coupling of the whole
    distributions is only approximated.

    Args:
        cost: of all pairs, called as ``cost(x0, x1)`` on flattened samples (batch, d); returns (batch, batch), rows for
            ``x0``. The squared distance unless given.

    Source: arXiv:2302.00482, arXiv:2304.14772.
    """

    cost: Callable[[Tensor, Tensor], Tensor] | None = None

    def __call__(self, x0: Tensor, x1: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Put ``x1`` (batch, ...) in the order that suits ``x0``; the generator is not used.

        Raises:
            ImportError: SciPy is not installed.
            ValueError: shapes that differ, or a cost that is not (batch, batch) or not finite.
        """
        _check(x0, x1)
        try:
            from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
        except ImportError as error:
            raise ImportError("MinibatchOT needs SciPy for its assignment: pip install scipy") from error
        pair = widened(x0).flatten(1), widened(x1).flatten(1)
        costs = torch.cdist(*pair).square() if self.cost is None else self.cost(*pair)
        if costs.shape != (len(x0), len(x0)) or not bool(torch.isfinite(costs).all()):
            raise ValueError(f"cost must be finite and of shape ({len(x0)}, {len(x0)}), got shape {tuple(costs.shape)}")
        _, order = linear_sum_assignment(costs.detach().cpu().numpy())
        return x0, x1[torch.from_numpy(order).to(x1.device)]


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Samples that belong together, kept together: a data set of ``(x0, x1)``.

    A loader may shuffle it, because it shuffles pairs. To shuffle the two sides apart is to go back to the independent
    coupling, without any error.

    Args:
        x0: data (count, ...).
        x1: the prior's sample that belongs to each, the shape of ``x0``.

    Raises:
        ValueError: shapes that differ, or no samples.
    """

    def __init__(self, x0: Tensor, x1: Tensor) -> None:
        _check(x0, x1)
        self.x0, self.x1 = x0, x1

    def __len__(self) -> int:
        return len(self.x0)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x0[index], self.x1[index]


def _check(x0: Tensor, x1: Tensor) -> None:
    if x0.shape != x1.shape:
        raise ValueError(f"x1 must have the shape of x0 {tuple(x0.shape)}, got {tuple(x1.shape)}")
    if x0.dim() < 1 or not len(x0):
        raise ValueError(f"x0 must hold at least one sample (batch, ...), got shape {tuple(x0.shape)}")
