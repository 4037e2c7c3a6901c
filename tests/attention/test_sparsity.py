"""Sparsity measures and ranks: axioms, closed forms against quadrature and samples, and known matrices."""

import math

import numpy as np
import pytest
import torch

from danlu.attention.scale import effective_tokens
from danlu.attention.sparsity import (
    causal_logdet,
    decay_sparsity,
    effective_rank,
    numerical_rank,
    positive_linear_sparsity,
    rank_bound,
    sparsity,
    sparsity_closed_form,
    stable_rank,
)

F64 = torch.float64
KERNELS = {"exp": np.exp, "relu2": lambda x: np.maximum(x, 0) ** 2, "identity": lambda x: x}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def rows(count: int = 200, n: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, n, dtype=F64, generator=torch.Generator().manual_seed(seed)) + 0.05


def quadrature(kind: str, beta: float, gamma: float) -> float:
    """Mean of |f| over root mean square of f for scores N(beta, gamma^2), split where f has a kink."""
    nodes, weights = np.polynomial.legendre.leggauss(400)
    kink = min(max(-beta / gamma, -15.9), 15.9)
    first = second = 0.0
    # exp(2 gamma z) shifts the mass of the second moment by 2 gamma
    for low, high in ((-16.0, kink), (kink, 16.0 + 2 * gamma)):
        z = (high - low) / 2 * nodes + (high + low) / 2
        w = (high - low) / 2 * weights * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        value = np.abs(KERNELS[kind](beta + gamma * z))
        first, second = first + w @ value, second + w @ value**2
    return first / math.sqrt(second)


def test_sparsity_by_hand_and_at_its_limits():
    a = torch.tensor([[3.0, -4.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, -9.0, 0.0]])
    assert torch.allclose(sparsity(a), torch.tensor([7 / (2 * 5), 1.0, 0.5]))
    assert torch.allclose(sparsity(a.T, dim=0), sparsity(a))
    assert torch.allclose(sparsity(a, 1, math.inf), torch.tensor([7 / 16, 1.0, 0.25]))
    assert sparsity(a, 2, 3)[0] == pytest.approx(4 ** (1 / 3 - 1 / 2) * 5 / 91 ** (1 / 3))


def test_sparsity_is_the_coefficient_of_variation_with_the_root():
    a = draw(50, 9)
    variance, mean = a.abs().var(-1, correction=0), a.abs().mean(-1)
    assert torch.allclose(sparsity(a), (1 + variance / mean**2) ** -0.5, atol=1e-14)
    assert torch.allclose(sparsity(a), torch.cosine_similarity(a.sign(), a), atol=1e-14)


def test_effective_tokens_and_entropies_of_probabilities():
    p = (3 * draw(40, 11)).softmax(-1)
    s = sparsity(p)
    assert torch.allclose(11 * s**2, effective_tokens(p), atol=1e-12)
    renyi = math.log(11) + 2 * s.log()
    assert (torch.special.entr(p).sum(-1) - renyi).min() > 0


def test_zero_row_is_nan_and_extremes_do_not_overflow():
    assert torch.isnan(sparsity(torch.zeros(3))) and not torch.isnan(sparsity(torch.tensor([1e-30, 0.0])))
    huge = torch.tensor([1e30, 1e30, 0.0])
    assert sparsity(huge).item() == pytest.approx(math.sqrt(2 / 3))
    assert sparsity(torch.ones(4, dtype=torch.bfloat16)).dtype == torch.float32


def test_axioms_of_a_sparsity_measure():
    a, s = rows(), sparsity(rows())
    robin = a.sort(-1).values
    step = (robin[:, -1] - robin[:, 0]) * 0.3
    robin[:, 0], robin[:, -1] = robin[:, 0] + step, robin[:, -1] - step
    assert (sparsity(robin) > s).all()  # D1: taking from the rich makes it less sparse
    assert torch.allclose(sparsity(3.7 * a), s, atol=1e-14)  # D2: scale
    assert (sparsity(a + 0.4) > s).all()  # D3: rising tide
    assert torch.allclose(sparsity(torch.cat((a, a), -1)), s, atol=1e-14)  # D4: cloning
    grown = a.clone()
    grown[:, 2] += 100
    more = grown.clone()
    more[:, 2] += 1
    assert (sparsity(more) < sparsity(grown)).all()  # P1: one entry grows without end
    assert (sparsity(torch.cat((a, torch.zeros(200, 1, dtype=F64)), -1)) < s).all()  # P2: babies


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("beta", [-3.0, -1.1, 0.0, 0.7, 4.0])
@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.5])
def test_closed_form_equals_quadrature(kind, beta, gamma):
    assert sparsity_closed_form(kind, beta, gamma) == pytest.approx(quadrature(kind, beta, gamma), rel=1e-9, abs=0)


@pytest.mark.parametrize(("beta", "gamma"), [(-1.99, 1.0), (-2.01, 1.0), (-9.0, 1.0), (-15.0, 0.5)])
def test_squared_relu_far_in_its_tail(beta, gamma):
    nodes, weights = np.polynomial.legendre.leggauss(400)
    x = 10 * gamma * (nodes + 1)
    density = 10 * gamma * weights * np.exp(-(((x - beta) / gamma) ** 2) / 2) / (gamma * math.sqrt(2 * math.pi))
    expected = (density @ x**2) / math.sqrt(density @ x**4)
    assert sparsity_closed_form("relu2", beta, gamma) == pytest.approx(expected, rel=1e-9, abs=0)


@pytest.mark.parametrize("kind", KERNELS)
def test_closed_form_equals_a_large_sample(kind):
    g = torch.Generator().manual_seed(3)
    query, mean = torch.randn(8, generator=g, dtype=F64), torch.randn(8, generator=g, dtype=F64)
    keys = mean + 0.5 * torch.randn(300_000, 8, generator=g, dtype=F64)
    query = query / query.norm() * 1.6
    measured = sparsity(torch.from_numpy(KERNELS[kind]((keys @ query).numpy())))
    beta, gamma = float(query @ mean), 0.5 * 1.6
    assert measured.item() == pytest.approx(sparsity_closed_form(kind, beta, gamma), rel=0.01)


def test_closed_form_landmarks():
    for gamma in (0.1, 1.0, 7.0):
        assert sparsity_closed_form("relu2", 0.0, gamma) == pytest.approx(1 / math.sqrt(6), abs=1e-15)
        assert sparsity_closed_form("identity", 0.0, gamma) == pytest.approx(math.sqrt(2 / math.pi), abs=1e-15)
    floor = sparsity_closed_form("identity", 0.0, 1.0)
    betas = np.linspace(-4, 4, 81)
    values = [sparsity_closed_form("identity", beta, 1.0) for beta in betas]
    assert min(values) == pytest.approx(floor, abs=1e-12) and values == pytest.approx(values[::-1])
    assert sparsity_closed_form("relu2", -300.0, 1.0) == 0.0 and sparsity_closed_form("exp", 0, 5.0) < 1e-5
    assert sparsity_closed_form("relu2", 2.0, 0.0) == 1.0 == sparsity_closed_form("identity", -2.0, 0.0)
    assert math.isnan(sparsity_closed_form("relu2", -2.0, 0.0))


def test_positive_linear_form_is_exact_on_a_finite_sample():
    features, query = draw(37, 5, seed=1).exp(), draw(6, 5, seed=2).exp()
    mean = features.mean(0)
    covariance = (features - mean).T @ (features - mean) / 37
    expected = sparsity(query @ features.T)
    assert torch.allclose(positive_linear_sparsity(query, mean, covariance), expected, atol=1e-13)
    with pytest.raises(ValueError, match="non-negative features"):
        positive_linear_sparsity(-query, mean, covariance)


def test_positive_linear_sparsity_has_a_floor_that_width_does_not_lower():
    for m in (4, 64, 1024):
        one = torch.zeros(m, dtype=F64)
        one[0] = 1
        value = positive_linear_sparsity(one, torch.ones(m, dtype=F64), 0.25 * torch.eye(m, dtype=F64))
        assert value.item() == pytest.approx(1 / math.sqrt(1.25))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.97, 1 - 1e-9, 1.0])
@pytest.mark.parametrize("n", [1, 2, 1000, 1_000_000])
def test_decay_equals_the_direct_sum(decay, n):
    powers = np.arange(n, dtype=np.float64)
    row = np.exp(powers * math.log1p(decay - 1)) if decay else np.where(powers == 0, 1.0, 0.0)
    expected = math.fsum(row) / math.sqrt(n * math.fsum(row**2))
    assert decay_sparsity(decay, n) == pytest.approx(expected, rel=1e-12)


def test_ranks_of_known_matrices():
    eye = torch.eye(6)
    assert numerical_rank(eye) == 6 and effective_rank(eye).item() == pytest.approx(6) and stable_rank(eye) == 6
    flat = torch.ones(2, 5, 7)
    assert torch.equal(numerical_rank(flat), torch.tensor([1, 1]))
    assert torch.allclose(effective_rank(flat), torch.ones(2, dtype=F64), atol=1e-6)
    diagonal = torch.diag(torch.tensor([3.0, 1.0, 1e-8]))
    assert numerical_rank(diagonal) == 2 and numerical_rank(diagonal, rtol=0) == 3
    assert stable_rank(diagonal).item() == pytest.approx(10 / 9)
    share = torch.tensor([0.75, 0.25], dtype=F64)
    assert effective_rank(diagonal).item() == pytest.approx(torch.special.entr(share).sum().exp().item(), rel=1e-6)


def test_linear_attention_has_at_most_the_rank_of_its_features():
    q, k = (draw(40, 6, seed=seed).exp() for seed in (1, 2))
    scores = q @ k.T
    full, causal = scores / scores.sum(-1, keepdim=True), scores.tril() / scores.tril().sum(-1, keepdim=True)
    assert numerical_rank(full) <= rank_bound(40, 6) == 6
    assert rank_bound(40, 6, causal=True) == rank_bound(40) == 40 and rank_bound(3, 6) == 3
    assert causal_logdet(causal).item() == pytest.approx(causal.diagonal().log().sum().item())
    assert effective_rank(causal) > effective_rank(full)


def test_logdet_is_the_sum_of_the_logs_of_the_diagonal():
    a = rows(4, 9).diag_embed() + draw(4, 9, 9).tril(-1)
    assert torch.allclose(causal_logdet(a), torch.linalg.slogdet(a).logabsdet, atol=1e-12)


def test_bad_input():
    with pytest.raises(ValueError, match="0 < q < p, got q=2 and p=2"):
        sparsity(torch.ones(3), 2, 2)
    with pytest.raises(ValueError, match="at least one entry"):
        sparsity(torch.ones(2, 0))
    with pytest.raises(ValueError, match="kind must be one of exp, relu2, identity, got 'elu'"):
        sparsity_closed_form("elu", 0, 1)
    with pytest.raises(ValueError, match="gamma finite and >= 0"):
        sparsity_closed_form("exp", 0, -1)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\] and n >= 1"):
        decay_sparsity(1.1, 4)
    with pytest.raises(ValueError, match="must be square"):
        causal_logdet(torch.ones(2, 3))
    with pytest.raises(ValueError, match="lower triangular with a positive diagonal"):
        causal_logdet(torch.ones(3, 3))
    with pytest.raises(ValueError, match="two dimensions"):
        effective_rank(torch.ones(3))
    with pytest.raises(ValueError, match="rtol"):
        numerical_rank(torch.eye(2), rtol=1.0)
    with pytest.raises(ValueError, match="must be >= 1"):
        rank_bound(0)
