"""Mixtures against ``torch.distributions``, differentiation, conditioning of the joint Gaussian, and drawn samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from danlu.diffusion.mixtures import GaussianMixture
from danlu.diffusion.processes import EDM, VP, RectifiedFlow
from reference.diffusion import autograd_score, noised_mixture, posterior

WEIGHTS = [0.3, 0.5, 0.2]
MEANS = [[-2.0, 0.5, 0.0], [1.0, 1.0, -1.0], [0.0, -2.0, 0.5]]
# Three axes: the eigenvectors of a 2 x 2 matrix can be a symmetric matrix, which hides a transposition.
FULL = [
    [[0.5, 0.1, 0.05], [0.1, 0.3, -0.1], [0.05, -0.1, 0.4]],
    [[0.2, -0.1, 0.1], [-0.1, 0.4, 0.02], [0.1, 0.02, 0.3]],
    [[0.6, 0.2, 0.0], [0.2, 0.1, 0.03], [0.0, 0.03, 0.5]],
]
AXES = [[0.5, 0.3, 0.1], [0.2, 0.4, 0.3], [0.6, 0.1, 0.2]]
ROUND = [0.5, 0.2, 0.05]
KINDS = {
    "full": (FULL, FULL),
    "by axis": (AXES, [np.diag(row).tolist() for row in AXES]),
    "isotropic": (ROUND, [(np.eye(3) * value).tolist() for value in ROUND]),
}
TIMES = torch.tensor([0.05, 0.3, 0.7, 0.95], dtype=torch.float64)


def build(kind: str):
    given, full = KINDS[kind]
    return GaussianMixture(torch.tensor(WEIGHTS), torch.tensor(MEANS), torch.tensor(given, dtype=torch.float64)), full


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("process", [VP(), RectifiedFlow(), EDM()], ids=["VP", "RectifiedFlow", "EDM"])
def test_density_score_and_posterior_are_those_of_the_reference(kind, process):
    mixture, full = build(kind)
    x = 2 * torch.randn(4, 3, dtype=torch.float64)
    weights, means = mixture.log_weights.exp(), mixture.means
    for i, t in enumerate(TIMES):
        a, s = float(process.alpha(t)), float(process.sigma(t))
        expected = noised_mixture(weights, means, full, a, s)
        torch.testing.assert_close(mixture.log_prob(x, t, process), expected.log_prob(x), rtol=1e-10, atol=1e-10)
        score = autograd_score(expected, x)
        torch.testing.assert_close(mixture.score(x, t, process), score, rtol=1e-9, atol=1e-9)
        mean, covariance = posterior(weights, means, full, a, s, x[i].numpy())
        denoised = mixture.denoise(x, t, process)
        np.testing.assert_allclose(denoised[i].numpy(), mean, rtol=1e-9, atol=1e-9)
        assert abs(float(mixture.posterior_variance(x, t, process)[i]) - np.trace(covariance)) < 1e-9
        torch.testing.assert_close(mixture.epsilon(x, t, process), -s * score, rtol=1e-9, atol=1e-9)
        flow = process.drift(t) * x - process.diffusion_squared(t) / 2 * score
        torch.testing.assert_close(mixture.velocity(x, t, process), flow, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_one_time_for_each_sample_is_the_same_as_one_after_the_other(kind):
    mixture, _ = build(kind)
    x = torch.randn(4, 3, dtype=torch.float64)
    for name in ("log_prob", "score", "denoise", "epsilon", "velocity", "posterior_variance"):
        together = getattr(mixture, name)(x, TIMES, VP())
        for i, t in enumerate(TIMES):
            torch.testing.assert_close(together[i], getattr(mixture, name)(x, t, VP())[i], rtol=1e-12, atol=1e-12)


def test_the_denoiser_of_a_mixture_is_its_own_model():
    mixture, _ = build("full")
    x = torch.randn(4, 3, dtype=torch.float64)
    denoiser = mixture.denoiser(VP())
    for name, exact in (("sample", mixture.denoise), ("score", mixture.score), ("velocity", mixture.velocity)):
        torch.testing.assert_close(getattr(denoiser, name)(x, TIMES), exact(x, TIMES, VP()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_moments_of_the_mixture(kind):
    mixture, full = build(kind)
    drawn = mixture.draw(200_000, seed=3).numpy()
    weights, means = np.array(WEIGHTS), np.array(MEANS)
    mean = weights @ means
    second = sum(w * (np.array(v) + np.outer(m, m)) for w, m, v in zip(weights, means, full, strict=True))
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.015)
    np.testing.assert_allclose(np.cov(drawn.T), second - np.outer(mean, mean), atol=0.03)
    assert torch.equal(mixture.draw(5, seed=1), mixture.draw(5, torch.Generator().manual_seed(1)))


def test_components_without_width_are_a_set_of_samples():
    """The data set itself: every posterior is a softmax over its samples."""
    data = torch.randn(7, 3, dtype=torch.float64)
    empirical = GaussianMixture(torch.ones(7), data, torch.zeros(7))
    x = torch.randn(2, 3, dtype=torch.float64)
    a, s = float(VP().alpha(0.4)), float(VP().sigma(0.4))
    share = (-(x[:, None] - a * data).square().sum(-1) / (2 * s * s)).softmax(1)
    torch.testing.assert_close(empirical.denoise(x, 0.4, VP()), share @ data, rtol=1e-10, atol=1e-10)


def test_far_tails_stay_finite():
    mixture, _ = build("full")
    x = torch.tensor([[1e3, -1e3, 1e3]], dtype=torch.float64)
    assert float(mixture.log_prob(x, 0.01, VP())) < -1e5
    assert bool(torch.isfinite(mixture.score(x, 0.01, VP())).all())


def test_bad_mixtures_and_samples_are_refused():
    with pytest.raises(ValueError, match=r"weights must be \(components,\) and means \(components, dimensions\)"):
        GaussianMixture(torch.ones(2), torch.zeros(3, 2), torch.ones(3))
    with pytest.raises(ValueError, match="weights must be positive"):
        GaussianMixture(torch.tensor([1.0, 0.0]), torch.zeros(2, 2), torch.ones(2))
    with pytest.raises(ValueError, match=r"covariances must be \(2,\), \(2, 3\) or \(2, 3, 3\), got \(3,\)"):
        GaussianMixture(torch.ones(2), torch.zeros(2, 3), torch.ones(3))
    with pytest.raises(ValueError, match="covariances must not have negative eigenvalues"):
        GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]))
    with pytest.raises(ValueError, match=r"x must be \(batch, 3\), got \(4, 2\)"):
        build("full")[0].score(torch.zeros(4, 2), 0.5, VP())
