"""Loops of the linear recurrence on the CPU: every operand is read once, and its backward pass is one loop as well.

Time is the outer loop and channels the inner one, which fills vector registers. A tile of channels of one batch row is
a task of its own, whatever the number of threads, so that the numbers do not depend on it. Complex numbers are pairs
of reals in memory; the loops take the state apart into real and imaginary halves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from danlu.kernels.compiling import announce
from danlu.kernels.signloops import in_parts

#: Products may be fused with sums; NaN and infinities keep their meaning.
_FUSED = {"contract", "nsz"}
#: Channels of a task: their state stays in the nearest cache.
_TILE = 64
#: Steps after which sums over time go to float64, and whose rows fit the second cache together.
_STEPS = 256
#: Numbers per thread below which another thread does not pay.
_WORTH = 1 << 15
_NUMPY = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.complex64: np.complex64,
    torch.complex128: np.complex128,
}


@numba.njit(cache=True, nogil=True, fastmath=_FUSED)
def _step(a, u, s, h):
    for n in range(s.size):
        s[n] = a[n] * s[n] + u[n]
        h[n] = s[n]


@numba.njit(cache=True, nogil=True, fastmath=_FUSED)
def _complex_step(a, u, s, z, h):
    for n in range(s.size):
        re = a[2 * n] * s[n] - a[2 * n + 1] * z[n] + u[2 * n]
        im = a[2 * n] * z[n] + a[2 * n + 1] * s[n] + u[2 * n + 1]
        s[n], z[n] = re, im
        h[2 * n], h[2 * n + 1] = re, im


@numba.njit(cache=True, nogil=True)
def _put(s, z, row, pairs):
    """Write the halves ``s`` and ``z`` as pairs; for real numbers ``z`` is idle."""
    if pairs == 1:
        row[:] = s
    else:
        for n in range(s.size):
            row[2 * n], row[2 * n + 1] = s[n], z[n]


@numba.njit(cache=True, nogil=True)
def _take(s, z, row, pairs):
    if pairs == 1:
        s[:] = row
    else:
        for n in range(s.size):
            s[n], z[n] = row[2 * n], row[2 * n + 1]


@numba.njit(cache=True, nogil=True)
def _warm(x, b, first, last, low, high):
    """Read a line of cache of each kind in rising order: the hardware foresees that, and rows that fall it does not."""
    line = 64 // x.itemsize
    total = x.dtype.type(0)
    for t in range(first, last):
        row = x[b, t, low:high]
        for n in range(0, row.size, line):
            total += row[n]
    return total


@numba.njit(cache=True, nogil=True)
def _scan(first, last, a, u, start, marks, reverse, pairs, h, final):
    """Tasks first to last of h_t = a_t h_{t-1} + u_t. A real array has ``pairs`` 1, and pairs of reals have 2.

    ``marks`` (batch, length) holds 1 where the state that arrives is dropped and 2 where the step is left out (3:
    both), or has no column.
    """
    length, width = u.shape[1], u.shape[2]
    tiles = -(-width // (pairs * _TILE))
    s, z, warmed = np.empty(_TILE, u.dtype), np.empty(_TILE, u.dtype), np.empty(1, u.dtype)
    for task in range(first, last):
        b, low = task // tiles, task % tiles * pairs * _TILE
        high = min(low + pairs * _TILE, width)
        s_, z_ = s[: (high - low) // pairs], z[: (high - low) // pairs]
        _take(s_, z_, start[b, low:high], pairs)
        steps = a.shape[1] > 1
        a_row = a[b % a.shape[0], 0, low:high]
        for i in range(length):
            t = length - 1 - i if reverse else i
            if reverse and i % _STEPS == 0:
                since = max(0, t + 1 - _STEPS)
                warmed[0] = _warm(u, b, since, t, low, high) + _warm(h, b, since, t, low, high)
            mark = marks[b, t] if marks.shape[1] else 0
            u_row, h_row = u[b, t, low:high], h[b, t, low:high]
            if mark:
                if mark == 1:  # not 0 times the factor, which may be infinite
                    _take(s_, z_, u_row, pairs)
                elif mark == 3:
                    s_[:] = 0
                    z_[:] = 0
                _put(s_, z_, h_row, pairs)
                continue
            if steps:
                a_row = a[b, t, low:high]
            if pairs == 1:
                _step(a_row, u_row, s_, h_row)
            else:
                _complex_step(a_row, u_row, s_, z_, h_row)
        _put(s_, z_, final[b, low:high], pairs)


@numba.njit(cache=True, nogil=True, fastmath=_FUSED)
def _back(a, g, past, s, du, p):
    for n in range(s.size):
        total = s[n] + g[n]
        du[n] = total
        p[n] += total * past[n]
        s[n] = a[n] * total


# Three short loops and not one: of few enough arrays the compiler checks that they do not overlap, and vectorises.
@numba.njit(cache=True, nogil=True, fastmath=_FUSED)
def _complex_arrive(g, s, z, du):
    for n in range(s.size):
        du[2 * n] = s[n] + g[2 * n]
        du[2 * n + 1] = z[n] + g[2 * n + 1]


@numba.njit(cache=True, nogil=True, fastmath=_FUSED)
def _complex_gain(du, past, p, q):
    """The pair (p, q) grows by G conj(past)."""
    for n in range(p.size):
        p[n] += du[2 * n] * past[2 * n] + du[2 * n + 1] * past[2 * n + 1]
        q[n] += du[2 * n + 1] * past[2 * n] - du[2 * n] * past[2 * n + 1]


@numba.njit(cache=True, nogil=True, fastmath=_FUSED)
def _complex_leave(a, du, s, z):
    """The next state is conj(a) G."""
    for n in range(s.size):
        s[n] = a[2 * n] * du[2 * n] + a[2 * n + 1] * du[2 * n + 1]
        z[n] = a[2 * n] * du[2 * n + 1] - a[2 * n + 1] * du[2 * n]


@numba.njit(cache=True, nogil=True)
def _scan_back(first, last, a, g, g_final, h, start, marks, reverse, pairs, du, da, sums, d_start):
    """Tasks first to last of G_t = g_t + conj(a_{t+1}) G_{t+1}; du_t = G_t, da_t = G_t conj(h_{t-1}).

    ``da`` (batch, length, channels) takes the gradient of a per-step a; where it has no column, ``sums`` (batch,
    channels) in float64 takes its sum over time.
    """
    length, width = g.shape[1], g.shape[2]
    tiles = -(-width // (pairs * _TILE))
    # Four arrays: of parts of one, the compiler would not know that they are apart.
    s_, z_ = np.empty(_TILE, g.dtype), np.empty(_TILE, g.dtype)
    p_, q_ = np.empty(_TILE, g.dtype), np.empty(_TILE, g.dtype)
    wide = np.empty(pairs * _TILE, g.dtype)
    for task in range(first, last):
        b, low = task // tiles, task % tiles * pairs * _TILE
        high = min(low + pairs * _TILE, width)
        count = (high - low) // pairs
        s, z, p, q = s_[:count], z_[:count], p_[:count], q_[:count]
        _take(s, z, g_final[b, low:high], pairs)
        p[:] = 0
        q[:] = 0
        a_row = a[b % a.shape[0], 0, low:high]
        for i in range(length):
            t = i if reverse else length - 1 - i
            if not reverse and i % _STEPS == 0:
                since = max(0, t + 1 - _STEPS)
                wide[0] = _warm(g, b, since, t, low, high) + _warm(h, b, since, t, low, high)
                wide[0] += _warm(du, b, since, t, low, high)
            g_row, du_row = g[b, t, low:high], du[b, t, low:high]
            mark = marks[b, t] if marks.shape[1] else 0
            if mark:
                _put(s, z, du_row, pairs)
                du_row += g_row
                _take(s, z, du_row, pairs)
                if mark & 2:
                    du_row[:] = 0
                if mark & 1:
                    s[:] = 0
                    z[:] = 0
            else:
                past = start[b, low:high] if i == length - 1 else h[b, t + 1 if reverse else t - 1, low:high]
                if a.shape[1] > 1:
                    a_row = a[b, t, low:high]
                if pairs == 1:
                    _back(a_row, g_row, past, s, du_row, p)
                else:
                    _complex_arrive(g_row, s, z, du_row)
                    _complex_gain(du_row, past, p, q)
                    _complex_leave(a_row, du_row, s, z)
            if da.shape[1]:
                _put(p, q, da[b, t, low:high], pairs)
                p[:] = 0
                q[:] = 0
            elif i % _STEPS == _STEPS - 1 or i == length - 1:
                _put(p, q, wide[: high - low], pairs)
                p[:] = 0
                q[:] = 0
                for n in range(high - low):
                    sums[b, low + n] += wide[n]
        _put(s, z, d_start[b, low:high], pairs)


def scan(a: Tensor, u: Tensor, h0: Tensor, marks: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    """The states and the last one; see ``danlu.kernels.scan``."""
    h, final = _new(u, u.shape), _new(h0, h0.shape)
    arrays = [_array(_steps(a)), _array(u), _array(h0), _marks(marks, u)]
    out = [_array(h), _array(final)]
    pairs = 2 if u.is_complex() else 1
    announce(_scan)
    in_parts(lambda first, last: _scan(first, last, *arrays, reverse, pairs, *out), *_tasks(u))
    return h, final


def scan_backward(
    g: Tensor, g_final: Tensor, a: Tensor, h: Tensor, h0: Tensor, marks: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, u and h0; see ``danlu.kernels.scan``."""
    du, d_start = _new(h, h.shape), _new(h0, h0.shape)
    da = _new(h, h.shape if a.ndim == 3 else (h.shape[0], 0, h.shape[2]))
    pairs = 2 if h.is_complex() else 1
    sums = np.zeros((h.shape[0], h.shape[2] * pairs))
    arrays = [_array(_steps(a)), _array(g), _array(g_final), _array(h), _array(h0), _marks(marks, h)]
    out = [_array(du), _array(da), sums, _array(d_start)]
    announce(_scan_back)
    in_parts(lambda first, last: _scan_back(first, last, *arrays, reverse, pairs, *out), *_tasks(h))
    if a.ndim == 1:
        total = torch.from_numpy(sums.sum(0))
        da = (torch.view_as_complex(total.view(-1, 2)) if pairs == 2 else total).to(a.dtype)
    return da, du, d_start


def _tasks(u: Tensor) -> tuple[int, int, int]:
    """How many tasks there are, how many of them are worth a thread, and 1: a thread may begin with any of them."""
    count = u.shape[0] * -(-u.shape[2] // _TILE)
    return count, max(1, _WORTH * count // max(1, u.numel())), 1


def _new(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Room for numbers. NumPy asks the system for large pages, which are filled in a tenth of the time on Linux."""
    return torch.from_numpy(np.empty(tuple(shape), _NUMPY[like.dtype]))


def _steps(a: Tensor) -> Tensor:
    return a[None, None] if a.ndim == 1 else a


def _marks(marks: Tensor | None, u: Tensor) -> np.ndarray:
    return np.empty((u.shape[0], 0), np.uint8) if marks is None else marks.contiguous().numpy()


def _array(x: Tensor) -> np.ndarray:
    """The numbers of a tensor, complex ones as pairs along the last axis; a view where the tensor is contiguous."""
    x = x.detach().resolve_conj().resolve_neg().contiguous()
    return (torch.view_as_real(x).flatten(-2) if x.is_complex() else x).numpy()
