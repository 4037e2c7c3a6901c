"""Linear recurrent units: diagonal linear recurrences with stable factors, an initialisation and a normalisation."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.attention.recurrent.inputs import refuse_nan, seen_from_the_end, token_marks, uniform, wide_type
from danlu.kernels.scan import linear_scan

if TYPE_CHECKING:
    from danlu.attention.recurrent.cache import RecurrentLayer

__all__ = ["LRU", "SLRU", "ring_log_rate"]

#: A uniform draw is kept this far from 0, whose logarithm is not finite.
_LEAST = 1e-7


class RecurrentState(NamedTuple):
    """State ``h`` (batch, state_size) after the last token."""

    h: Tensor


def ring_log_rate(uniform: Tensor, radius_min: float, radius_max: float) -> Tensor:
    """Turn uniform draws into ``nu_log`` of factors that fill a ring evenly by area.

    Args:
        uniform: numbers in [0, 1], any shape.
        radius_min: inner radius, >= 0.
        radius_max: outer radius, in (radius_min, 1).

    Returns:
        ln(-ln(r)), same shape, with r^2 = uniform (radius_max^2 - radius_min^2) + radius_min^2.

    Source: Scientific Spaces archive 9554; arXiv:2303.06349, lemma 3.2.
    """
    _check_ring(radius_min, radius_max)
    if radius_min == 0:
        uniform = uniform.clamp(min=_LEAST)
    return (-0.5 * (uniform * (radius_max**2 - radius_min**2) + radius_min**2).log()).log()


class _Recurrence(nn.Module):
    """What the complex and the real unit share: y = C h + D x with h_t = lambda h_{t-1} + gamma B x_t."""

    def __init__(
        self, hidden_size: int, state_size: int | None, radius_min: float, radius_max: float, reverse: bool
    ) -> None:
        super().__init__()
        state_size = hidden_size if state_size is None else state_size
        for name, value in (("hidden_size", hidden_size), ("state_size", state_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        _check_ring(radius_min, radius_max)
        self.hidden_size, self.state_size = hidden_size, state_size
        self.radius_min, self.radius_max, self.reverse = radius_min, radius_max, reverse
        self.nu_log = nn.Parameter(torch.empty(state_size))
        self.gamma_log = nn.Parameter(torch.empty(state_size))
        self.D = nn.Parameter(torch.empty(hidden_size))

    @abstractmethod
    def factors(self) -> Tensor:
        """The factor lambda of each channel, (state_size,), in float32 (float64 for float64 parameters)."""

    @abstractmethod
    def _read(self, x: Tensor, gamma: Tensor) -> Tensor:
        """Inputs of the recurrence, gamma B x."""

    @abstractmethod
    def _write(self, h: Tensor) -> Tensor:
        """C h, real."""

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all parameters as the paper prescribes.

        Args:
            generator: of the draws; the global one by default.
        """
        self.nu_log.copy_(ring_log_rate(uniform(self.state_size, generator), self.radius_min, self.radius_max))
        # of the factor as it is stored, so that the state starts with variance 1 exactly
        self.gamma_log.copy_(0.5 * torch.log(-torch.expm1(-2 * self.nu_log.double().exp())))
        self.D.normal_(generator=generator)

    def extra_repr(self) -> str:
        """Sizes and direction."""
        return f"hidden_size={self.hidden_size}, state_size={self.state_size}, reverse={self.reverse}"

    def make_cache(self) -> RecurrentLayer:
        """A fresh cache layer.

        Raises:
            ValueError: the recurrence runs backwards, and needs the whole sequence.
        """
        if self.reverse:
            raise ValueError(
                "a layer with reverse=True must see the whole sequence and has no cache; use reverse=False"
            )
        from danlu.attention.recurrent.cache import RecurrentLayer

        return RecurrentLayer()

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: RecurrentLayer | None = None,
    ) -> Tensor:
        """Mix tokens; everything inside runs in float32 (float64 for float64 input), autocast or not.

        Args:
            x: (batch, length, hidden_size).
            positions: int64 (length,) or (batch, length); a token at position 0 begins a new text, so that texts packed
                into one row do not see each other. None: one text.
            mask: bool (batch, past + length), True where there is a token; steps of padding are left out.
            cache: the layer that :meth:`make_cache` made, with the state after all earlier tokens; is advanced.

        Returns:
            (batch, length, hidden_size) in the type of ``x``. At padding it is finite and means nothing.

        Raises:
            ValueError: shapes that do not fit, a cache with ``reverse``, or a ``nu_log`` that is not a number.
        """
        reset, hold = token_marks(x, self.hidden_size, positions, mask, cache)
        if cache is not None and self.reverse:
            self.make_cache()  # says why there is none
        refuse_nan(self.nu_log, "nu_log")
        state = None if cache is None or cache.state is None else cache.state.h
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(wide_type(x))
            u = self._read(wide, self.gamma_log.to(wide.dtype).exp())
            factors = self.factors().to(u.dtype)
            reset = seen_from_the_end(reset) if self.reverse else reset
            h, final = linear_scan(factors, u, state, reset, hold=hold, reverse=self.reverse, return_final=True)
            y = self._write(h) + self.D.to(wide.dtype) * wide
        if cache is not None:
            cache.advance(RecurrentState(final), x.shape[1])
        return y.to(x.dtype)


class LRU(_Recurrence):
    """Linear recurrent unit: a diagonal complex linear recurrence between two linear maps.

    h_t = lambda h_{t-1} + gamma B x_t and y_t = Re(C h_t) + D x_t, with lambda = exp(-exp(nu_log) + i exp(theta_log)),
    so that ``|lambda|`` < 1 whatever the parameters, and gamma = exp(gamma_log), which starts at
    sqrt(1 - ``|lambda|^2``) and is then free. Complex numbers are pairs of reals in ``B`` (state_size, 2, hidden_size)
    and ``C`` (hidden_size, state_size, 2), so that both maps are one real matrix product. A decoded token costs the
    same at any length.

    Keep ``nu_log``, ``theta_log`` and ``gamma_log`` in float32 where the rest of a model is rounded to bfloat16.

    Args:
        hidden_size: H, width of input and output.
        state_size: N, complex channels; None: as wide as the input.
        radius_min: least ``|lambda|`` at the start, >= 0.
        radius_max: largest, below 1; a channel remembers about 1 / (1 - ``|lambda|``) tokens. For dependencies over
            ten thousand tokens take 0.999 and 0.9999, with ``max_phase`` pi/10.
        max_phase: largest angle of lambda at the start, in radians, in (0, 2 pi].
        reverse: run from the last token to the first.

    Source: Scientific Spaces archive 9554; arXiv:2303.06349.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        state_size: int | None = None,
        radius_min: float = 0.9,
        radius_max: float = 0.999,
        max_phase: float = 2 * math.pi,
        reverse: bool = False,
    ) -> None:
        super().__init__(hidden_size, state_size, radius_min, radius_max, reverse)
        if not 0 < max_phase <= 2 * math.pi:
            raise ValueError(f"max_phase must be in (0, 2 pi], got {max_phase}; it is an angle in radians")
        self.max_phase = max_phase
        self.theta_log = nn.Parameter(torch.empty(self.state_size))
        self.B = nn.Parameter(torch.empty(self.state_size, 2, hidden_size))
        self.C = nn.Parameter(torch.empty(hidden_size, self.state_size, 2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:  # noqa: D102
        super().reset_parameters(generator)
        self.theta_log.copy_((self.max_phase * uniform(self.state_size, generator).clamp(min=_LEAST)).log())
        self.B.normal_(0, (2 * self.hidden_size) ** -0.5, generator=generator)
        self.C.normal_(0, self.state_size**-0.5, generator=generator)

    def factors(self) -> Tensor:  # noqa: D102
        nu, theta = (x.to(wide_type(x)).exp() for x in (self.nu_log, self.theta_log))
        return torch.polar((-nu).exp(), theta)

    def _read(self, x: Tensor, gamma: Tensor) -> Tensor:
        weight = (self.B.to(x.dtype) * gamma[:, None, None]).flatten(0, 1)
        return torch.view_as_complex(F.linear(x, weight).unflatten(-1, (-1, 2)))

    def _write(self, h: Tensor) -> Tensor:
        pairs = torch.view_as_real(h).flatten(-2)
        weight = torch.stack((self.C[..., 0], -self.C[..., 1]), -1)
        return F.linear(pairs, weight.flatten(1).to(pairs.dtype))


class SLRU(_Recurrence):
    """The simpler linear recurrent unit: as :class:`LRU` with real factors, ``B`` and ``C``.

    Equal to an LRU whose angles are 0 and whose ``B`` and ``C`` have no imaginary part. Half the cost, somewhat worse.

    Args:
        hidden_size: H, width of input and output.
        state_size: N, real channels; None: as wide as the input.
        radius_min: least factor at the start, >= 0.
        radius_max: largest, below 1.
        reverse: run from the last token to the first.

    Source: Scientific Spaces archive 9554.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        state_size: int | None = None,
        radius_min: float = 0.9,
        radius_max: float = 0.999,
        reverse: bool = False,
    ) -> None:
        super().__init__(hidden_size, state_size, radius_min, radius_max, reverse)
        self.B = nn.Parameter(torch.empty(self.state_size, hidden_size))
        self.C = nn.Parameter(torch.empty(hidden_size, self.state_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:  # noqa: D102
        super().reset_parameters(generator)
        self.B.normal_(0, self.hidden_size**-0.5, generator=generator)
        self.C.normal_(0, self.state_size**-0.5, generator=generator)

    def factors(self) -> Tensor:  # noqa: D102
        return (-self.nu_log.to(wide_type(self.nu_log)).exp()).exp()

    def _read(self, x: Tensor, gamma: Tensor) -> Tensor:
        return F.linear(x, self.B.to(x.dtype) * gamma[:, None])

    def _write(self, h: Tensor) -> Tensor:
        return F.linear(h, self.C.to(h.dtype))


def _check_ring(radius_min: float, radius_max: float) -> None:
    if not 0 <= radius_min < radius_max < 1:
        raise ValueError(
            f"radius_min and radius_max must satisfy 0 <= radius_min < radius_max < 1, got {radius_min} and "
            f"{radius_max}; 0.9 and 0.999 suit most tasks"
        )
