"""How concentrated and how full-rank an attention operator is: measures of rows and matrices, and closed forms.

The sparsity of a row a of n numbers is ``S(a) = mean|a| / sqrt(mean a^2)``, between 1/sqrt(n) (one entry has it all)
and 1 (all equal): smaller is sparser. For a probability row, ``n * S^2 = 1 / sum p^2`` is its effective number of
tokens and ``ln n + 2 ln S`` its Renyi-2 entropy, a lower bound of its Shannon entropy. Across different n, compare the
effective number of tokens and not S, whose floor moves with n.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "causal_logdet",
    "decay_sparsity",
    "effective_rank",
    "numerical_rank",
    "positive_linear_sparsity",
    "rank_bound",
    "sparsity",
    "sparsity_closed_form",
    "stable_rank",
]

_KINDS = ("exp", "relu2", "identity")
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(240)
# Below this ratio of mean to spread the closed form of relu^2 cancels, and a quadrature takes over.
_TAIL = -2.0


def sparsity(x: Tensor, q: float = 1.0, p: float = 2.0, dim: int = -1) -> Tensor:
    """Sparsity ``n^(1/p - 1/q) * |x|_q / |x|_p`` of the rows of a tensor; smaller is sparser.

    Args:
        x: numbers of any sign, not necessarily normalised; n is the size of ``dim``, >= 1.
        q: smaller order of the two norms, > 0.
        p: larger order, > q, may be infinite.
        dim: the dimension that holds a row.

    Returns:
        Tensor without ``dim``, float32 or float64, in [n^(1/p - 1/q), 1]. A row of zeros has no sparsity and gives NaN.

    Raises:
        ValueError: the orders are not ``0 < q < p``, or a row is empty.

    Source: Scientific Spaces archive 9595, 9889. Where archive 9595 prints S as ``1 / (1 + Var|a| / E[|a|]^2)``, the
    square root over the denominator is missing.
    """
    if not 0 < q < p:
        raise ValueError(f"orders must satisfy 0 < q < p, got q={q} and p={p}")
    n = x.shape[dim]
    if n == 0:
        raise ValueError(f"a row must have at least one entry, got x of shape {tuple(x.shape)} along dim {dim}")
    wide = (x if x.dtype == torch.float64 else x.float()).abs()
    # By the largest entry first: squares of large entries must not overflow, nor those of small ones vanish.
    wide = wide / wide.amax(dim, keepdim=True)
    top = torch.ones(()) if math.isinf(p) else wide.pow(p).mean(dim).pow(1 / p)
    return wide.pow(q).mean(dim).pow(1 / q) / top.to(wide)


def sparsity_closed_form(kind: str, beta: float, gamma: float) -> float:
    """Sparsity of a row ``f(q.k_j)`` for many keys ``k ~ N(mu, sigma^2 I)``: the limit n -> infinity.

    Args:
        kind: ``"exp"`` (softmax): exp(-gamma^2 / 2), as small as one likes; ``"relu2"`` (squared ReLU): 1/sqrt(6) at
            beta = 0, small only for beta < 0; ``"identity"`` (linear attention without a feature map): never below
            sqrt(2/pi), reached at beta = 0.
        beta: mean of the scores, ``q.mu``.
        gamma: standard deviation of the scores, ``sigma * |q|``, >= 0.

    Returns:
        A number in (0, 1]; NaN where every entry is zero (gamma = 0 and f(beta) = 0), and 0 where it is below the
        smallest float.

    Raises:
        ValueError: unknown kind, or gamma negative or not finite.

    Source: Scientific Spaces archive 9889
    """
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    if not (math.isfinite(beta) and math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"beta must be finite and gamma finite and >= 0, got beta={beta} and gamma={gamma}")
    if kind == "exp":
        return math.exp(-(gamma**2) / 2)
    if gamma == 0:
        return 1.0 if beta > 0 or (beta < 0 and kind == "identity") else math.nan
    t = beta / gamma
    if kind == "identity":
        return (math.sqrt(2 / math.pi) * math.exp(-(t**2) / 2) + t * math.erf(t / math.sqrt(2))) / math.hypot(t, 1)
    density = math.exp(-(t**2) / 2) / math.sqrt(2 * math.pi)
    if t < _TAIL:
        # E[relu(t + z)^k] = density(t) * integral of x^k exp(t x - x^2 / 2) over x > 0; with x = u / |t|:
        u = 30 * (_NODES + 1)
        mass = 30 * _WEIGHTS * np.exp(-u - (u / t) ** 2 / 2) / -t
        second, fourth = float(mass @ (u / t) ** 2), float(mass @ (u / t) ** 4)
        return math.sqrt(density) * second / math.sqrt(fourth)
    below = math.erfc(-t / math.sqrt(2)) / 2
    second = (t**2 + 1) * below + t * density
    fourth = (t**4 + 6 * t**2 + 3) * below + t * (t**2 + 5) * density
    return second / math.sqrt(fourth)


def positive_linear_sparsity(query: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Sparsity of a row ``g(q).h(k_j)`` of linear attention with non-negative features.

    ``S = 1 / sqrt(1 + g' Sigma g / (g' mu)^2)``: exact for any finite set of keys with its own mean and population
    covariance. For independent features of equal mean and spread it is at least ``1 / sqrt(1 + (sigma/mu)^2)``,
    whatever their number.

    Args:
        query: features of the query, shape ``(..., m)``, >= 0.
        mean: mean of the features of the keys, shape ``(..., m)``, >= 0.
        covariance: their covariance (divided by n, not n - 1), shape ``(..., m, m)``.

    Returns:
        Shape ``(...,)``, in (0, 1].

    Raises:
        ValueError: negative features; the formula then is about a mean of signed numbers, which S is not.

    Source: Scientific Spaces archive 9889. The article lets ``|g|_2 / |g|_1`` grow to sqrt(m); its range is
    [1/sqrt(m), 1], so a wider feature map alone does not make linear attention sparser.
    """
    if bool((query < 0).any()) or bool((mean < 0).any()):
        raise ValueError("query and mean must be >= 0: the formula holds for non-negative features only")
    spread = torch.einsum("...a,...ab,...b->...", query, covariance, query)
    return (1 + spread / torch.linalg.vecdot(query, mean).square()).rsqrt()


def decay_sparsity(decay: float, n: int) -> float:
    """Sparsity of the geometric row ``(lam^(n-1), ..., lam, 1)`` of a recurrence with a fixed decay.

    Args:
        decay: lam, in [0, 1].
        n: entries, >= 1.

    Returns:
        ``sqrt((1 - lam^n)(1 + lam) / (n (1 - lam)(1 + lam^n)))``, accurate also next to lam = 1, where it is 1.

    Raises:
        ValueError: an argument is out of range.

    Source: Scientific Spaces archive 9889
    """
    if not 0 <= decay <= 1 or n < 1:
        raise ValueError(f"decay must be in [0, 1] and n >= 1, got decay={decay} and n={n}")
    if decay == 1:
        return 1.0
    less = -1.0 if decay == 0 else math.expm1(n * math.log1p(decay - 1))  # lam^n - 1
    return math.sqrt(-less * (1 + decay) / (n * (1 - decay) * (2 + less)))


def rank_bound(n: int, feature_width: int | None = None, *, causal: bool = False) -> int:
    """Largest rank that an n x n attention matrix can formally have.

    Softmax attention can always have rank n: the elementwise exponential lifts the rank of the scores. Linear attention
    with m features has rank at most m, but any causal attention with a positive diagonal has rank n. A formal rank says
    little: see :func:`effective_rank`.

    Args:
        n: tokens, >= 1.
        feature_width: features of linear attention, >= 1; None for softmax.
        causal: a triangular matrix with a positive diagonal.

    Returns:
        The bound.

    Raises:
        ValueError: an argument is below 1.

    Source: Scientific Spaces archive 8338, 9529
    """
    if n < 1 or (feature_width is not None and feature_width < 1):
        raise ValueError(f"n and feature_width must be >= 1, got {n} and {feature_width}")
    return n if causal or feature_width is None else min(n, feature_width)


def numerical_rank(matrix: Tensor, rtol: float = 1e-6) -> Tensor:
    """Number of singular values above ``rtol`` times the largest.

    Args:
        matrix: shape ``(..., rows, columns)``.
        rtol: relative threshold, in [0, 1).

    Returns:
        int64, shape ``(...,)``.

    Raises:
        ValueError: not a matrix, or ``rtol`` out of range.
    """
    if not 0 <= rtol < 1:
        raise ValueError(f"rtol must be in [0, 1), got {rtol}")
    values = _singular_values(matrix)
    return (values > rtol * values[..., :1]).sum(-1)


def effective_rank(matrix: Tensor) -> Tensor:
    """Exponential of the entropy of the normalised singular values: between 1 and the smaller side.

    Args:
        matrix: shape ``(..., rows, columns)``.

    Returns:
        float64, shape ``(...,)``; NaN for a matrix of zeros.

    Raises:
        ValueError: not a matrix.
    """
    values = _singular_values(matrix)
    share = values / values.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp()


def stable_rank(matrix: Tensor) -> Tensor:
    """Squared Frobenius norm over squared spectral norm: how many directions carry the energy.

    Args:
        matrix: shape ``(..., rows, columns)``.

    Returns:
        float64, shape ``(...,)``, at least 1; NaN for a matrix of zeros.

    Raises:
        ValueError: not a matrix.
    """
    values = _singular_values(matrix)
    return values.square().sum(-1) / values[..., 0].square()


def causal_logdet(matrix: Tensor) -> Tensor:
    """Log-determinant of a causal attention matrix: the sum of the logarithms of its diagonal, and nothing else.

    A general routine (LU) loses the value and even the sign of such a determinant at a few hundred tokens.

    Args:
        matrix: shape ``(..., n, n)``, zero above the diagonal, positive on it.

    Returns:
        float64, shape ``(...,)``.

    Raises:
        ValueError: not square, not lower triangular, or a diagonal entry that is not positive.

    Source: Scientific Spaces archive 9529
    """
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"matrix must be square, got shape {tuple(matrix.shape)}")
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).double()
    if bool(matrix.triu(1).any()) or bool((diagonal <= 0).any()):
        raise ValueError("matrix must be lower triangular with a positive diagonal; use torch.linalg.slogdet otherwise")
    return diagonal.log().sum(-1)


def _singular_values(matrix: Tensor) -> Tensor:
    if matrix.ndim < 2 or 0 in matrix.shape[-2:]:
        raise ValueError(f"matrix must have two dimensions of at least 1, got shape {tuple(matrix.shape)}")
    return torch.linalg.svdvals(matrix.double())
