"""Feature maps: what each weight is, the rows of FAVOR+, its mean and variance, and how the maps meet in limits."""

from __future__ import annotations

import math

import pytest
import torch

from danlu.attention.linear.engine import linear_attention, linear_attention_weights
from danlu.attention.linear.feature_maps import (
    EfficientFeatures,
    EluFeatures,
    ExpFeatures,
    FavorFeatures,
    HardVQ,
    SoftVQ,
    chi_quantile,
    orthogonal_features,
)
from reference import linear as dense

D = 5


def data(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64)


def kernel(feature_map, q, k):
    """sum_y A_y Phi_y of every pair, up to a factor per query."""
    a, b = feature_map.log_query(q[None, None]), feature_map.log_key(k[None, None])
    return (a[0, 0][:, None] + b[0, 0][None]).logsumexp(-1).exp()


@pytest.mark.parametrize("name", ["favor", "exp", "elu", "soft", "hard"])
def test_the_weight_of_a_pair_is_the_formula_up_to_a_factor_per_query(name):
    q, k, codebook = data(4, D), data(7, D), data(6, D)
    feature_map, weight = {
        "favor": lambda: (m := FavorFeatures(D, 9), lambda a, b: dense.favor_weight(a, b, m.projection.double())),
        "exp": lambda: (ExpFeatures(D), dense.exp_weight),
        "elu": lambda: (EluFeatures(D), dense.elu_weight),
        "soft": lambda: (SoftVQ(codebook, tau=0.7), lambda a, b: dense.soft_vq_weight(a, b, codebook, 0.7)),
        "hard": lambda: (HardVQ(codebook), lambda a, b: dense.hard_vq_weight(a, b, codebook)),
    }[name]()
    expected = torch.stack([torch.stack([weight(a, b) for b in k]) for a in q])
    found = kernel(feature_map, q, k)
    torch.testing.assert_close(found / found[:, :1], expected / expected[:, :1], rtol=1e-11, atol=0)


def test_elu_features_are_finite_where_elu_plus_one_rounds_to_zero():
    assert EluFeatures(1).log_query(torch.tensor([-200.0]))[0] == -200.0


def test_rows_are_orthogonal_within_a_block_and_the_last_block_is_cut():
    rows = orthogonal_features(2 * 8 + 3, 8).double()
    for block in rows.split(8):
        unit = torch.nn.functional.normalize(block, dim=-1)
        torch.testing.assert_close(unit @ unit.T, torch.eye(len(block), dtype=torch.float64), atol=1e-6, rtol=0)
    assert rows.shape == (19, 8)


def test_lengths_of_rows_are_regularised_stratified_or_chi():
    assert torch.allclose(orthogonal_features(20, 9, norms="regularised").norm(dim=-1), torch.tensor(3.0))
    lengths = orthogonal_features(99, 9, norms="stratified").double().norm(dim=-1).sort().values
    below = torch.special.gammainc(torch.tensor(4.5, dtype=torch.float64), lengths**2 / 2)
    torch.testing.assert_close(below, torch.arange(1, 100, dtype=torch.float64) / 100, atol=1e-5, rtol=0)
    squares = orthogonal_features(4000, 8).double().square().sum(-1)
    assert abs(squares.mean() - 8) < 0.3 and abs(squares.var() - 16) < 2.5


def test_chi_quantiles_of_two_dimensions_have_a_closed_form():
    level = torch.tensor([1e-9, 0.3, 0.999], dtype=torch.float64)
    torch.testing.assert_close(chi_quantile(level, 2), (-2 * torch.log1p(-level)).sqrt(), rtol=1e-7, atol=0)


def test_rows_follow_their_seed_and_redraw_changes_them_and_no_global_state():
    before = torch.get_rng_state()
    one, two = FavorFeatures(D, seed=3), FavorFeatures(D, seed=3)
    assert torch.equal(one.projection, two.projection) and one.features == 4 * D
    two.redraw(4)
    assert not torch.equal(one.projection, two.projection)
    two.reset_parameters()
    assert torch.equal(one.projection, two.projection)
    assert torch.equal(before, torch.get_rng_state())
    assert "projection" in one.state_dict()


def test_favor_is_unbiased_with_the_variance_of_the_formula():
    q, k = data(4, scale=0.35), data(4, scale=0.35)
    # independent Gaussian rows: the formula is for one feature
    rows = torch.randn(400_000, 4, dtype=torch.float64)
    feature_map = FavorFeatures(4, 4)
    feature_map.features, feature_map.projection = len(rows), rows
    a, b = feature_map.log_query(q[None, None, None]), feature_map.log_key(k[None, None, None])
    draws = (a + b)[0, 0, 0].sub(q @ q / 2).exp()
    exact = torch.exp(q @ k)
    assert abs(draws.mean() / exact - 1) < 0.01
    assert abs(draws.var() / exact**2 / (torch.exp((q + k) @ (q + k)) - 1) - 1) < 0.05


def test_orthogonal_rows_are_unbiased_and_have_less_variance():
    q, k = data(6, scale=0.25), data(6, scale=0.25)
    exact = torch.exp(q @ k)

    def estimates(rows):
        return (rows @ (q + k) - q @ q / 2 - k @ k / 2).exp().reshape(-1, 6).mean(-1)

    orthogonal = estimates(orthogonal_features(120_000, 6, seed=1).double())
    gaussian = estimates(torch.randn(120_000, 6, dtype=torch.float64))
    assert abs(orthogonal.mean() / exact - 1) < 0.05
    assert orthogonal.var() < gaussian.var()


def test_favor_is_soft_vq_with_performer_weights_and_with_weights_z_where_norms_are_equal():
    q, k, v = data(1, 2, 12, D), data(1, 2, 12, D), data(1, 2, 12, 3)
    favor = FavorFeatures(D, 7)
    soft = SoftVQ(favor.projection, tau=1.0, key_weight="performer")
    torch.testing.assert_close(
        linear_attention(q, k, v, favor)[0], linear_attention(q, k, v, soft)[0], rtol=1e-12, atol=1e-12
    )
    equal = FavorFeatures(D, 7, norms="regularised")
    rows = torch.nn.functional.normalize(equal.projection.double(), dim=-1) * math.sqrt(D)
    equal.projection = rows
    scaled = k * D**-0.25
    z = torch.exp(-((scaled[..., None, :] - rows) ** 2).sum(-1) / 2).sum(-1)
    weights = linear_attention_weights(q, k, SoftVQ(rows)) * z[:, :, None]
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, linear_attention_weights(q, k, equal), rtol=1e-10, atol=1e-12)


def test_soft_vq_becomes_hard_vq_as_tau_goes_to_zero():
    q, k, v, codebook = data(1, 1, 20, D), data(1, 1, 20, D), data(1, 1, 20, 3), data(1, 6, D)
    hard = linear_attention(q, k, v, HardVQ(codebook))[0]
    soft = linear_attention(q, k, v, SoftVQ(codebook, tau=1e-5))[0]
    torch.testing.assert_close(soft, hard, rtol=1e-9, atol=1e-9)


def test_a_shared_spread_of_the_codes_cancels():
    class Spread(HardVQ):
        def log_query(self, q):
            return super().log_query(q) + 0.8**2 * q.square().sum(-1, keepdim=True) / 2

    q, k, v, codebook = data(1, 1, 9, D), data(1, 1, 9, D), data(1, 1, 9, 3), data(1, 4, D)
    plain, spread = (linear_attention(q, k, v, kind(codebook))[0] for kind in (HardVQ, Spread))
    torch.testing.assert_close(plain, spread, rtol=1e-12, atol=1e-12)


def test_efficient_attention_is_two_softmaxes():
    q, k, v = data(2, 1, 11, D), data(2, 1, 11, D), data(2, 1, 11, 3)
    expected = q.softmax(-1) @ (k.softmax(-2).mT @ v)
    out, _ = linear_attention(q, k, v, EfficientFeatures(D), causal=False, chunk=4)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weights = linear_attention_weights(q, k, EfficientFeatures(D), causal=False)
    torch.testing.assert_close(weights @ v, expected, rtol=1e-12, atol=1e-12)


def test_gradients_reach_the_codes_of_soft_vq():
    codebook, k = data(1, 3, D), data(1, 1, 4, D)
    feature_map = SoftVQ(codebook, tau=0.5)

    feature_map.log_key(k)[..., 0].sum().backward()
    assert feature_map.codebook.grad.abs().sum() > 0


def test_bfloat16_is_computed_in_float32():
    x = torch.randn(1, 1, 3, D, dtype=torch.bfloat16)
    for feature_map in (FavorFeatures(D), ExpFeatures(D), EluFeatures(D), SoftVQ(torch.randn(4, D))):
        assert feature_map.log_query(x).dtype == feature_map.log_key(x).dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: orthogonal_features(0, 4), "features and dim must be at least 1, got 0 and 4"),
        (lambda: FavorFeatures(4, norms="unit"), "norms must be"),
        (lambda: SoftVQ(torch.zeros(2, 3), tau=0.0), "take HardVQ"),
        (lambda: SoftVQ(torch.zeros(2, 3), key_weight="z"), "key_weight must be"),
        (lambda: ExpFeatures(0), "features must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
