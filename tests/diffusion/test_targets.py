"""Conversions between kinds of prediction: round trips, the system that they solve, weights, and both illegal ends."""

from __future__ import annotations

import pytest
import torch

from danlu.diffusion.process import per_sample
from danlu.diffusion.processes import EDM, VE, VP, Cosine, CustomProcess, RectifiedFlow, SubVP
from danlu.diffusion.targets import PREDICTIONS, Denoiser, components, convert, split
from reference.diffusion import SCHEDULES, autograd_score, derivative, noised_mixture

PROCESSES = {
    "VP": VP(),
    "SubVP": SubVP(),
    "VE": VE(),
    "EDM": EDM(),
    "RectifiedFlow": RectifiedFlow(),
    "Cosine": Cosine(),
}
MIXTURE = (
    [0.3, 0.5, 0.2],
    [[-2.0, 0.5], [1.0, 1.0], [0.0, -2.0]],
    [[[0.5, 0.1], [0.1, 0.3]], [[0.2, -0.1], [-0.1, 0.4]], [[0.6, 0.0], [0.0, 0.1]]],
)


def noised(name: str, dtype: torch.dtype = torch.float64):
    process = PROCESSES[name]
    width = process.t_max - process.t_min
    t = torch.linspace(process.t_min + 0.05 * width, process.t_max - 0.05 * width, 5, dtype=torch.float64)
    x0, eps = torch.randn(5, 3, 2, dtype=dtype), torch.randn(5, 3, 2, dtype=dtype)
    return process, t, x0, eps, process.add_noise(x0, eps, t)


def targets(name: str, t, x0, eps):
    """Every kind written out with the plain formulas of the schedule."""
    alpha, sigma = SCHEDULES[name]
    a, s, da, ds = (
        value.reshape(-1, 1, 1) for value in (alpha(t), sigma(t), derivative(alpha, t), derivative(sigma, t))
    )
    return {
        "epsilon": eps,
        "sample": x0,
        "v": a * eps - s * x0,
        "score": -eps / s,
        "velocity": da * x0 + ds * eps,
    }


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("source", PREDICTIONS)
def test_every_kind_becomes_every_other(name, source):
    process, t, x0, eps, x = noised(name)
    kinds = targets(name, t, x0, eps)
    for target in PREDICTIONS:
        scale = float(kinds[target].abs().max())
        error = (convert(kinds[source], x, t, process, source, target) - kinds[target]).abs().max()
        # EDM and VE put sigma = 75 beside data of size 1: reading the data off the noise loses two digits there.
        assert float(error) < 1e-10 * max(1.0, scale)
    data, noise = split(kinds[source], x, t, process, source)
    torch.testing.assert_close(data, x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(noise, eps, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", PROCESSES)
def test_errors_of_two_kinds_differ_by_the_ratio_of_determinants(name):
    process, t, x0, eps, x = noised(name)
    alpha, sigma = (value(t) for value in SCHEDULES[name])
    guess = x0 + torch.randn_like(x0)
    as_sample = (guess - x0).square().sum((1, 2))
    for kind in PREDICTIONS:
        truth = targets(name, t, x0, eps)[kind]
        error = (convert(guess, x, t, process, "sample", kind) - truth).square().sum((1, 2))
        p, q = components(process, t, kind)
        delta = alpha * q - sigma * p
        torch.testing.assert_close(error, (delta / sigma) ** 2 * as_sample, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_velocity_is_the_drift_of_the_probability_flow(name):
    """``alpha' x_0 + sigma' eps`` of the exact denoiser is ``f x - g^2 / 2 score``, for every schedule."""
    process, (alpha, sigma) = PROCESSES[name], SCHEDULES[name]
    for share in (0.1, 0.5, 0.9):
        t = torch.tensor(process.t_min + share * (process.t_max - process.t_min), dtype=torch.float64)
        a, s = float(alpha(t)), float(sigma(t))
        x = a * torch.randn(6, 2, dtype=torch.float64) + s * torch.randn(6, 2, dtype=torch.float64)
        score = autograd_score(noised_mixture(*MIXTURE, a, s), x)
        expected = process.drift(t) * x - process.diffusion_squared(t) / 2 * score
        velocity = convert(score, x, t, process, "score", "velocity")
        torch.testing.assert_close(velocity, expected, rtol=1e-10, atol=1e-10)


def test_no_data_left_is_legal_for_what_says_the_data():
    x0, eps = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    for process in (RectifiedFlow(), Cosine()):
        x = process.add_noise(x0, eps, 1.0)
        for kind in ("sample", "v", "velocity"):
            p, q = (float(value) for value in components(process, 1.0, kind))
            data, noise = split(p * x0 + q * eps, x, 1.0, process, kind)
            torch.testing.assert_close(data, x0)
            torch.testing.assert_close(noise, eps)
        for kind in ("epsilon", "score"):
            with pytest.raises(ValueError, match=f"kind '{kind}' determines nothing where alpha is 0: use sample, v"):
                split(eps, x, 1.0, process, kind)


def test_no_noise_left_is_legal_for_what_says_the_noise():
    x0, eps = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    process = RectifiedFlow()
    for kind in ("epsilon", "v", "velocity"):
        p, q = (float(value) for value in components(process, 0.0, kind))
        data, noise = split(p * x0 + q * eps, x0, 0.0, process, kind)
        torch.testing.assert_close(data, x0)
        torch.testing.assert_close(noise, eps)
    for kind in ("sample", "score"):
        with pytest.raises(ValueError, match=f"kind '{kind}' determines nothing where sigma is 0: use epsilon, v"):
            split(x0, x0, 0.0, process, kind)


def test_one_bad_time_in_a_batch_is_enough_to_refuse():
    x = torch.randn(3, 2)
    with pytest.raises(ValueError, match="where alpha is 0"):
        convert(x, x, torch.tensor([0.2, 1.0, 0.5]), RectifiedFlow(), "epsilon", "sample")


def test_a_denoiser_gives_every_kind_from_one_call():
    process, t, x0, eps, x = noised("VP")
    kinds = targets("VP", t, x0, eps)
    for source in PREDICTIONS:
        calls = []

        def model(x, t, source=source, calls=calls):
            calls.append(t)
            return kinds[source]

        denoiser = Denoiser(model, process, source)
        for target in ("epsilon", "sample", "score", "velocity"):
            torch.testing.assert_close(getattr(denoiser, target)(x, t), kinds[target], rtol=1e-9, atol=1e-9)
        data, noise = denoiser.components(x, t)
        torch.testing.assert_close(data, x0)
        torch.testing.assert_close(noise, eps)
        assert len(calls) == 5


def test_a_denoiser_gives_the_model_one_time_for_each_sample_in_its_type():
    seen = []

    def model(x, t):
        seen.append(t)
        return x

    x = torch.zeros(3, 2)
    Denoiser(model, VP()).epsilon(x, 0.25)
    Denoiser(model, VP()).epsilon(x, torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))
    assert seen[0].tolist() == [0.25] * 3 and seen[0].dtype == torch.float32
    assert seen[1].dtype == torch.float32 and seen[1].shape == (3,)


def test_a_bfloat16_model_is_converted_in_float32():
    process, t, x0, eps, x = noised("VP", torch.float32)
    for time in (t, 0.5):
        data = convert(eps.bfloat16(), x.bfloat16(), time, process, "epsilon", "sample")
        assert data.dtype == torch.float32
        exact = convert(eps.bfloat16().float(), x.bfloat16().float(), time, process, "epsilon", "sample")
        torch.testing.assert_close(data, exact)
    assert Denoiser(lambda x, t: x.bfloat16(), process).epsilon(x, t).dtype == torch.float32


def test_conversions_let_gradients_through():
    process, t, x0, eps, x = noised("SubVP")
    prediction = eps.clone().requires_grad_()
    convert(prediction, x, t, process, "epsilon", "sample").sum().backward()
    expected = -per_sample(process.sigma(t) / process.alpha(t), x).expand_as(x)
    torch.testing.assert_close(prediction.grad, expected)


def test_a_custom_process_converts_like_the_closed_one():
    process, t, x0, eps, x = noised("Cosine")
    custom = CustomProcess(*SCHEDULES["Cosine"])
    expected = convert(eps, x, t, process, "epsilon", "velocity")
    torch.testing.assert_close(convert(eps, x, t, custom, "epsilon", "velocity"), expected, rtol=1e-9, atol=1e-9)


def test_bad_input_is_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="prediction must be one of epsilon, sample, v, score, velocity, got 'noise'"):
        split(x, x, 0.5, VP(), "noise")
    with pytest.raises(ValueError, match="target must be one of .* got 'x0'"):
        convert(x, x, 0.5, VP(), "epsilon", "x0")
    with pytest.raises(ValueError, match=r"prediction must have the shape of x \(2, 3\), got \(3,\)"):
        split(x[0], x, 0.5, VP(), "epsilon")
    with pytest.raises(TypeError, match="process must be a Process such as VP"):
        Denoiser(lambda x, t: x, "vp")
    with pytest.raises(TypeError, match="model must be callable"):
        Denoiser(None, VP())
