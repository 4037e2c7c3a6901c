"""The token mixer of RWKV-4: two real linear recurrences and a division."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.attention.recurrent.inputs import refuse_nan, token_marks, wide_type
from danlu.kernels.scan import linear_scan

if TYPE_CHECKING:
    from danlu.attention.recurrent.cache import RecurrentLayer

__all__ = ["RWKV4Mix", "wkv"]

#: Logarithm of the scale of an empty sum: finite, so that differences of two are numbers.
_EMPTY = -1e38


class WKVState(NamedTuple):
    """Sums ``numerator`` and ``denominator``, both times exp(``scale``), each (batch, channels)."""

    numerator: Tensor
    denominator: Tensor
    scale: Tensor


class RWKVState(NamedTuple):
    """State of :class:`RWKV4Mix`: a :class:`WKVState` and the last input, (batch, hidden_size)."""

    numerator: Tensor
    denominator: Tensor
    scale: Tensor
    last: Tensor


def wkv(
    k: Tensor,
    v: Tensor,
    time_decay: Tensor,
    time_first: Tensor,
    state: WKVState | None = None,
    reset: Tensor | None = None,
    *,
    hold: Tensor | None = None,
) -> tuple[Tensor, WKVState]:
    """Average the values so far, weighted by exp(key) and by age.

    out_t = (sum_{s<t} e^{k_s - (t-1-s) w} v_s + e^{k_t + first} v_t) / (the same without v), with w = exp(time_decay).
    In the article's symbols, with lam = e^{-w} and g = e^{first}: out_t = (y_t + c_t v_t) / (z_t + c_t), where y and z
    are the linear recurrences y_t = lam y_{t-1} + e^{k_t} v_t and z_t = lam z_{t-1} + e^{k_t}, and c_t is
    (g lam - 1) e^{k_t}. Here y and z of the step before are used, since c_t cancels most of y_t where g is small.

    Both sums are kept relative to exp(m_t), m_t = max(m_{t-1} - w, k_t), so that no key is too large or too small.

    Args:
        k: keys (batch, length, channels), any floating type; sums are in float32 (float64 for float64).
        v: values, same shape.
        time_decay: (channels,), logarithm of the rate w.
        time_first: (channels,), bonus of the present token.
        state: sums after all earlier steps.
        reset: bool (batch, length), True where a new text begins.
        hold: bool (batch, length), True at padding.

    Returns:
        The averages in the type of ``v``, and the state after the last step.

    Source: Scientific Spaces archive 9554; arXiv:2305.13048.
    """
    out_type = v.dtype
    wide = wide_type(k)
    k, v, first = k.to(wide), v.to(wide), time_first.to(wide)
    rate = time_decay.to(wide).exp()
    batch, length, channels = k.shape
    if state is None:
        zero = k.new_zeros(batch, channels)
        state = WKVState(zero, zero, zero + _EMPTY)
    if length == 0:
        return v.to(out_type), state
    # The scale drops out of the ratio, and therefore has no gradient.
    top = _running_max(k.detach(), rate.detach(), state.scale, reset, hold)
    before = torch.cat((state.scale[:, None], top[:, :-1]), 1)
    keys = k if hold is None else k.masked_fill(hold[..., None], -torch.inf)
    factors, weight = (before - rate - top).exp(), (keys - top).exp()
    y, y_end = linear_scan(factors, weight * v, state.numerator, reset, hold=hold, return_final=True)
    z, z_end = linear_scan(factors, weight, state.denominator, reset, hold=hold, return_final=True)
    y, z = (torch.cat((start[:, None], x[:, :-1]), 1) for start, x in ((state.numerator, y), (state.denominator, z)))
    bonus = first + k
    if reset is not None:
        before = before.masked_fill(reset[..., None], _EMPTY)
    peak = torch.maximum(before, bonus.detach())
    old, new = (before - peak).exp(), (bonus - peak).exp()
    out = (old * y + new * v) / (old * z + new)
    return out.to(out_type), WKVState(y_end, z_end, top[:, -1])


def _running_max(k: Tensor, rate: Tensor, start: Tensor, reset: Tensor | None, hold: Tensor | None) -> Tensor:
    """m_t = max(m_{t-1} - w, k_t) as a running maximum of k_t + w t, whose rounding error the sums do not notice.

    In float64, with segments lifted above each other, so that a maximum does not outlive its text.
    """
    batch, length, _ = k.shape
    ones = torch.ones(batch, length, dtype=torch.float64, device=k.device)
    age = (ones if hold is None else ones.masked_fill(hold, 0)).cumsum(1)[..., None] * rate.double()
    lifted = k.double() + age
    if hold is not None:
        lifted = lifted.masked_fill(hold[..., None], -torch.inf)
    start = start.double()[:, None]
    if reset is None:
        return (torch.maximum(lifted.cummax(1).values, start) - age).to(k.dtype)
    segment = reset.cumsum(1)[..., None]
    lift = segment * (k.amax((0, 1)) - k.amin((0, 1)) + rate * length + 1).double()
    top = (lifted + lift).cummax(1).values - lift
    return (torch.where(segment > 0, top, torch.maximum(top, start)) - age).to(k.dtype)


class RWKV4Mix(nn.Module):
    """Token mixer of RWKV-4: receptance, key and value of this and the last token, then :func:`wkv`.

    Parameters have the names and meanings of the host library's RWKV attention, so that its weights fit:
    ``time_decay``, ``time_first``, ``time_mix_key``, ``time_mix_value``, ``time_mix_receptance``, ``key``, ``value``,
    ``receptance`` and ``output``. A decoded token costs the same at any length.

    Args:
        hidden_size: width of input and output.
        state_size: channels of the two recurrences; None: as wide as the input.
        layer: number of this layer, 0-based; the initialisation depends on it.
        layers: how many there are.

    Source: Scientific Spaces archive 9554; arXiv:2305.13048.
    """

    def __init__(self, *, hidden_size: int, state_size: int | None = None, layer: int = 0, layers: int = 1) -> None:
        super().__init__()
        state_size = hidden_size if state_size is None else state_size
        for name, value in (("hidden_size", hidden_size), ("state_size", state_size), ("layers", layers)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= layer < layers:
            raise ValueError(f"layer must be in 0..{layers - 1}, got {layer}")
        self.hidden_size, self.state_size, self.layer, self.layers = hidden_size, state_size, layer, layers
        self.time_decay = nn.Parameter(torch.empty(state_size))
        self.time_first = nn.Parameter(torch.empty(state_size))
        self.time_mix_key = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.time_mix_value = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.time_mix_receptance = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.key = nn.Linear(hidden_size, state_size, bias=False)
        self.value = nn.Linear(hidden_size, state_size, bias=False)
        self.receptance = nn.Linear(hidden_size, state_size, bias=False)
        self.output = nn.Linear(state_size, hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set decays, bonuses and shares as RWKV-4 does, by channel and depth; linear maps as PyTorch does.

        Args:
            generator: of the linear maps; the global one by default.
        """
        depth = self.layer / max(1, self.layers - 1)
        rest = 1 - self.layer / self.layers
        channel = torch.arange(self.state_size, dtype=torch.float64)
        self.time_decay.copy_(-5 + 8 * (channel / max(1, self.state_size - 1)) ** (0.7 + 1.3 * depth))
        self.time_first.copy_(torch.tensor(0.3).log() + 0.5 * ((channel + 1) % 3 - 1))
        share = torch.arange(self.hidden_size, dtype=torch.float64) / self.hidden_size
        self.time_mix_key.copy_(share**rest)
        self.time_mix_value.copy_(share**rest + 0.3 * depth)
        self.time_mix_receptance.copy_(share ** (0.5 * rest))
        for linear in (self.key, self.value, self.receptance, self.output):
            nn.init.kaiming_uniform_(linear.weight, a=5**0.5, generator=generator)

    def make_cache(self) -> RecurrentLayer:
        """A fresh cache layer."""
        from danlu.attention.recurrent.cache import RecurrentLayer

        return RecurrentLayer()

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: RecurrentLayer | None = None,
    ) -> Tensor:
        """Mix tokens; linear maps in the type of ``x``, sums in float32 or better.

        Args:
            x: (batch, length, hidden_size).
            positions: int64 (length,) or (batch, length); a token at position 0 begins a new text. None: one text.
            mask: bool (batch, past + length), True where there is a token.
            cache: the layer that :meth:`make_cache` made; is advanced.

        Returns:
            (batch, length, hidden_size) in the type of ``x``.

        Raises:
            ValueError: shapes that do not fit, or a ``time_decay`` that is not a number.
        """
        reset, hold = token_marks(x, self.hidden_size, positions, mask, cache)
        refuse_nan(self.time_decay, "time_decay")
        state = None if cache is None else cache.state
        last = x.new_zeros(x.shape[0], self.hidden_size) if state is None else state.last
        before, last = _shifted(x, last, reset, hold)

        def mixed(share: Tensor) -> Tensor:
            share = share.to(x.dtype)
            return x * share + before * (1 - share)

        k, v = self.key(mixed(self.time_mix_key)), self.value(mixed(self.time_mix_value))
        gate = self.receptance(mixed(self.time_mix_receptance)).sigmoid()
        with torch.autocast(x.device.type, enabled=False):
            sums = None if state is None else WKVState(*state[:3])
            mean, sums = wkv(k, v, self.time_decay, self.time_first, sums, reset, hold=hold)
        if cache is not None:
            cache.advance(RWKVState(*sums, last), x.shape[1])
        return self.output(gate * mean)


def _shifted(x: Tensor, last: Tensor, reset: Tensor | None, hold: Tensor | None) -> tuple[Tensor, Tensor]:
    """The token before each, padding not counted and zero at the start of a text; and the last token of each row."""
    both = torch.cat((last[:, None].to(x.dtype), x), 1)
    if hold is None:
        before, last = both[:, :-1], both[:, -1]
    else:
        number = torch.arange(1, both.shape[1], device=x.device)
        newest = F.pad((number * ~hold).cummax(1).values, (1, 0))
        real = both.gather(1, newest[..., None].expand(-1, -1, x.shape[-1]))
        before, last = real[:, :-1], real[:, -1]
    return (before if reset is None else before.masked_fill(reset[..., None], 0)), last
