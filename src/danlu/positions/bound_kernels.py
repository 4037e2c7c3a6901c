"""Compiled loops of the base bound; imported on first use, because numba takes a moment to import and to compile."""

from __future__ import annotations

import math

import numba
import numpy as np

_BLOCK = 256  # exact angles once per block keep the recurrence below within 1e-13
_STRIDE = 8192


@numba.njit(fastmath=True)
def first_negative(table: np.ndarray, start: int, stop: int, extra: float) -> int:
    """First m in [start, stop) with extra + sum_i cos(m * table_i) < 0, or -1."""
    pairs = table.size
    real, imag = np.empty(pairs), np.empty(pairs)
    cosine, sine = np.cos(table), np.sin(table)
    for block in range(start, stop, _BLOCK):
        for i in range(pairs):
            real[i] = math.cos(block * table[i])
            imag[i] = math.sin(block * table[i])
        for m in range(block, min(block + _BLOCK, stop)):
            total = extra
            for i in range(pairs):
                total += real[i]
            if total < 0:
                return m
            for i in range(pairs):
                turned = real[i] * cosine[i] - imag[i] * sine[i]
                imag[i] = imag[i] * cosine[i] + real[i] * sine[i]
                real[i] = turned
    return -1


@numba.njit
def failure(base: float, dim: int, length: int, extra: float, hint: int) -> int:
    """A distance in [0, length) at which the base fails, or -1; looks around `hint` first, then from the top down."""
    table = np.exp(-np.arange(dim // 2) * (2 * math.log(base) / dim))
    reach = 16 + hint // 1000
    found = first_negative(table, max(0, hint - reach), min(length, hint + reach), extra)
    stop = length
    while found < 0 and stop > 0:
        found = first_negative(table, max(0, stop - _STRIDE), stop, extra)
        stop -= _STRIDE
    return found


@numba.njit
def next_base(
    low: float, step: float, start: int, stop: int, wanted: bool, dim: int, length: int, extra: float, hint: int
) -> tuple[int, int]:
    """First k in [start, stop) for which the base low * exp(k * step) is as wanted, or -1; with the latest failure."""
    for k in range(start, stop):
        found = failure(low * math.exp(k * step), dim, length, extra, hint)
        if found >= 0:
            hint = found
        if (found < 0) == wanted:
            return k, hint
    return -1, hint
