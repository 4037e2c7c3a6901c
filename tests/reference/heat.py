"""Fields and fills of feature maps written cell by cell in float64."""

from __future__ import annotations

import numpy as np


def power(matrix, n: int):
    """matrix^n for n of either sign."""
    return np.linalg.matrix_power(matrix if n >= 0 else np.linalg.inv(matrix), abs(n))


def exponential(matrix):
    """exp by its series after halving 5 times."""
    small, total, term = matrix / 2**5, np.eye(len(matrix)), np.eye(len(matrix))
    for k in range(1, 20):
        term = term @ small / k
        total = total + term
    for _ in range(5):
        total = total @ total
    return total


def hyperbolic_cosine_of_root(matrix):
    """cosh(sqrt(P)) = sum P^k / (2k)!, which needs no root."""
    total, term = np.eye(len(matrix)), np.eye(len(matrix))
    for k in range(1, 40):
        term = term @ matrix / ((2 * k - 1) * (2 * k))
        total = total + term
    return total


def commuting_pair(size: int, seed: int, scale: float = 0.2):
    """A and B = cA + dA^2, both far from the identity."""
    a = scale * np.random.default_rng(seed).standard_normal((size, size))
    return a, 0.4 * a - 0.7 * a @ a


def field(step_x, step_y, z0, height: int, width: int):
    """z(x, y) = step_x^x step_y^y z0, as (channels, height, width)."""
    out = np.zeros((len(z0), height, width))
    for y in range(height):
        for x in range(width):
            out[:, y, x] = power(step_x, x) @ power(step_y, y) @ z0
    return out


def fill(block, top: int, left: int, height: int, width: int, across, along, rows_first: bool = True):
    """Fill (channels, rows, columns) cell by cell.

    Args:
        across: map from a signed distance in columns to the matrix that a step of that distance multiplies with.
        along: the same for rows.
        rows_first: the block's rows, then all columns; else the other way.
    """
    channels, rows, columns = block.shape
    out = np.full((channels, height, width), np.nan)
    out[:, top : top + rows, left : left + columns] = block
    bottom, right = top + rows - 1, left + columns - 1

    def row(y: int) -> None:
        for x in range(width):
            if x < left:
                out[:, y, x] = across(x - left) @ out[:, y, left]
            elif x > right:
                out[:, y, x] = across(x - right) @ out[:, y, right]

    def column(x: int) -> None:
        for y in range(height):
            if y < top:
                out[:, y, x] = along(y - top) @ out[:, top, x]
            elif y > bottom:
                out[:, y, x] = along(y - bottom) @ out[:, bottom, x]

    if rows_first:
        for y in range(top, bottom + 1):
            row(y)
        for x in range(width):
            column(x)
    else:
        for x in range(left, right + 1):
            column(x)
        for y in range(height):
            row(y)
    return out


def interpolated(values, positions, length: int):
    """np.interp of every channel: values (visible, channels)."""
    return np.stack([np.interp(np.arange(length), positions, values[:, c]) for c in range(values.shape[1])], 1)
