"""Grids of times: published values, what they are uniform in, ends, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from danlu.diffusion.grids import SPACINGS, check_grid, time_grid
from danlu.diffusion.processes import EDM, VE, VP, Cosine, RectifiedFlow


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [("polynomial", [80, 9.72320136, 0.469979058, 0.002]), ("time_uniform", [80, 6.95023541, 1.28666891, 0.002])],
)
def test_grids_of_four_points_are_the_published_ones(spacing, expected):
    torch.testing.assert_close(
        time_grid(EDM(), 3, spacing), torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=0
    )


def test_the_spacings_are_uniform_in_what_they_say():
    t = time_grid(VP(), 10, "uniform")
    torch.testing.assert_close(t.diff(), t.diff()[:1].expand(10))
    logsnr = VP().half_log_snr(time_grid(VP(), 10, "logsnr"))
    torch.testing.assert_close(logsnr.diff(), logsnr.diff()[:1].expand(10), rtol=1e-8, atol=0)
    for rho in (1.0, 3.0, 7.0):
        root = VP().noise_ratio(time_grid(VP(), 10, "polynomial", rho=rho)) ** (1 / rho)
        torch.testing.assert_close(root.diff(), root.diff()[:1].expand(10), rtol=1e-8, atol=0)


def test_time_uniform_is_uniform_in_the_time_of_a_variance_preserving_process():
    process = VP(0.4, 16.0)
    t = time_grid(process, 9, "time_uniform", start=1.0, end=1e-3)
    torch.testing.assert_close(t, torch.linspace(1.0, 1e-3, 10, dtype=torch.float64), rtol=1e-7, atol=1e-9)
    root = time_grid(process, 9, "time_uniform", rho=2.0, start=1.0, end=1e-3).sqrt()
    torch.testing.assert_close(root.diff(), root.diff()[:1].expand(9), rtol=1e-6, atol=0)


@pytest.mark.parametrize("process", [VP(), VE(), EDM(), RectifiedFlow(), Cosine()])
def test_default_grids_descend_from_end_to_end(process):
    for steps in (1, 2, 50):
        t = time_grid(process, steps)
        assert t.dtype == torch.float64 and t.shape == (steps + 1,) and bool((t.diff() < 0).all())
        assert float(t[0]) == process.t_max and float(t[-1]) == process.t_end


def test_the_default_spacing_depends_on_whether_the_ends_have_a_noise_ratio():
    torch.testing.assert_close(time_grid(EDM(), 5), time_grid(EDM(), 5, "polynomial", rho=7))
    torch.testing.assert_close(time_grid(RectifiedFlow(), 5), time_grid(RectifiedFlow(), 5, "uniform"))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_start_and_end_may_be_given(spacing):
    t = time_grid(RectifiedFlow(), 4, spacing, start=0.99, end=0.01)
    assert float(t[0]) == 0.99 and float(t[-1]) == 0.01 and bool((t.diff() < 0).all())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"steps": True}, "steps must be an integer of at least 1, got True"),
        ({"steps": 3, "spacing": "cosine"}, "spacing must be one of uniform, polynomial, logsnr, time_uniform"),
        ({"steps": 3, "spacing": "polynomial", "rho": 0.0}, "rho must be above 0, got 0"),
        ({"steps": 3, "start": 0.2, "end": 0.4}, "start must be above end, got 0.2 and 0.4"),
        ({"steps": 3, "start": 1.5}, "start and end must be in 0..1 for RectifiedFlow, got 1.5"),
        (
            {"steps": 4, "spacing": "time_uniform", "start": 0.9, "end": 0.1},
            "spacing 'time_uniform' does not descend in 4 steps from 0.9 to 0.1: the ends are too close",
        ),
        ({"steps": 3, "spacing": "logsnr"}, "needs noise and data at both ends, but sigma / alpha runs from inf to 0"),
    ],
)
def test_bad_grids_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        time_grid(RectifiedFlow(), **arguments)


def test_times_of_a_user_must_descend_inside_the_process():
    given = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    assert torch.equal(check_grid(given, VP()), given)
    with pytest.raises(
        ValueError, match="times must descend strictly from noise to data, got 0.5 before 0.5 at place 1"
    ):
        check_grid(torch.tensor([1.0, 0.5, 0.5]), VP())
    with pytest.raises(ValueError, match="one axis of at least two times"):
        check_grid(torch.tensor([0.5]), VP())
    with pytest.raises(ValueError, match="times must be in 0..1 for VP, got nan"):
        check_grid(torch.tensor([1.0, math.nan]), VP())
