"""Logit scales: the published tables and fits, identities against mpmath and autograd, and the query module."""

import math

import mpmath
import numpy as np
import pytest
import torch

from danlu.attention.optimum import log_cosine_moment
from danlu.attention.scale import (
    LogitScale,
    effective_tokens,
    log_n_factor,
    optimal_scale,
    sample_log_moment,
    softmax_grad_l1,
)

GAUSSIAN = {
    16: 1.194,
    64: 1.549,
    128: 1.711,
    256: 1.863,
    512: 2.008,
    1024: 2.146,
    2048: 2.279,
    4096: 2.406,
    8192: 2.527,
    16384: 2.645,
    65536: 2.869,
    131072: 2.976,
    1048576: 3.279,
}
COSINE_N = [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
COSINE = {
    32: [10.25, 11.66, 13.08, 14.53, 16.02, 17.54, 19.11, 20.72, 22.39, 24.12],
    64: [13.42, 15.05, 16.64, 18.21, 19.77, 21.31, 22.85, 24.40, 25.94, 27.49],
    96: [16.02, 17.87, 19.66, 21.41, 23.12, 24.80, 26.46, 28.10, 29.72, 31.34],
    128: [18.25, 20.31, 22.29, 24.21, 26.08, 27.91, 29.70, 31.46, 33.19, 34.90],
    192: [22.06, 24.48, 26.81, 29.04, 31.21, 33.30, 35.35, 37.34, 39.29, 41.21],
    256: [25.30, 28.05, 30.67, 33.18, 35.61, 37.95, 40.23, 42.44, 44.60, 46.71],
    512: [35.42, 39.19, 42.77, 46.19, 49.46, 52.61, 55.66, 58.60, 61.46, 64.23],
}


# log n


def test_log_n_by_hand():
    unclipped = log_n_factor(torch.arange(8), 4, clip=False)
    expected = [math.log(i + 1) / math.log(4) for i in range(8)]
    assert torch.allclose(unclipped, torch.tensor(expected), atol=1e-6)
    clipped = log_n_factor(torch.arange(8), 4)
    assert torch.allclose(clipped, torch.tensor(expected).clamp(min=1.0), atol=1e-6)
    assert clipped.dtype == torch.float32


@pytest.mark.parametrize("length", [2, 3, 256, 1000, 4096, 131072])
def test_log_n_is_exactly_one_where_it_must_be(length):
    positions = torch.arange(length + 1)
    clipped = log_n_factor(positions, length)
    assert torch.equal(clipped[:length], torch.ones(length))
    assert clipped[length] > 1
    assert log_n_factor(torch.tensor(length - 1), length, clip=False) == 1.0


def test_log_n_window_shape_padding_and_dtype():
    factor = log_n_factor(torch.arange(100).view(4, 25), 8, window=16)
    assert factor.shape == (4, 25)
    assert torch.allclose(factor.flatten()[15:], torch.tensor(math.log(16) / math.log(8)))
    assert torch.equal(log_n_factor(torch.arange(20), 8, window=16)[:15], log_n_factor(torch.arange(15), 8))
    assert torch.equal(log_n_factor(torch.tensor([-3, 0]), 8, clip=False), torch.zeros(2))
    assert torch.equal(log_n_factor(torch.arange(9, dtype=torch.int32), 8), log_n_factor(torch.arange(9), 8))
    assert log_n_factor(torch.zeros(0, dtype=torch.long), 8).shape == (0,)


def test_log_n_decode_is_prefill():
    whole = log_n_factor(torch.arange(50), 16)
    assert torch.equal(whole, torch.stack([log_n_factor(torch.tensor(i), 16) for i in range(50)]))


def test_log_n_slows_the_growth_of_entropy():
    g = torch.Generator().manual_seed(0)
    d, rows = 64, 200

    def entropy(n, factor):
        q, k = (torch.nn.functional.normalize(torch.randn(m, d, generator=g), dim=-1) * 8 for m in (rows, n))
        logp = torch.log_softmax(factor * 1.5 * (q @ k.T) / 8, dim=-1)
        return -(logp.exp() * logp).sum(-1).mean().item()

    trained = entropy(128, 1.0)
    with_log_n = entropy(2048, log_n_factor(torch.tensor(2047), 128).item()) - trained
    assert 0 < with_log_n < 0.6 * (entropy(2048, 1.0) - trained)


def test_log_n_bad_input():
    with pytest.raises(TypeError, match="integer tensor, got torch.float32"):
        log_n_factor(torch.arange(4.0), 8)
    with pytest.raises(ValueError, match="trained_length must be >= 2, got 1"):
        log_n_factor(torch.arange(4), 1)
    with pytest.raises(ValueError, match="window must be >= 1, got 0"):
        log_n_factor(torch.arange(4), 8, window=0)


# the objective


def test_half_l1_of_the_jacobian():
    scores = torch.randn(5, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for alpha in (0.1, 1.0, 2.5, 9.0):
        for row in scores:
            jacobian = torch.autograd.functional.jacobian(lambda s, a=alpha: torch.softmax(a * s, -1), row)
            assert abs(jacobian.abs().sum() / 2 - softmax_grad_l1(row, alpha)) < 1e-12
    per_row = torch.linspace(1.0, 2.0, 5, dtype=torch.float64)
    single = torch.stack([softmax_grad_l1(s, a.item()) for s, a in zip(scores, per_row, strict=True)])
    assert torch.allclose(softmax_grad_l1(scores, per_row), single)


def test_masked_candidates_and_half_precision():
    scores = torch.tensor([1.0, 0.5, -0.3, float("-inf")])
    assert torch.allclose(softmax_grad_l1(scores, 2.0), softmax_grad_l1(scores[:3], 2.0))
    low = torch.randn(4, 2000, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert softmax_grad_l1(low, 1.0).dtype == torch.float32
    assert torch.allclose(softmax_grad_l1(low, 1.0).double(), softmax_grad_l1(low.double(), 1.0), rtol=1e-5)


def test_effective_tokens():
    assert torch.allclose(effective_tokens(torch.full((3, 7), 1 / 7)), torch.full((3,), 7.0))
    assert effective_tokens(torch.tensor([0.0, 1.0, 0.0])) == 1.0
    assert torch.allclose(effective_tokens(torch.tensor([0.5, 0.5, 0.0, 0.0])), torch.tensor(2.0))
    assert effective_tokens(torch.full((300,), 1 / 256).bfloat16()[:256]).dtype == torch.float32


# the surrogate's optimum


def test_gaussian_closed_form():
    n = np.unique(np.geomspace(2, 1e9, 400).round())
    x = optimal_scale(n) ** 2
    assert np.abs(np.exp(x) * (1 + 2 * x) / n - 1).max() < 1e-10
    for count in (2, 512, 10**6):
        lambert = mpmath.sqrt(mpmath.lambertw(count * mpmath.sqrt(mpmath.e) / 2) - mpmath.mpf(1) / 2)
        assert abs(optimal_scale(count) - float(lambert)) < 1e-12


def test_gaussian_table_and_fit():
    assert np.allclose(optimal_scale(list(GAUSSIAN)), list(GAUSSIAN.values()), rtol=1e-3)
    n = np.arange(40, 20001, 40)
    root = np.sqrt(np.log(n))
    assert abs((optimal_scale(n) * root).sum() / (root * root).sum() - 0.8413) < 1e-3


def test_gaussian_law_as_callable_and_as_samples():
    n = np.array([2, 64, 4096, 10**6])
    assert np.allclose(optimal_scale(n, lambda a: a * a / 2), optimal_scale(n), rtol=1e-7)
    assert np.allclose(optimal_scale(n, lambda a: 9 * a * a / 2), optimal_scale(n) / 3, rtol=1e-7)
    samples = torch.randn(50_000, generator=torch.Generator().manual_seed(3))
    assert optimal_scale(64, sample_log_moment(samples)) == pytest.approx(1.549, rel=0.03)


@pytest.mark.parametrize("d", sorted(COSINE))
def test_cosine_table(d):
    assert np.allclose(optimal_scale(COSINE_N, "cosine", d), COSINE[d], rtol=1e-3)


def test_cosine_fit():
    n = np.arange(40, 20001, 200)
    log_n = np.log(n)
    assert abs((optimal_scale(n, "cosine", 128) * log_n).sum() / (log_n * log_n).sum() - 3.49) < 0.02


@pytest.mark.parametrize("d", [2, 3, 16, 128, 1024])
def test_cosine_moment_against_hypergeometric_series(d):
    with mpmath.workdps(40):
        for a in (1e-3, 1.0, 50.0, 300.0):
            exact = mpmath.log(mpmath.hyp0f1(mpmath.mpf(d) / 2, mpmath.mpf(a) ** 2 / 4)) - a
            assert abs(float(log_cosine_moment(np.asarray(a), d) - exact)) < 1e-10


@pytest.mark.parametrize(("n", "d"), [(2, 2), (100, 2), (1000, 3), (512, 64), (10**6, 1024)])
def test_cosine_optimum_is_stationary_and_a_maximum(n, d):
    with mpmath.workdps(40):
        a = mpmath.mpf(optimal_scale(n, "cosine", d))

        def objective(x):
            def moment(y):
                return mpmath.hyp0f1(mpmath.mpf(d) / 2, y * y / 4)

            return x * (1 - moment(2 * x) / (n * moment(x) ** 2))

        assert abs(mpmath.diff(objective, a)) < 1e-6
        assert mpmath.diff(objective, a, 2) < 0


def test_cosine_small_dimensions_with_huge_optimum():
    # For large a the moment ratio is sqrt(pi*a) for d = 2 and a for d = 3.
    assert optimal_scale(10**9, "cosine", 2) == pytest.approx((2e9 / 3) ** 2 / math.pi, rel=1e-6)
    assert optimal_scale(10**9, "cosine", 3) == pytest.approx(5e8, rel=1e-6)


def test_forms_of_n():
    assert isinstance(optimal_scale(512), float)
    array = optimal_scale(np.array([[64, 512], [128, 256]]), "cosine", 64)
    assert array.shape == (2, 2) and array.dtype == np.float64
    assert array[0, 1] == pytest.approx(optimal_scale(512, "cosine", 64), rel=1e-7)
    tensor = optimal_scale(torch.tensor([64, 512]))
    assert tensor.dtype == torch.float64 and torch.allclose(tensor, torch.tensor([1.549, 2.008]).double(), atol=1e-3)
    array[:] = 0
    assert optimal_scale(np.array([[64, 512], [128, 256]]), "cosine", 64).all(), "the cache must not be writable"


# the empirical optimum


def test_empirical_median_peaks_where_a_fine_scan_does():
    scores = torch.randn(400, 512, generator=torch.Generator().manual_seed(4))
    alpha = optimal_scale(512, objective="empirical", scores=scores)
    assert 4.5 < alpha < 8, "far above the surrogate's 2.0"
    scan = [softmax_grad_l1(scores, a).median().item() for a in np.arange(1.0, 12.0, 0.25)]
    assert softmax_grad_l1(scores, alpha).median().item() >= max(scan) - 0.02
    mean = optimal_scale(512, objective="empirical", scores=scores.numpy(), statistic="mean")
    assert mean > alpha


def test_gradient_at_the_surrogate_is_twice_that_at_one():
    scores = torch.randn(2000, 512, generator=torch.Generator().manual_seed(5))
    values = {a: softmax_grad_l1(scores, a).mean().item() for a in (1.0, 2.0, 4.0)}
    assert values[1.0] == pytest.approx(0.995, abs=0.01)
    assert values[2.0] == pytest.approx(1.908, abs=0.03)
    assert values[4.0] == pytest.approx(2.753, abs=0.08)


def test_optimal_scale_bad_input():
    for bad in (1, 0, math.nan, math.inf, [64, 1]):
        with pytest.raises(ValueError, match="n must be finite and >= 2"):
            optimal_scale(bad)
    with pytest.raises(ValueError, match="d must be >= 2 for cosine"):
        optimal_scale(64, "cosine")
    with pytest.raises(ValueError, match="d must be >= 2 for cosine scores, got 1"):
        optimal_scale(64, "cosine", 1)
    with pytest.raises(ValueError, match="leave it out"):
        optimal_scale(64, "gaussian", 64)
    with pytest.raises(TypeError, match="got 'uniform'"):
        optimal_scale(64, "uniform")
    with pytest.raises(ValueError, match='objective must be "surrogate"'):
        optimal_scale(64, objective="exact")
    with pytest.raises(ValueError, match="sample_log_moment"):
        optimal_scale(64, scores=torch.randn(4, 64))
    with pytest.raises(ValueError, match=r"shape \(4, 32\)"):
        optimal_scale(64, objective="empirical", scores=torch.randn(4, 32))
    with pytest.raises(ValueError, match="not all equal"):
        optimal_scale(8, objective="empirical", scores=torch.zeros(4, 8))
    with pytest.raises(ValueError, match="statistic"):
        optimal_scale(8, objective="empirical", scores=torch.randn(4, 8), statistic="mode")
    with pytest.raises(ValueError, match="no optimum"):
        optimal_scale(64, lambda a: 0.0 * a)
    with pytest.raises(ValueError, match="non-finite"):
        optimal_scale(64, lambda a: np.where(a > 2, np.nan, 0.0))
    with pytest.raises(ValueError, match="no optimum"):
        optimal_scale(64, sample_log_moment(np.arange(8.0)))
    with pytest.raises(ValueError, match="samples must be finite"):
        sample_log_moment(torch.tensor([0.0, -math.inf]))


# the module


def test_constant_scale():
    q = torch.randn(2, 4, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    module = LogitScale(512)
    assert torch.allclose(module(q), q * optimal_scale(512), rtol=1e-6)
    assert not list(module.parameters()) and not module.state_dict()
    assert module(q.bfloat16()).dtype == torch.bfloat16
    assert LogitScale(256, "cosine", 64).scale().item() == pytest.approx(16.64, rel=1e-3)


@pytest.mark.parametrize("law", [("gaussian", None), ("cosine", 64)])
def test_per_position_scale(law):
    positions = torch.tensor([0, 1, 2, 3, 9, 100, 511, 70000, 2**24])
    expected = optimal_scale((positions + 1).clamp(min=2), *law)
    module = LogitScale(score=law[0], d=law[1], mode="per_position")
    assert torch.allclose(module.scale(positions).double(), expected, rtol=1e-3)
    q = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(7))
    assert torch.allclose(module(q, positions), q * module.scale(positions)[:, None])
    batch = torch.stack((positions, positions.flip(0)))
    assert torch.allclose(module(q, batch)[1, :, 0], q[1, :, 0] * module.scale(positions)[-1])
    step = torch.cat([module(q[:, :, i : i + 1], positions[i : i + 1]) for i in range(9)], dim=2)
    assert torch.equal(step, module(q, positions))


@pytest.mark.parametrize("mode", ["constant", "per_position"])
def test_learnable_scale_starts_at_the_optimum_and_learns(mode):
    n = 128 if mode == "constant" else None
    module = LogitScale(n, mode=mode, learnable=True)
    positions = torch.arange(6)
    q = torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(8))
    assert torch.allclose(module(q, positions), LogitScale(n, mode=mode)(q, positions))
    module(q, positions).square().sum().backward()
    # d/dlog of sum (s q)^2 = 2 sum (s q)^2
    assert torch.allclose(module.log_scale.grad, 2 * module(q, positions).square().sum())
    other = LogitScale(None if n is None else 4096, mode=mode, learnable=True)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(q, positions), module(q, positions))


def test_maximum_holds_and_can_be_left():
    module = LogitScale(512, learnable=True, maximum=1.5)
    assert module.scale().item() == pytest.approx(1.5)
    module.scale().backward()
    assert module.log_scale.grad.item() == pytest.approx(1.5)
    assert LogitScale(mode="per_position", maximum=1.0).scale(torch.arange(5000)).max().item() == pytest.approx(1.0)


def test_module_bad_input():
    with pytest.raises(ValueError, match="float16"):
        LogitScale(64, learnable=True, dtype=torch.float16)
    module = LogitScale(64, learnable=True).half()
    with pytest.raises(ValueError, match="float16"):
        module(torch.zeros(1, 1, 2, 4))
    LogitScale(64, learnable=True).bfloat16()(torch.zeros(1, 1, 2, 4))
    LogitScale(64).half()(torch.zeros(1, 1, 2, 4))
    with pytest.raises(ValueError, match="mode must be"):
        LogitScale(64, mode="row")
    with pytest.raises(ValueError, match="n is for mode"):
        LogitScale()
    with pytest.raises(ValueError, match="n is for mode"):
        LogitScale(64, mode="per_position")
    with pytest.raises(ValueError, match="maximum must be > 0"):
        LogitScale(64, maximum=0.0)
    with pytest.raises(ValueError, match="positions is needed"):
        LogitScale(mode="per_position")(torch.zeros(1, 1, 2, 4))


def test_masked_scores_do_not_move_the_empirical_optimum():
    scores = torch.randn(64, 40, generator=torch.Generator().manual_seed(9))
    masked = torch.cat((scores, torch.full((64, 25), -math.inf)), -1)
    wanted = optimal_scale(40, objective="empirical", scores=scores)
    assert optimal_scale(65, objective="empirical", scores=masked) == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(ValueError, match="not all equal or masked"):
        optimal_scale(4, objective="empirical", scores=torch.full((3, 4), -math.inf))
