"""The stretch factor of a row for dynamic NTK and dynamic YaRN: a step function of its position.

Why a step function of the position, and not of the length of the input. A query row and every key it sees must be
rotated by one and the same R, otherwise their score is not a function of their distance. The row at position i
therefore needs one factor s(i), and its keys have to be rotated with it. If s depended on the length of the whole
input, the same prompt would give other logits when read at once, token by token, or beside a longer one; as a function
of i alone it gives the same logits in all three cases. Were s(i) = (i + 1) / trained_length followed token by token,
every new token would change R and turn all cached keys again: O(n) per token. With s(i) rounded up to a power of
`growth`, the keys are turned again only when i + 1 passes trained_length * growth**m: a key is turned at most
1 + log(n / trained_length) / log(growth) times, and all of them together n * growth / (growth - 1) times at most, which
is O(1) per token. Inside the trained length s = 1, the model as it is.
"""

from __future__ import annotations

import math


def dynamic_factor(length: int, trained_length: int, growth: float = 2.0) -> float:
    """Stretch factor for a row that sees `length` tokens (its position is length - 1).

    The smallest growth**m, m = 0, 1, 2, ..., with growth**m * trained_length >= length.

    Args:
        length: Tokens visible to the row, itself included, >= 1.
        trained_length: Tokens >= 1.
        growth: Ratio of two steps, >= 1.01. Smaller follows the ideal (i + 1) / trained_length closer and re-rotates
            more often.

    Returns:
        s >= 1; exactly 1.0 inside the trained length.

    Raises:
        ValueError: A value outside its range.

    Source: Scientific Spaces archive 9706, 9948 ("locally static" scaling); arXiv:2309.00071 (dynamic scaling).
    """
    _check(trained_length, growth)
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"length must be an integer >= 1, got {length!r}")
    factor = 1.0
    while factor * trained_length < length:
        factor *= growth
    return factor


def segments(start: int, stop: int, trained_length: int, growth: float = 2.0) -> list[tuple[int, int, float]]:
    """Split rows [start, stop) into runs that share one stretch factor.

    Args:
        start: Position of the first row, >= 0.
        stop: One past the position of the last row, >= start.
        trained_length: Tokens >= 1.
        growth: As in `dynamic_factor`.

    Returns:
        [(row_start, row_stop, factor), ...], consecutive, none empty, covering [start, stop).

    Raises:
        ValueError: A value outside its range.
    """
    _check(trained_length, growth)
    if not isinstance(start, int) or not isinstance(stop, int) or not 0 <= start <= stop:
        raise ValueError(f"integers 0 <= start <= stop are required, got start={start!r}, stop={stop!r}")
    runs = []
    while start < stop:
        factor = dynamic_factor(start + 1, trained_length, growth)
        end = min(stop, math.floor(factor * trained_length))
        runs.append((start, end, factor))
        start = end
    return runs


def _check(trained_length: int, growth: float) -> None:
    if isinstance(trained_length, bool) or not isinstance(trained_length, int) or trained_length < 1:
        raise ValueError(f"trained_length must be an integer >= 1, got {trained_length!r}")
    if isinstance(growth, bool) or not isinstance(growth, (int, float)) or not 1.01 <= growth < math.inf:
        raise ValueError(f"growth must be a finite number >= 1.01, got {growth!r}")
