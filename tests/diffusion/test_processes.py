"""Coefficients of every process against plain formulas, derivatives against differentiation, and bad processes."""

from __future__ import annotations

import math

import pytest
import torch

from danlu.diffusion.process import as_time, per_sample
from danlu.diffusion.processes import EDM, VE, VP, Cosine, CustomProcess, Process, RectifiedFlow, SubVP
from reference.diffusion import SCHEDULES, derivative

PROCESSES = {
    "VP": VP(),
    "SubVP": SubVP(),
    "VE": VE(),
    "EDM": EDM(),
    "RectifiedFlow": RectifiedFlow(),
    "Cosine": Cosine(),
}
CUSTOM = CustomProcess(lambda t: torch.exp(-2 * t * t), lambda t: t + 0.5 * t**3, t_min=0.0, t_max=1.5)


def times_of(process: Process, count: int = 41) -> torch.Tensor:
    """Times inside a process, away from its ends."""
    width = process.t_max - process.t_min
    return torch.linspace(process.t_min + 0.02 * width, process.t_max - 0.02 * width, count, dtype=torch.float64)


@pytest.mark.parametrize("name", PROCESSES)
def test_coefficients_are_those_of_the_plain_formulas(name):
    process, (alpha, sigma) = PROCESSES[name], SCHEDULES[name]
    t = times_of(process)
    torch.testing.assert_close(process.alpha(t), alpha(t), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(process.sigma(t), sigma(t), rtol=1e-10, atol=0)
    torch.testing.assert_close(process.log_alpha(t), alpha(t).log(), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(process.half_log_snr(t), (alpha(t) / sigma(t)).log(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(process.noise_ratio(t), sigma(t) / alpha(t), rtol=1e-10, atol=0)
    assert bool((process.half_log_snr(t).diff() < 0).all())


@pytest.mark.parametrize("name", PROCESSES)
def test_derivatives_drift_and_diffusion_follow_from_alpha_and_sigma(name):
    process, (alpha, sigma) = PROCESSES[name], SCHEDULES[name]
    t = times_of(process)
    torch.testing.assert_close(process.alpha_prime(t), derivative(alpha, t), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(process.sigma_prime(t), derivative(sigma, t), rtol=1e-9, atol=1e-12)
    f = derivative(lambda t: alpha(t).log(), t)
    g_squared = derivative(lambda t: sigma(t) ** 2, t) - 2 * f * sigma(t) ** 2
    torch.testing.assert_close(process.drift(t), f, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(process.diffusion_squared(t), g_squared, rtol=1e-9, atol=1e-10)
    ratio = derivative(lambda t: sigma(t) / alpha(t), t)
    torch.testing.assert_close(process.diffusion_squared(t), 2 * alpha(t) * sigma(t) * ratio, rtol=1e-9, atol=1e-10)


def test_published_drift_and_diffusion():
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    beta, total = 0.1 + 19.9 * t, 0.1 * t + 9.95 * t**2
    torch.testing.assert_close(VP().diffusion_squared(t), beta, rtol=1e-13, atol=0)
    torch.testing.assert_close(SubVP().diffusion_squared(t), beta * (1 - torch.exp(-2 * total)), rtol=1e-12, atol=0)
    sigma = 0.01 * 5000**t
    torch.testing.assert_close(VE().diffusion_squared(t), 2 * sigma**2 * math.log(5000), rtol=1e-12, atol=0)
    torch.testing.assert_close(EDM().diffusion_squared(t), 2 * t, rtol=1e-13, atol=0)
    torch.testing.assert_close(RectifiedFlow().diffusion_squared(t), 2 * t / (1 - t), rtol=1e-12, atol=0)
    torch.testing.assert_close(RectifiedFlow().drift(t), -1 / (1 - t), rtol=1e-12, atol=0)


def test_a_custom_process_derives_what_a_built_in_one_has_in_closed_form():
    custom, closed = CustomProcess(*SCHEDULES["VP"]), VP()
    t = times_of(closed)
    for name in ("alpha_prime", "sigma_prime", "drift", "diffusion_squared", "log_alpha"):
        torch.testing.assert_close(getattr(custom, name)(t), getattr(closed, name)(t), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(custom.time_of(closed.half_log_snr(t)), t, rtol=1e-10, atol=1e-12)


def test_log_alpha_is_minus_five_t_squared_in_the_continuous_limit_of_ddpm():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    discrete = torch.log1p(-betas).cumsum(0) / 2
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(VP().log_alpha(t), discrete, rtol=0.02, atol=1e-4)
    assert abs(float(VP(0, 20).log_alpha(0.7)) + 5 * 0.49) < 1e-12


@pytest.mark.parametrize("process", [*PROCESSES.values(), CUSTOM], ids=[*PROCESSES, "custom"])
def test_time_of_inverts_the_log_signal_to_noise_ratio(process):
    t = times_of(process)
    torch.testing.assert_close(process.time_of(process.half_log_snr(t)), t, rtol=1e-9, atol=1e-12)
    ends = process.time_of(torch.tensor([math.inf, -math.inf], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([process.t_min, process.t_max], dtype=torch.float64))


def test_time_of_keeps_its_digits_next_to_the_data():
    for process in (VP(), SubVP(), VP(0.0, 20.0), Cosine(), RectifiedFlow()):
        t = torch.tensor([1e-4, 1e-3], dtype=torch.float64)
        torch.testing.assert_close(process.time_of(process.half_log_snr(t)), t, rtol=1e-9, atol=0)
    assert float(VP(0.0, 20.0).time_of(math.inf)) == 0


def test_sigma_of_vp_does_not_cancel_next_to_the_data():
    # B(1e-9) = 1e-10 + 9.95e-18, and sigma = sqrt(B) there; 1 - exp(-B) in float64 would have six digits left.
    assert abs(float(VP().sigma(1e-9)) / math.sqrt(1e-10 + 9.95e-18) - 1) < 1e-9
    assert float(VP().sigma(0.0)) == 0


def test_a_python_float_keeps_all_its_digits():
    assert float(as_time(0.1)) == 0.1
    assert float(VP().log_alpha(0.1)) == float(VP().log_alpha(torch.tensor(0.1, dtype=torch.float64)))


@pytest.mark.parametrize("process", [*PROCESSES.values(), CUSTOM], ids=[*PROCESSES, "custom"])
def test_times_may_be_floats_scalars_or_one_for_each_sample(process):
    middle = 0.4 * process.t_min + 0.6 * process.t_max
    for name in ("alpha", "sigma", "alpha_prime", "sigma_prime", "drift", "diffusion_squared", "half_log_snr"):
        value = getattr(process, name)
        assert value(middle).shape == ()
        each = value(torch.tensor([middle, middle]))
        assert each.shape == (2,) and each.dtype == torch.float64
        torch.testing.assert_close(value(middle), each[0], rtol=1e-6, atol=1e-6)


def test_add_noise_scales_each_sample_by_its_own_time():
    x0, noise = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    noised = VP().add_noise(x0, noise, t)
    for i in range(3):
        expected = float(VP().alpha(float(t[i]))) * x0[i] + float(VP().sigma(float(t[i]))) * noise[i]
        torch.testing.assert_close(noised[i], expected, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(VP().add_noise(x0, noise, float(t[i]))[i], expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("t", [0.3, torch.tensor([0.3, 0.3])], ids=["one time", "one for each"])
def test_noised_bfloat16_samples_are_float32(t):
    x0, noise = torch.randn(2, 3).bfloat16(), torch.randn(2, 3).bfloat16()
    noised = VP().add_noise(x0, noise, t)
    assert noised.dtype == torch.float32
    torch.testing.assert_close(noised, VP().add_noise(x0.float(), noise.float(), t))


def test_per_sample_puts_the_coefficient_on_the_first_axis():
    assert per_sample(torch.ones(3, dtype=torch.float64), torch.zeros(3, 2, 5)).shape == (3, 1, 1)
    assert per_sample(torch.ones(3, dtype=torch.float64), torch.zeros(3, 2)).dtype == torch.float32
    assert per_sample(torch.tensor(2.0), torch.zeros(3, 2, dtype=torch.float64)).dtype == torch.float64


def test_the_variance_of_euler_steps_is_the_published_one():
    """Gaussian data of deviation 0.5 and a linear score: every sampler is a recursion of the variance."""
    process, data, steps = VP(), 0.25, 100
    t = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64)
    alpha, sigma = process.alpha(t), process.sigma(t)
    assert abs(float(alpha[-1] ** 2 * data + sigma[-1] ** 2) - 0.25008246) < 1e-8
    for share, expected in ((1.0, 0.25390419), (0.5, 0.25156059), (0.0, 0.24791134)):
        variance = 1.0
        for i in range(steps):
            dt = float(t[i] - t[i + 1])
            f, g2 = float(process.drift(t[i])), float(process.diffusion_squared(t[i]))
            slope = -1 / float(alpha[i] ** 2 * data + sigma[i] ** 2)  # the score is slope * x
            factor = 1 - dt * (f - (g2 + share * g2) / 2 * slope)
            variance = factor**2 * variance + share * g2 * dt
        assert abs(variance - expected) < 1e-7
    for eta, expected in ((0.0, 0.23635582), (1.0, 0.21944583)):
        variance = 1.0
        for i in range(steps):
            a, s, b, r = (float(value) for value in (alpha[i], sigma[i], alpha[i + 1], sigma[i + 1]))
            total = a * a * data + s * s
            noise = eta * r / s * math.sqrt(s * s - (a / b) ** 2 * r * r)
            factor = b * a * data / total + math.sqrt(r * r - noise**2) * s / total
            variance = factor**2 * variance + noise**2
        assert abs(variance - expected) < 1e-7


def test_prior_is_the_noise_at_the_last_time():
    assert EDM().prior_std() == 80 and VE().prior_std() == pytest.approx(50) and RectifiedFlow().prior_std() == 1
    assert Cosine().alpha(1.0) == 0 and RectifiedFlow().alpha(1.0) == 0
    assert VP().prior_std() == pytest.approx(1, abs=1e-4)


def test_times_outside_a_process_are_refused_and_rounded_ends_are_not():
    with pytest.raises(ValueError, match=r"t must be in 0..1 for VP, got 1.1"):
        VP().check_times(torch.tensor([0.5, 1.1]))
    with pytest.raises(ValueError, match=r"t must be in 0.002..80 for EDM, got nan"):
        EDM().check_times(math.nan)
    assert float(EDM().check_times(torch.tensor(80.000001))) == 80


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: VP(2.0, 1.0), "0 <= beta_min <= beta_max must hold, got 2.0 and 1.0"),
        (lambda: VP(0.0, 0.0), "0 <= beta_min <= beta_max must hold"),
        (lambda: VE(0.0, 1.0), "0 < sigma_min < sigma_max must hold, got 0.0 and 1.0"),
        (lambda: EDM(1.0, 0.5), "0 < t_min < t_max must hold, got 1.0 and 0.5"),
        (lambda: CustomProcess(lambda t: 1 - t, lambda t: t, 1.0, 0.0), "t_min must be below t_max"),
        (lambda: CustomProcess(lambda t: t - 0.5, lambda t: t), "alpha_of must be positive between t_min and t_max"),
        (lambda: CustomProcess(lambda t: 1 - t, lambda t: t * math.nan), "sigma_of must be positive"),
        (lambda: CustomProcess(lambda t: torch.ones(()), lambda t: t), r"alpha_of must return the shape of its times"),
        (
            lambda: CustomProcess(lambda t: 1 - t, lambda t: (1 - t) ** 2),
            r"log\(alpha / sigma\) must decrease strictly with time, but it does not after t = ",
        ),
    ],
)
def test_processes_that_are_none_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()
