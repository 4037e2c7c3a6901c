"""The linear recurrence h_t = a_t h_{t-1} + u_t over whole sequences, with its gradient.

On the CPU compiled loops read every operand once. Elsewhere a blocked form of a few tensor operations runs: steps are
combined inside blocks of ``BLOCK`` by doubling, and the last states of the blocks are themselves such a recurrence.
Both are one operator to autograd and to ``torch.compile``, which keeps the states alone for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["linear_scan"]

#: Steps that the tensor form combines by doubling.
BLOCK = 128
_BACKENDS = ("auto", "loops", "torch")
_DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def linear_scan(
    a: Tensor,
    u: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    hold: Tensor | None = None,
    reverse: bool = False,
    return_final: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute h_t = a_t h_{t-1} + u_t for every step and channel.

    Differentiable once in ``a``, ``u`` and ``h0``: a second derivative raises. No power of ``1/a`` is ever taken, so
    that any ``|a| <= 1`` is safe at any length.

    Args:
        a: (channels,), or (batch, length, channels) with a factor for each step; real or complex.
        u: (batch, length, channels), real or complex; length and channels may be 0.
        h0: (batch, channels), the state before the first step (with ``reverse``: after the last); zero by default.
        reset: bool (batch, length); True drops the state that arrives at this step, as where packed segments begin.
        hold: bool (batch, length); True leaves the step out, h_t = h_{t-1} whatever u_t is, as for padding.
        reverse: run from the last step to the first, h_t = a_t h_{t+1} + u_t.
        return_final: also return the last state computed.
        backend: ``loops`` (CPU, compiled on first use), ``torch`` (any device), or ``auto``, which takes the loops on
            the CPU.

    Returns:
        h (batch, length, channels) in the common type of ``a``, ``u`` and ``h0``; with ``return_final`` a pair of it
        and the last state (batch, channels), which is ``h0`` (or zero) for length 0.

    Raises:
        TypeError: a type other than float32, float64, complex64 or complex128: shorter ones cannot hold 1 - ``|a|``.
        ValueError: shapes, devices or masks that do not fit, or an unknown backend.

    Source: Scientific Spaces archive 9554; arXiv:2303.06349.
    """
    _check(a, u, h0, reset, hold, backend)
    dtype = torch.promote_types(a.dtype, u.dtype)
    dtype = dtype if h0 is None else torch.promote_types(dtype, h0.dtype)
    if dtype.is_complex and not a.is_complex():
        return _by_parts(a, u, h0, reset, hold, dtype, reverse, return_final, backend)
    a, u = a.to(dtype), u.to(dtype)
    batch, length, channels = u.shape
    start = u.new_zeros(batch, channels) if h0 is None else h0.to(dtype)
    if length == 0:
        return (u, start) if return_final else u
    if length == 1:
        h = _one(a if a.ndim == 1 else a[:, 0], u[:, 0], start, reset, hold)
        return (h[:, None], h) if return_final else h[:, None]
    marks = None
    if reset is not None:
        marks = reset.to(torch.uint8)
    if hold is not None:
        marks = hold.to(torch.uint8) * 2 + (0 if marks is None else marks)
    loops = backend == "loops" or (backend == "auto" and u.device.type == "cpu")
    h, final = _scan(a, u, start, marks, reverse, loops)
    return (h, final) if return_final else h


def _by_parts(
    a: Tensor,
    u: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    hold: Tensor | None,
    dtype: torch.dtype,
    reverse: bool,
    return_final: bool,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """A real factor acts on real and imaginary parts alike: twice as many real channels."""

    def pairs(x: Tensor) -> Tensor:
        return torch.view_as_real(x.to(dtype).resolve_conj()).flatten(-2)

    def back(x: Tensor) -> Tensor:
        return torch.view_as_complex(x.unflatten(-1, (-1, 2)))

    h, final = linear_scan(
        a.repeat_interleave(2, -1), pairs(u), None if h0 is None else pairs(h0), reset,
        hold=hold, reverse=reverse, return_final=True, backend=backend,
    )  # fmt: skip
    return (back(h), back(final)) if return_final else back(h)


def _one(a: Tensor, u: Tensor, state: Tensor, reset: Tensor | None, hold: Tensor | None) -> Tensor:
    """A single step, as in decoding: plain operations cost less than the operator."""
    if reset is not None:
        a, state = a.masked_fill(reset, 0), state.masked_fill(reset, 0)
    h = a * state + u
    return h if hold is None else torch.where(hold, state, h)


@torch.library.custom_op("danlu::linear_scan", mutates_args=())
def _scan(a: Tensor, u: Tensor, h0: Tensor, marks: Tensor | None, reverse: bool, loops: bool) -> tuple[Tensor, Tensor]:
    if loops:
        from danlu.kernels import scan_loops

        return scan_loops.scan(a, u, h0, marks, reverse)
    a, u = _marked(a, u, marks)
    a, u = _in_order(reverse, a, u)
    h = _blocked(a, u, h0)
    final = h[:, -1].clone()
    return (h.flip(1) if reverse else h), final


@_scan.register_fake
def _(a: Tensor, u: Tensor, h0: Tensor, marks: Tensor | None, reverse: bool, loops: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u, memory_format=torch.contiguous_format), torch.empty_like(h0)


@torch.library.custom_op("danlu::linear_scan_backward", mutates_args=())
def _scan_backward(
    g: Tensor, g_final: Tensor, a: Tensor, h: Tensor, h0: Tensor, marks: Tensor | None, reverse: bool, loops: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if loops:
        from danlu.kernels import scan_loops

        return scan_loops.scan_backward(g, g_final, a, h, h0, marks, reverse)
    factors, _ = _marked(a, h, marks)
    factors, g, h = _in_order(reverse, factors, g, h)
    if factors.ndim == 3:
        # The factor of step t + 1 leads from G_{t+1} to G_t; what arrives from outside arrives unscaled.
        late = torch.cat((factors[:, 1:], torch.ones_like(factors[:, :1])), 1).flip(1).conj()
        total = _blocked(late, g.flip(1), g_final).flip(1)
        d_start = factors[:, 0].conj() * total[:, 0]
    else:
        last = torch.cat((g[:, :-1], (g[:, -1] + g_final)[:, None]), 1)
        total = _blocked(factors.conj(), last.flip(1), torch.zeros_like(h0)).flip(1)
        d_start = factors.conj() * total[:, 0]
    da = total * torch.cat((h0[:, None], h[:, :-1]), 1).conj()
    (total, da) = _in_order(reverse, total, da)
    if marks is not None:
        da = da.masked_fill((marks > 0)[..., None], 0)
        total = total.masked_fill((marks >= 2)[..., None], 0)
    return (da if a.ndim == 3 else da.sum((0, 1))), total.contiguous(), d_start


@_scan_backward.register_fake
def _(
    g: Tensor, g_final: Tensor, a: Tensor, h: Tensor, h0: Tensor, marks: Tensor | None, reverse: bool, loops: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(h if a.ndim == 3 else a), torch.empty_like(h), torch.empty_like(h0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, _, h0, marks, ctx.reverse, ctx.loops = inputs
    ctx.save_for_backward(a, output[0], h0, marks)


def _backward(ctx: Any, g: Tensor, g_final: Tensor) -> tuple[Tensor | None, ...]:
    a, h, h0, marks = ctx.saved_tensors
    da, du, d_start = _scan_backward(g, g_final, a, h, h0, marks, ctx.reverse, ctx.loops)
    return da, du, d_start, None, None, None


_scan.register_autograd(_backward, setup_context=_keep)


def _marked(a: Tensor, u: Tensor, marks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same recurrence without marks: factors 0 and 1, and no input where a step is left out."""
    if marks is None:
        return a, u
    held = (marks >= 2)[..., None]
    a = torch.where(held, torch.ones_like(a), a).masked_fill((marks % 2 == 1)[..., None], 0)
    return a, u.masked_fill(held, 0)


def _in_order(reverse: bool, *tensors: Tensor) -> list[Tensor]:
    return [x.flip(1) if reverse and x.ndim == 3 else x for x in tensors]


def _blocked(a: Tensor, u: Tensor, h0: Tensor) -> Tensor:
    """The recurrence by tensor operations: the article's Upper/Lower inside blocks, and itself between them."""
    batch, length, channels = u.shape
    size = min(BLOCK, 1 << (length - 1).bit_length())
    count = -(-length // size)
    missing = (0, 0, 0, count * size - length)
    h = F.pad(u, missing).view(batch, count, size, channels)
    if missing[-1] == 0:
        h = h.clone()
    if a.ndim == 3:
        # products of the factors since the block began
        since = F.pad(a, missing).view(batch, count, size, channels).clone()
    else:
        since = a[None].clone()
        while len(since) < size:
            since = torch.cat((since, since * since[-1]))
    half = 1
    while half < size:
        h_view = h.view(batch, count, size // (2 * half), 2 * half, channels)
        upper = h_view[..., half - 1 : half, :]
        if a.ndim == 3:
            factors = since.view(h_view.shape)
            h_view[..., half:, :] += factors[..., half:, :] * upper
            factors[..., half:, :] *= factors[..., half - 1 : half, :].clone()
        else:
            h_view[..., half:, :] += since[:half] * upper
        half *= 2
    arriving = h0[:, None]
    if count > 1:
        ends = _blocked(since[:, :, -1] if a.ndim == 3 else since[-1], h[:, :, -1], h0)
        arriving = torch.cat((arriving, ends[:, :-1]), 1)
    h += since * arriving[:, :, None]
    return h.view(batch, count * size, channels)[:, :length].contiguous()


def _check(a: Tensor, u: Tensor, h0: Tensor | None, reset: Tensor | None, hold: Tensor | None, backend: str) -> None:
    for name, x in (("a", a), ("u", u), ("h0", h0)):
        if x is not None and x.dtype not in _DTYPES:
            raise TypeError(
                f"{name} must be float32, float64, complex64 or complex128, got {x.dtype}: a state needs at least 24 "
                "bits; convert with .float()"
            )
    if u.ndim != 3:
        raise ValueError(f"u must be (batch, length, channels), got shape {tuple(u.shape)}")
    batch, length, channels = u.shape
    if a.shape not in ((channels,), u.shape):
        raise ValueError(f"a must be ({channels},) or {tuple(u.shape)} like u, got {tuple(a.shape)}")
    if h0 is not None and h0.shape != (batch, channels):
        raise ValueError(f"h0 must be ({batch}, {channels}), got {tuple(h0.shape)}")
    for name, x in (("reset", reset), ("hold", hold)):
        if x is not None and (x.dtype != torch.bool or x.shape != (batch, length)):
            raise ValueError(f"{name} must be bool ({batch}, {length}), got {x.dtype} {tuple(x.shape)}")
    devices = {x.device for x in (a, u, h0, reset, hold) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}, got {backend!r}")
    if backend == "loops" and u.device.type != "cpu":
        raise ValueError(f"backend 'loops' needs tensors on the CPU, got {u.device}; take 'torch' or 'auto'")
