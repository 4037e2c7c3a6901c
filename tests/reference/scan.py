"""The linear recurrence and the mixers on it, computed in the plainest ways: loops, a matrix, a Fourier transform."""

from __future__ import annotations

import torch
from torch import Tensor


def loop_scan(
    a: Tensor,
    u: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    hold: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    """One step after the other; row by row, so that masks are plain conditions."""
    batch, length, channels = u.shape
    rows = []
    for b in range(batch):
        state = torch.zeros(channels, dtype=torch.promote_types(a.dtype, u.dtype)) if h0 is None else h0[b]
        states: list[Tensor] = [state] * length
        for t in reversed(range(length)) if reverse else range(length):
            if reset is not None and reset[b, t]:
                state = torch.zeros_like(state)
            if hold is None or not hold[b, t]:
                state = (a if a.ndim == 1 else a[b, t]) * state + u[b, t]
            states[t] = state
        rows.append(torch.stack(states) if length else u[b])
    return torch.stack(rows)


def toeplitz_scan(a: Tensor, u: Tensor) -> Tensor:
    """A constant factor as a lower triangular matrix of its powers."""
    length = u.shape[1]
    lag = torch.arange(length)[:, None] - torch.arange(length)
    powers = torch.where(lag[..., None] >= 0, a ** lag.clamp(min=0)[..., None], 0)
    return torch.einsum("tsn,bsn->btn", powers, u)


def fourier_scan(a: Tensor, u: Tensor) -> Tensor:
    """A constant factor as a convolution with its powers, padded to twice the length."""
    length = u.shape[1]
    kernel = a ** torch.arange(length)[:, None]
    product = torch.fft.fft(u, 2 * length, dim=1) * torch.fft.fft(kernel, 2 * length, dim=0)
    return torch.fft.ifft(product, dim=1)[:, :length]


def upper_lower_scan(a: Tensor, u: Tensor) -> Tensor:
    """The article's form over the whole length, which it pads to a power of two."""
    batch, length, channels = u.shape
    size = 1 << max(0, length - 1).bit_length()
    h = torch.cat((u, u.new_zeros(batch, size - length, channels)), 1)
    half = 1
    while half < size:
        blocks = h.view(batch, -1, 2 * half, channels)
        powers = a ** torch.arange(1, half + 1)[:, None]
        blocks[:, :, half:] += powers * blocks[:, :, half - 1 : half]
        half *= 2
    return h[:, :length]


def naive_lru(layer: torch.nn.Module, x: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """An LRU in complex numbers, one step after the other; outputs and states."""
    weights = {name: value.detach().to(torch.float64) for name, value in layer.named_parameters()}
    factor = torch.exp(torch.complex(-weights["nu_log"].exp(), weights["theta_log"].exp()))
    b = torch.complex(weights["B"][:, 0], weights["B"][:, 1])
    c = torch.complex(weights["C"][..., 0], weights["C"][..., 1])
    state = torch.zeros(len(x), len(factor), dtype=torch.complex128) if h0 is None else h0
    outputs, states = [], []
    for step in x.to(torch.complex128).unbind(1):
        state = factor * state + weights["gamma_log"].exp() * (step @ b.T)
        outputs.append((state @ c.T).real + weights["D"] * step.real)
        states.append(state)
    return torch.stack(outputs, 1), torch.stack(states, 1)


def naive_wkv(k: Tensor, v: Tensor, time_decay: Tensor, time_first: Tensor) -> Tensor:
    """The weighted average of RWKV-4 written out as one sum over all earlier steps, without any scale."""
    rate, length = time_decay.exp(), k.shape[1]
    rows = []
    for t in range(length):
        age = torch.arange(t - 1, -1, -1, dtype=k.dtype)[:, None] * rate
        weights = torch.cat(((k[:, :t] - age).exp(), (k[:, t : t + 1] + time_first).exp()), 1)
        rows.append((weights * v[:, : t + 1]).sum(1) / weights.sum(1))
    return torch.stack(rows, 1)


def two_recurrences_wkv(k: Tensor, v: Tensor, time_decay: Tensor, time_first: Tensor) -> Tensor:
    """The same in the article's form: y_t, z_t and c_t = (g lam - 1) e^{k_t}."""
    lam, g = (-time_decay.exp()).exp(), time_first.exp()
    y = z = torch.zeros_like(k[:, 0])
    rows = []
    for key, value in zip(k.unbind(1), v.unbind(1), strict=True):
        y, z = lam * y + key.exp() * value, lam * z + key.exp()
        c = (g * lam - 1) * key.exp()
        rows.append((y + c * value) / (z + c))
    return torch.stack(rows, 1)
