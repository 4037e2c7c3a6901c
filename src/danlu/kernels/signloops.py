"""Loops for steps along the sign of a momentum on the CPU: every operand is read once, and NaN are looked for first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
from torch import Tensor

from danlu.kernels.compiling import announce

if TYPE_CHECKING:
    from danlu.kernels.signs import SignUpdate

#: Sums may be reordered and products fused; NaN and infinities keep their meaning.
_FAST = {"reassoc", "contract", "nsz"}
_BLOCK = 1 << 11
#: Elements per thread below which another thread does not pay.
_WORTH = 1 << 17


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _block_squares(x, zero):
    total = zero
    for i in range(x.size):
        total += x[i] * x[i]
    return total


@numba.njit(cache=True, nogil=True)
def _squares(x, zero):
    """In blocks like those of the update below, so that both give the same bits."""
    total = 0.0
    for start in range(0, x.size, _BLOCK):
        total += _block_squares(x[start : start + _BLOCK], zero)
    return total


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _not_finite(x, zero):
    total = zero
    for i in range(x.size):
        total += x[i] * zero
    return total


@numba.njit(cache=True, nogil=True)
def _row_squares(x, out, zero):
    for row in range(x.shape[0]):
        out[row] = _block_squares(x[row], zero)


@numba.njit(cache=True, nogil=True)
def _touched(x, out, zero):
    for row in range(x.shape[0]):
        out[row] = False
        for i in range(x.shape[1]):
            if x[row, i] != zero:  # mostly the first entry
                out[row] = True
                break


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _feed(m, g, decay):
    for i in range(m.size):
        m[i] = decay * m[i] + g[i]


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _move(p, m, keep, rate, zero):
    for i in range(p.size):
        v = m[i]
        p[i] = keep * p[i] - (rate if v > zero else (-rate if v < zero else zero))


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _feed_and_move(p, m, g, decay, keep, rate, zero):
    for i in range(p.size):
        v = decay * m[i] + g[i]
        m[i] = v
        p[i] = keep * p[i] - (rate if v > zero else (-rate if v < zero else zero))


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _move_ahead(p, m, g, look, decay, keep, rate, zero):
    for i in range(p.size):
        v = look * m[i] + g[i]
        m[i] = decay * m[i] + g[i]
        p[i] = keep * p[i] - (rate if v > zero else (-rate if v < zero else zero))


@numba.njit(cache=True, nogil=True)
def _update(p, m, g, fed, look, decay, keep, rate, zero):
    """One loop over all operands, since a loop over fewer waits for memory longer."""
    if not fed:
        _move(p, m, keep, rate, zero)
    elif look == decay:
        _feed_and_move(p, m, g, decay, keep, rate, zero)
    else:
        _move_ahead(p, m, g, look, decay, keep, rate, zero)


@numba.njit(cache=True, nogil=True)
def _flat(p, m, g, fed, look, decay, keep, rate, zero):
    """Squares are summed while a block is in the cache."""
    total = 0.0
    for start in range(0, p.size, _BLOCK):
        part = p[start : start + _BLOCK]
        _update(part, m[start : start + _BLOCK], g[start : start + _BLOCK], fed, look, decay, keep, rate, zero)
        total += _block_squares(part, zero)
    return total


@numba.njit(cache=True, nogil=True)
def _rows(p, m, g, fed, moved, look, decay, keep, rate, zero):
    for row in range(m.shape[0]):
        if moved and rate[row] != zero:
            _update(p[row], m[row], g[row], fed, look[row], decay[row], keep[row], rate[row], zero)
        elif fed:
            _feed(m[row], g[row], decay[row])


@numba.njit(cache=True, nogil=True)
def _mixed(x):
    """A permutation of 32 bits that leaves no trace of neighbouring inputs."""
    x = np.uint32(x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = np.uint32(x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return np.uint32(x ^ (x >> np.uint32(16)))


@numba.njit(cache=True, nogil=True)
def _round_bfloat16(bits, start, first, second):
    keep, fraction, special = np.uint32(0xFFFF0000), np.uint32(0xFFFF), np.uint32(0x7F800000)
    for i in range(bits.size):
        draw = _mixed(np.uint32(_mixed(np.uint32(start + i) ^ first) + second)) & fraction
        moved = np.uint32(bits[i] + draw) & keep
        if moved & special != special:  # else the cast to come decides between the largest number and infinity
            bits[i] = moved


@numba.njit(cache=True, nogil=True)
def _round_float16(values, bits, start, first, second):
    keep, fraction, sign = np.uint32(0xFFFFE000), np.uint32(0x1FFF), np.uint32(0x80000000)
    unit, per_unit, share = np.float32(2.0**-24), np.float32(2.0**24), np.float32(2.0**-32)
    for i in range(bits.size):
        draw = _mixed(np.uint32(_mixed(np.uint32(start + i) ^ first) + second))
        size = bits[i] & ~sign
        if size < np.uint32(0x38800000):  # below 2**-14 all neighbours are 2**-24 apart
            exact = abs(values[i]) * per_unit
            whole = np.floor(exact)
            whole += np.float32(np.float32(draw) * share < exact - whole)
            values[i] = whole * unit if values[i] >= 0 else -whole * unit
        else:
            moved = np.uint32(size + (draw & fraction)) & keep
            if moved <= np.uint32(0x477FE000):
                bits[i] = moved | (bits[i] & sign)


def round_(wide: Tensor, dtype: torch.dtype, start: int, key: int) -> Tensor:
    """Round float32 numbers at random to those that a half-precision type holds, in place.

    Args:
        wide: float32, contiguous, on the CPU.
        dtype: bfloat16 or float16.
        start: number of the first entry in its tensor; with the key it decides the draws.
        key: 64 bits.

    Returns:
        ``wide``.
    """
    values = _flat_array(wide)
    bits = values.view(np.uint32)
    first, second = np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32)
    if dtype == torch.bfloat16:
        announce(_round_bfloat16)
        in_parts(lambda a, b: _round_bfloat16(bits[a:b], start + a, first, second), bits.size)
    else:
        announce(_round_float16)
        in_parts(lambda a, b: _round_float16(values[a:b], bits[a:b], start + a, first, second), bits.size)
    return wide


def takes(tensor: Tensor) -> bool:
    """Whether the loops read such a tensor."""
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64) and tensor.is_contiguous()


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    flat = _flat_array(tensor)
    announce(_not_finite)
    return not any(in_parts(lambda a, b: _not_finite(flat[a:b], flat.dtype.type(0)), flat.size))


def sum_of_squares(tensor: Tensor) -> float:
    """Sum of squares, accumulated in float64 over blocks."""
    flat = _flat_array(tensor)
    announce(_squares)
    return sum(in_parts(lambda a, b: _squares(flat[a:b], flat.dtype.type(0)), flat.size))


def row_squares(table: Tensor) -> Tensor:
    """Sum of squares of each row, (rows,), in the type of the table."""
    x, out = _flat_array(table).reshape(table.shape), np.empty(len(table), _flat_array(table).dtype)
    announce(_row_squares)
    _in_row_parts(lambda a, b: _row_squares(x[a:b], out[a:b], x.dtype.type(0)), table)
    return torch.from_numpy(out)


def touched(table: Tensor) -> Tensor:
    """Which rows have an entry that is not zero, (rows,), bool."""
    x, out = _flat_array(table).reshape(table.shape), np.empty(len(table), np.bool_)
    announce(_touched)
    _in_row_parts(lambda a, b: _touched(x[a:b], out[a:b], x.dtype.type(0)), table)
    return torch.from_numpy(out)


def apply(update: SignUpdate) -> float | None:
    """Do one update; see ``danlu.kernels.signs.apply``."""
    if update.momentum.numel() == 0:
        return None
    if update.parameter is not None:
        torch.autograd.graph.increment_version(update.parameter)
    if update.by_row:
        _apply_rows(update)
        return None
    m = _flat_array(update.momentum)
    number = m.dtype.type
    g = m if update.gradient is None else _flat_array(update.gradient)
    if update.parameter is None:
        announce(_feed)
        in_parts(lambda a, b: _feed(m[a:b], g[a:b], number(update.decay)), m.size)
        return None
    p, fed = _flat_array(update.parameter), update.gradient is not None
    numbers = [number(x) for x in (update.look, update.decay, update.keep, update.rate, 0)]
    announce(_flat)
    return sum(in_parts(lambda a, b: _flat(p[a:b], m[a:b], g[a:b], fed, *numbers), m.size))


def _apply_rows(update: SignUpdate) -> None:
    m = update.momentum.detach().numpy()
    p = m if update.parameter is None else update.parameter.detach().numpy()
    g = m if update.gradient is None else update.gradient.detach().numpy()

    def column(value: Any) -> np.ndarray:
        if isinstance(value, Tensor):
            return value.to(update.momentum.dtype).expand(len(m), 1)[:, 0].contiguous().numpy()
        return np.full(len(m), value, m.dtype)

    columns = [column(x) for x in (update.look, update.decay, update.keep, update.rate)]
    fed, moved, zero = update.gradient is not None, update.parameter is not None, m.dtype.type(0)
    announce(_rows)
    _in_row_parts(
        lambda a, b: _rows(p[a:b], m[a:b], g[a:b], fed, moved, *(x[a:b] for x in columns), zero), update.momentum
    )


def _flat_array(tensor: Tensor) -> np.ndarray:
    return (tensor.detach() if tensor.requires_grad else tensor).numpy().reshape(-1)


def in_parts(work: Callable[[int, int], Any], size: int, worth: int = _WORTH, block: int = _BLOCK) -> list[Any]:
    """Results of ``work(first, last)`` over ranges of whole blocks, one for each of PyTorch's threads."""
    workers = size // worth
    if workers > 1:
        workers = min(workers, torch.get_num_threads())
    if workers <= 1:
        return [work(0, size)]
    share = -(-size // (workers * block)) * block
    starts = range(0, size, share)
    return list(_pool(workers).map(work, starts, [min(start + share, size) for start in starts]))


def _in_row_parts(work: Callable[[int, int], Any], table: Tensor) -> None:
    in_parts(work, len(table), worth=max(1, _WORTH // max(1, table.shape[1])), block=1)


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "danlu-signs")
