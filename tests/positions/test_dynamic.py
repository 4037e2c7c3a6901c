"""The step function of dynamic scaling."""

from __future__ import annotations

import math

import pytest

from danlu.positions.dynamic import dynamic_factor, segments


@pytest.mark.parametrize("growth", [2.0, 1.3, 4.0])
def test_smallest_sufficient_power(growth: float) -> None:
    for length in range(1, 2000):
        factor = dynamic_factor(length, 100, growth)
        assert factor * 100 >= length
        assert factor == 1.0 if length <= 100 else factor / growth * 100 < length + 1e-9
        assert math.log(factor, growth) == pytest.approx(round(math.log(factor, growth)), abs=1e-9)


@pytest.mark.parametrize(("start", "stop"), [(0, 1000), (0, 100), (99, 101), (399, 401), (250, 260), (7, 7)])
def test_segments_cover_the_rows_with_their_own_factor(start: int, stop: int) -> None:
    runs = segments(start, stop, 100)
    rows = [(row, factor) for low, high, factor in runs for row in range(low, high)]
    assert rows == [(row, dynamic_factor(row + 1, 100)) for row in range(start, stop)]
    assert len({factor for _, _, factor in runs}) == len(runs)


def test_reading_in_steps_sees_the_same_factors() -> None:
    whole = [factor for low, high, factor in segments(0, 900, 64) for _ in range(low, high)]
    steps = [segments(row, row + 1, 64)[0][2] for row in range(900)]
    assert whole == steps
    turned = sum(row for row in range(1, 900) if steps[row] != steps[row - 1])
    assert turned <= 2 * 900  # keys rotated again over the whole text, with growth 2


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: dynamic_factor(0, 10), "length"),
        (lambda: dynamic_factor(5, 0), "trained_length"),
        (lambda: dynamic_factor(5, 10, 1.0), "growth"),
        (lambda: dynamic_factor(5, 10, math.inf), "growth"),
        (lambda: segments(5, 4, 10), "start"),
        (lambda: segments(-1, 4, 10), "start"),
    ],
)
def test_refuses_bad_input(call, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        call()
