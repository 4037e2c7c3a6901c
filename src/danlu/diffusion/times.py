"""Which times a training step draws.

Source: arXiv:2107.00630 (evenly spread), arXiv:2206.00364 (normal in log sigma), arXiv:2403.03206 (logit-normal).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from danlu.diffusion.process import Process

#: Called as ``sampler(count, process, generator)``; returns float64 times (count,) inside the process, on the CPU.
TimeSampler = Callable[[int, Process, torch.Generator | None], Tensor]


@dataclass(frozen=True)
class UniformTimes:
    """Uniform between two times.

    Args:
        start: smallest time, ``process.t_end`` unless given: weights may be infinite where there is no noise.
        end: largest time, ``process.t_max`` unless given.
        spread: give every sample of a batch its own equal part of the range, which lowers the variance of the loss and
            leaves its expectation as it is.

    Source: arXiv:2107.00630 (spread).
    """

    start: float | None = None
    end: float | None = None
    spread: bool = True

    def __call__(self, count: int, process: Process, generator: torch.Generator | None = None) -> Tensor:
        """Draw times."""
        ends = (
            process.t_end if self.start is None else self.start,
            process.t_max if self.end is None else self.end,
        )
        low, high = process.check_times(torch.tensor(ends, dtype=torch.float64), "start and end").tolist()
        if not low < high:
            raise ValueError(f"start must be below end, got {low:g} and {high:g}")
        if self.spread:
            # One offset and equal steps: each time is uniform by itself, and none is tied to a place in the batch.
            offset = torch.rand(1, generator=generator, dtype=torch.float64)
            share = (offset + torch.randperm(count, generator=generator) / count) % 1
        else:
            share = torch.rand(count, generator=generator, dtype=torch.float64)
        return low + share * (high - low)


@dataclass(frozen=True)
class LogitNormalTimes:
    """Mostly the middle of the range: the logit of its share is normal.

    Args:
        mean: of the logit; above 0 prefers noise.
        std: of the logit, above 0.

    Source: arXiv:2403.03206.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _check_normal(self.mean, self.std)

    def __call__(self, count: int, process: Process, generator: torch.Generator | None = None) -> Tensor:
        """Draw times."""
        share = torch.sigmoid(self.mean + self.std * torch.randn(count, generator=generator, dtype=torch.float64))
        return process.t_end + share * (process.t_max - process.t_end)


@dataclass(frozen=True)
class LogNormalTimes:
    """Normal in ``log(sigma / alpha)``; what falls outside the process goes to its nearest end.

    Args:
        mean: of the logarithm.
        std: of the logarithm, above 0.

    Source: arXiv:2206.00364.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        _check_normal(self.mean, self.std)

    def __call__(self, count: int, process: Process, generator: torch.Generator | None = None) -> Tensor:
        """Draw times."""
        logarithm = self.mean + self.std * torch.randn(count, generator=generator, dtype=torch.float64)
        return process.time_of(-logarithm).clamp_min(process.t_end)


def _check_normal(mean: float, std: float) -> None:
    if not math.isfinite(mean):
        raise ValueError(f"mean must be finite, got {mean}")
    if not 0 < std < math.inf:
        raise ValueError(f"std must be above 0 and finite, got {std}")
