"""Losses against integrals by quadrature, the identities of conditional score matching, weights, times, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from danlu.diffusion.losses import csm_loss, denoising_loss, irreducible_loss, loss_weight, score_matching_loss
from danlu.diffusion.mixtures import GaussianMixture
from danlu.diffusion.processes import EDM, VE, VP, Cosine, CustomProcess, RectifiedFlow, SubVP
from danlu.diffusion.targets import PREDICTIONS, convert
from danlu.diffusion.times import LogitNormalTimes, LogNormalTimes, UniformTimes
from reference.diffusion import SCHEDULES, derivative, mixture_integrals

PROCESSES = {
    "VP": VP(),
    "SubVP": SubVP(),
    "VE": VE(),
    "EDM": EDM(),
    "RectifiedFlow": RectifiedFlow(),
    "Cosine": Cosine(),
}
WEIGHTS, MEANS, DEVIATIONS = (0.3, 0.7), (-2.0, 1.0), (0.5, 0.8)


def line_mixture() -> GaussianMixture:
    return GaussianMixture(
        torch.tensor(WEIGHTS, dtype=torch.float64),
        torch.tensor(MEANS, dtype=torch.float64)[:, None],
        torch.tensor(DEVIATIONS, dtype=torch.float64) ** 2,
    )


def constant_process(alpha: float, sigma: float) -> CustomProcess:
    """Has this alpha and sigma at t = 0.5."""
    return CustomProcess(lambda t: alpha * (1.5 - t), lambda t: sigma * (0.5 + t))


def line_quadrature(function, alpha: float, sigma: float) -> float:
    """Expectation over ``x_t`` of the mixture on the line, of a function of x (points, 1)."""
    x = torch.linspace(-30, 30, 200_001, dtype=torch.float64)[:, None]
    density = line_mixture().log_prob(x, 0.5, constant_process(alpha, sigma)).exp()
    return float((density * function(x)).sum() * (x[1, 0] - x[0, 0]))


@pytest.mark.parametrize(
    ("alpha", "sigma", "expected"), [(0.6, 0.8, 0.84164979), (0.5, 0.5, 2.51399518), (1.0, 2.0, 0.09210478)]
)
def test_the_constant_of_a_mixture_is_the_known_one(alpha, sigma, expected):
    process = constant_process(alpha, sigma)
    mixture = line_mixture()
    measured = line_quadrature(
        lambda x: irreducible_loss(mixture.posterior_variance(x, 0.5, process), process, 0.5), alpha, sigma
    )
    assert abs(measured - expected) < 1e-8
    reference = mixture_integrals(WEIGHTS, MEANS, DEVIATIONS, alpha, sigma, lambda x: -x)
    assert abs(reference["constant"] - expected) < 1e-8
    fisher = line_quadrature(lambda x: mixture.score(x, 0.5, process).square().sum(1), alpha, sigma)
    assert abs(1 / sigma**2 - fisher - expected) < 1e-8


def test_losses_of_a_wrong_score_are_the_known_ones():
    """Score matching and conditional score matching of the model ``-x``, integrated over data and noise."""
    process = constant_process(0.6, 0.8)
    mixture = line_mixture()

    def model(x, t):
        return -x

    sm = line_quadrature(
        lambda x: score_matching_loss(model, x, 0.5, process, mixture.score(x, 0.5, process), "score"), 0.6, 0.8
    )
    nodes, masses = np.polynomial.hermite_e.hermegauss(40)
    nodes, masses = torch.from_numpy(nodes), torch.from_numpy(masses / masses.sum())
    csm = 0.0
    for weight, mean, deviation in zip(WEIGHTS, MEANS, DEVIATIONS, strict=True):
        x0, noise = (grid.reshape(-1, 1) for grid in torch.meshgrid(mean + deviation * nodes, nodes, indexing="ij"))
        t = torch.full((len(x0),), 0.5, dtype=torch.float64)
        losses = csm_loss(model, x0, process, "score", t=t, noise=noise)
        csm += weight * float((masses[:, None] * masses).reshape(-1) @ losses)
    assert abs(sm - 0.23313021) < 1e-8
    assert abs(csm - 1.07478000) < 1e-8
    reference = mixture_integrals(WEIGHTS, MEANS, DEVIATIONS, 0.6, 0.8, lambda x: -x)
    assert abs(sm - reference["sm"]) < 1e-8 and abs(csm - reference["csm"]) < 1e-8
    assert abs(csm - sm - reference["constant"]) < 1e-8


@pytest.mark.parametrize("name", PROCESSES)
def test_the_constant_of_a_gaussian_is_the_closed_one(name):
    process, (alpha, sigma) = PROCESSES[name], SCHEDULES[name]
    d, variance = 3, 0.49
    gaussian = GaussianMixture(torch.ones(1), torch.zeros(1, d), torch.tensor([variance], dtype=torch.float64))
    for share in (0.05, 0.5, 0.95):
        t = torch.tensor(process.t_min + share * (process.t_max - process.t_min), dtype=torch.float64)
        a, s = alpha(t), sigma(t)
        total = a**2 * variance + s**2
        x = torch.randn(2, d, dtype=torch.float64)
        floor = irreducible_loss(gaussian.posterior_variance(x, t, process), process, t)
        expected = d * a**2 * variance / (s**2 * total)
        torch.testing.assert_close(floor, expected.expand(2), rtol=1e-9, atol=0)
        torch.testing.assert_close(expected, d / s**2 - d / total, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", PROCESSES)
def test_floors_of_noise_and_data_follow_from_the_constant(name):
    process, (alpha, sigma) = PROCESSES[name], SCHEDULES[name]
    t = torch.tensor(0.4 * process.t_min + 0.6 * process.t_max, dtype=torch.float64)
    a, s = alpha(t), sigma(t)
    variance = torch.tensor([0.7, 1.3], dtype=torch.float64)
    constant = irreducible_loss(variance, process, t)
    torch.testing.assert_close(irreducible_loss(variance, process, t, "epsilon"), s**2 * constant)
    torch.testing.assert_close(irreducible_loss(variance, process, t, "sample"), s**4 / a**2 * constant)
    torch.testing.assert_close(irreducible_loss(variance, process, t, "sample"), variance)
    g_squared = derivative(lambda t: sigma(t) ** 2, t) - 2 * derivative(lambda t: alpha(t).log(), t) * s**2
    torch.testing.assert_close(irreducible_loss(variance, process, t, "likelihood"), g_squared / 2 * constant)


def test_the_exact_model_reaches_the_floor_in_every_kind():
    mixture, process, t = line_mixture(), VP(), 0.35
    x0 = mixture.draw(40_000, seed=0)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    times = torch.full((len(x0),), t, dtype=torch.float64)
    x = process.add_noise(x0, noise, times)
    for kind in ("epsilon", "sample", "v", "velocity"):
        losses = denoising_loss(
            lambda x, t, kind=kind: convert(mixture.denoise(x, t, process), x, t, process, "sample", kind),
            x0, process, kind, t=times, noise=noise,
        )  # fmt: skip
        floors = irreducible_loss(mixture.posterior_variance(x, t, process), process, t, kind)
        deviation = float((losses - floors).std()) / len(x0) ** 0.5
        assert abs(float(losses.mean() - floors.mean())) < 4 * deviation
        assert deviation < 0.02 * float(losses.mean())


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_loss_is_the_mean_square_of_the_written_out_error(name, kind):
    process, (alpha, sigma) = PROCESSES[name], SCHEDULES[name]
    width = process.t_max - process.t_min
    t = torch.linspace(process.t_min + 0.1 * width, process.t_max - 0.1 * width, 4, dtype=torch.float64)
    x0, noise, output = (torch.randn(4, 3, 2, dtype=torch.float64) for _ in range(3))
    a, s, da, ds = (v.reshape(-1, 1, 1) for v in (alpha(t), sigma(t), derivative(alpha, t), derivative(sigma, t)))
    target = {
        "epsilon": noise,
        "sample": x0,
        "v": a * noise - s * x0,
        "score": -noise / s,
        "velocity": da * x0 + ds * noise,
    }[kind]
    seen = []

    def model(x, t):
        seen.append((x, t))
        return output

    losses = denoising_loss(model, x0, process, kind, t=t, noise=noise)
    torch.testing.assert_close(losses, (output - target).square().mean((1, 2)), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(seen[0][0], a * x0 + s * noise, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(seen[0][1], t)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_weighting_by_kind_is_the_loss_of_the_converted_prediction(name):
    process = PROCESSES[name]
    width = process.t_max - process.t_min
    t = torch.linspace(process.t_min + 0.1 * width, process.t_max - 0.1 * width, 4, dtype=torch.float64)
    x0, noise, output = (torch.randn(4, 5, dtype=torch.float64) for _ in range(3))
    for kind in PREDICTIONS:
        for weighting in PREDICTIONS:
            losses = denoising_loss(lambda x, t: output, x0, process, kind, weighting=weighting, t=t, noise=noise)
            converted = denoising_loss(
                lambda x, t, k=kind, w=weighting: convert(output, x, t, process, k, w),
                x0, process, weighting, t=t, noise=noise,
            )  # fmt: skip
            torch.testing.assert_close(losses, converted, rtol=1e-7, atol=1e-9)


def test_conditional_score_matching_sums_over_the_elements():
    x0, noise, output = (torch.randn(4, 3, 2, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    expected = (output + noise / SCHEDULES["VP"][1](t).reshape(-1, 1, 1)).square().sum((1, 2))
    torch.testing.assert_close(csm_loss(lambda x, t: output, x0, VP(), "score", t=t, noise=noise), expected)


def test_the_likelihood_weighting_is_half_of_g_squared_on_the_score():
    t = torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64)
    sigma_squared = 1 - torch.exp(-(0.1 * t + 9.95 * t**2))
    expected = (0.1 + 19.9 * t) / 2 / sigma_squared  # errors of the noise
    torch.testing.assert_close(loss_weight(VP(), t, "epsilon", "likelihood"), expected, rtol=1e-10, atol=0)


def test_a_weighting_may_be_a_function_of_the_times():
    x0, noise, t = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0.2, 0.5, 0.9])
    plain = denoising_loss(lambda x, t: x, x0, VP(), t=t, noise=noise)
    weighted = denoising_loss(lambda x, t: x, x0, VP(), t=t, noise=noise, weighting=lambda t: t + 1)
    torch.testing.assert_close(weighted, plain * (t + 1))


def test_conditional_and_plain_score_matching_have_one_gradient():
    """For a linear model and Gaussian data both gradients are known; the drawn one agrees within its noise."""
    process, t, variance = VP(), 0.3, 0.25
    a, s = float(process.alpha(t)), float(process.sigma(t))
    slope = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    x0 = 0.5 * torch.randn(200_000, 1, generator=generator, dtype=torch.float64)
    times = torch.full((len(x0),), t, dtype=torch.float64)
    csm_loss(lambda x, t: slope * x, x0, process, "score", t=times, seed=generator).mean().backward()
    total = a * a * variance + s * s
    expected = 2 * (-0.5 * total + 1)  # d/dk E (k x + x / total)^2
    assert abs(float(slope.grad) - expected) < 0.02


def test_bfloat16_models_are_scored_in_float32():
    x0, noise, t = torch.randn(2, 8).bfloat16(), torch.randn(2, 8).bfloat16(), torch.tensor([0.3, 0.6])
    losses = denoising_loss(lambda x, t: x.bfloat16(), x0, VP(), "v", t=t, noise=noise)
    exact = denoising_loss(lambda x, t: x.bfloat16().float(), x0.float(), VP(), "v", t=t, noise=noise.float())
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, exact)


def test_draws_follow_the_seed():
    x0 = torch.randn(16, 3)

    def loss(seed):
        return denoising_loss(lambda x, t: 0 * x, x0, RectifiedFlow(), "velocity", seed=seed)

    assert torch.equal(loss(1), loss(1)) and not torch.equal(loss(1), loss(2))
    generator = torch.Generator().manual_seed(1)
    first, second = loss(generator), loss(generator)
    assert torch.equal(first, loss(1)) and not torch.equal(first, second)


def test_times_are_spread_evenly_and_each_is_uniform():
    generator = torch.Generator().manual_seed(0)
    t = UniformTimes(0.2, 0.8)(64, VP(), generator)
    torch.testing.assert_close(t.sort().values.diff(), torch.full((63,), 0.6 / 64, dtype=torch.float64))
    first = torch.stack([UniformTimes()(4, RectifiedFlow(), generator)[0] for _ in range(4000)])
    assert abs(float(first.mean()) - 0.5) < 0.02 and abs(float(first.var()) - 1 / 12) < 0.004
    free = UniformTimes(spread=False)(20_000, VP(), generator)
    assert float(free.min()) >= 1e-3 and abs(float(free.mean()) - 0.5005) < 0.01
    assert float(free[:100].sort().values.diff().std()) > 0.005


def test_normal_times_are_normal_in_what_they_say():
    generator = torch.Generator().manual_seed(0)
    logit = LogitNormalTimes(0.5, 1.5)(50_000, RectifiedFlow(), generator).logit()
    assert abs(float(logit.mean()) - 0.5) < 0.03 and abs(float(logit.std()) - 1.5) < 0.03
    for process in (EDM(), RectifiedFlow()):
        logarithm = process.noise_ratio(LogNormalTimes()(50_000, process, generator)).log()
        assert abs(float(logarithm.mean()) + 1.2) < 0.03 and abs(float(logarithm.std()) - 1.2) < 0.03
    assert float(LogNormalTimes(-20.0)(10, EDM(), generator).max()) == 0.002


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "seed must be a generator or a number where t or noise is drawn, got None"),
        ({"t": torch.rand(4)}, "seed must be a generator"),
        ({"prediction": "noise", "seed": 0}, "prediction must be one of"),
        (
            {"weighting": "snr", "seed": 0},
            "weighting must be one of epsilon, .* likelihood, or a function",
        ),
        ({"t": torch.rand(3), "seed": 0}, "t must hold one time for each of the 4 samples"),
        ({"t": torch.full((4,), 2.0), "seed": 0}, "t must be in 0..1 for RectifiedFlow, got 2"),
        ({"t": torch.rand(4), "times": UniformTimes(), "seed": 0}, "give either t or times, not both"),
        ({"noise": torch.rand(4, 2), "seed": 0}, r"noise must have the shape of x0 \(4, 3\), got \(4, 2\)"),
        ({"t": torch.zeros(4), "weighting": "score", "seed": 0}, "must be finite and not negative, got inf at t = 0"),
        ({"weighting": lambda t: -t, "seed": 0}, "must be finite and not negative"),
    ],
)
def test_bad_input_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        denoising_loss(lambda x, t: x, torch.randn(4, 3), RectifiedFlow(), **options)


def test_bad_shapes_and_distributions_are_refused():
    with pytest.raises(ValueError, match=r"model must return the shape of x \(4, 3\), got \(4, 1\)"):
        denoising_loss(lambda x, t: x[:, :1], torch.randn(4, 3), VP(), seed=0)
    with pytest.raises(ValueError, match=r"x0 must be \(batch, ...\) with at least one sample"):
        denoising_loss(lambda x, t: x, torch.randn(4), VP(), seed=0)
    with pytest.raises(ValueError, match="score must have the shape of x"):
        score_matching_loss(lambda x, t: x, torch.zeros(2, 3), 0.5, VP(), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="start must be below end, got 0.5 and 0.5"):
        UniformTimes(0.5, 0.5)(3, VP())
    with pytest.raises(ValueError, match="std must be above 0 and finite, got 0.0"):
        LogitNormalTimes(std=0.0)
    with pytest.raises(ValueError, match="mean must be finite, got nan"):
        LogNormalTimes(mean=float("nan"))
