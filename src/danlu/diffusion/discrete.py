"""The process behind a table of betas, continuous in time.

Source: Scientific Spaces archive 9209; arXiv:2006.11239 (the table), arXiv:2206.00927 (the half log signal-to-noise
ratio as the quantity to interpolate).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from danlu.diffusion.process import Process, Time, as_time

#: Largest share of the data's variance that a table with none left at its end is given there, so that its noise ratio
#: is finite: the smallest float16, as in diffusers' EulerDiscreteScheduler, or a quarter of the share before it if
#: less.
NOTHING_LEFT = 2.0**-24


@dataclass(frozen=True)
class DiscreteProcess(Process):
    """A variance-preserving process known at whole times 0, 1, ... only; in between, ``log(alpha / sigma)`` is linear.

    Time is the index of the table, which is what models trained on it are told.

    Args:
        half_log_snrs: ``log(alpha / sigma)`` at the times 0, 1, ..., strictly decreasing.

    Raises:
        ValueError: fewer than two values, one that is not finite, or values that do not decrease.

    Source: Scientific Spaces archive 9209.
    """

    half_log_snrs: tuple[float, ...] = field(repr=False)
    t_min = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "half_log_snrs", tuple(float(value) for value in self.half_log_snrs))
        if len(self.half_log_snrs) < 2:
            raise ValueError(f"a table must have at least two times, got {len(self.half_log_snrs)}")
        if not bool(torch.isfinite(self._table).all()):
            first = int((~torch.isfinite(self._table)).nonzero()[0])
            raise ValueError(f"log(alpha / sigma) must be finite, got {self.half_log_snrs[first]} at time {first}")
        if bool((self._table.diff() >= 0).any()):
            first = int((self._table.diff() >= 0).nonzero()[0])
            raise ValueError(f"log(alpha / sigma) must decrease strictly with time, but does not after time {first}")

    @classmethod
    def from_betas(cls, betas: Tensor | Sequence[float]) -> DiscreteProcess:
        """The process of a table of betas; their products are taken in float64.

        Args:
            betas: rates of noise (times,), above 0 and below 1; the last one may be 1 (no data left at the end).

        Raises:
            ValueError: a beta outside that range.
        """
        betas = _float64(betas)
        wrong = ~((betas > 0) & (betas < 1))
        wrong[-1] = not 0 < betas[-1] <= 1
        if betas.dim() != 1 or bool(wrong.any()):
            raise ValueError(f"betas must be one axis of numbers between 0 and 1, got {betas.tolist()[:8]}")
        return cls(_half_log_snrs(torch.log1p(-betas).cumsum(0)))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor | Sequence[float]) -> DiscreteProcess:
        """The process of a table of ``alpha^2``.

        Args:
            alphas_cumprod: shares of the data's variance (times,), decreasing from below 1 to above 0; the last may be
                0.

        Raises:
            ValueError: a share outside that range.
        """
        shares = _float64(alphas_cumprod)
        wrong = ~((shares > 0) & (shares < 1))
        wrong[-1] = not 0 <= shares[-1] < 1
        if shares.dim() != 1 or bool(wrong.any()):
            raise ValueError(f"alphas_cumprod must be one axis of numbers between 0 and 1, got {shares.tolist()[:8]}")
        return cls(_half_log_snrs(shares.log()))

    @property
    def t_max(self) -> float:  # type: ignore[override]
        """Last time of the table."""
        return float(len(self.half_log_snrs) - 1)

    @cached_property
    def _table(self) -> Tensor:
        return torch.tensor(self.half_log_snrs, dtype=torch.float64)

    def _on(self, device: torch.device) -> Tensor:
        return self._table.to(device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)

    def half_log_snr(self, t: Time) -> Tensor:
        """``log(alpha / sigma)``, linear between whole times."""
        t = as_time(t)
        table, low = self._around(t)
        return table[low] + (t - low) * (table[low + 1] - table[low])

    def log_alpha(self, t: Time) -> Tensor:
        """Logarithm of the share of the data: ``log sigmoid(2 lambda) / 2``."""
        return logsigmoid(2 * self.half_log_snr(t)) / 2

    def sigma(self, t: Time) -> Tensor:
        """``sqrt(1 - alpha^2)``."""
        return (logsigmoid(-2 * self.half_log_snr(t)) / 2).exp()

    def alpha_prime(self, t: Time) -> Tensor:
        """Derivative of alpha by time; at a whole time, of the interval that begins there."""
        return self.alpha(t) * self.sigma(t) ** 2 * self._slope(t)

    def sigma_prime(self, t: Time) -> Tensor:
        """Derivative of sigma by time; at a whole time, of the interval that begins there."""
        return -self.sigma(t) * self.alpha(t) ** 2 * self._slope(t)

    def time_of(self, half_log_snr: Time) -> Tensor:
        """The time at which ``log(alpha / sigma)`` has this value."""
        wanted = as_time(half_log_snr)
        table = self._on(wanted.device)
        low = (torch.searchsorted(-table, -wanted.contiguous(), right=True) - 1).clamp(0, len(table) - 2)
        return (low + (wanted - table[low]) / (table[low + 1] - table[low])).clamp(0, self.t_max)

    def _around(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table = self._on(t.device)
        return table, t.detach().floor().long().clamp(0, len(table) - 2)

    def _slope(self, t: Time) -> Tensor:
        table, low = self._around(as_time(t))
        return table[low + 1] - table[low]


def _half_log_snrs(log_shares: Tensor) -> tuple[float, ...]:
    """From log alpha^2; sigma^2 without the cancellation near the data."""
    if not bool(torch.isfinite(log_shares[-1])):
        log_shares = log_shares.clone()
        log_shares[-1] = min(math.log(NOTHING_LEFT), float(log_shares[-2]) - math.log(4))
    return tuple(((log_shares - (-torch.expm1(log_shares)).log()) / 2).tolist())


def _float64(values: Tensor | Sequence[float]) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")
