"""Residual paths of a Transformer sublayer: pre-norm, post-norm, DeepNorm; and the constants of DeepNorm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

__all__ = ["DeepNormConstants", "DeepNormResidual", "PostNorm", "PreNorm", "deepnorm_constants", "scaled_residual"]

Branch = Callable[[Tensor], Tensor]
Recipe = Literal["paper", "sgd", "adam", "lamb"]
Norm = Literal["post", "pre"]

#: optimiser -> exponents (alpha, gain) of 2N; the two solve gain^p * (gain/alpha) * (2N)^q = 1, see deepnorm_constants
_POST = {"sgd": (1 / 4, -1 / 4), "adam": (1 / 2, -1 / 2), "lamb": (0.0, -1 / 2)}
_PRE = {"sgd": -1 / 2, "adam": -1.0, "lamb": -1 / 2}


class DeepNormConstants(NamedTuple):
    """Residual factors (alpha) and initial gains (beta) of both stacks; None for a stack that is absent."""

    encoder_alpha: float | None
    encoder_beta: float | None
    decoder_alpha: float | None
    decoder_beta: float | None


def deepnorm_constants(
    n_encoder: int = 0, n_decoder: int = 0, optimizer: Recipe = "paper", norm: Norm = "post"
) -> DeepNormConstants:
    """The residual factor alpha and the initial gain beta that bound the first updates of a deep Transformer.

    With N layers of two sublayers each, the change of the loss in one step is of order 1 when

    - SGD, update -eta g: ``(beta/alpha)^2 2N = 1``;
    - Adam and sign methods, update -eta sign(g): ``(beta/alpha) 2N = 1``;
    - LAMB, AdaFactor, Tiger, update ``-eta |theta| sign(g)``: ``beta (beta/alpha) 2N = 1``.

    The first two are closed by beta = 1/alpha, a compromise between weights that shrink together with their gradients
    (alpha = 1) and very slow learning (beta = 1); the last by alpha = 1, since its relative step is fixed. Pre-norm has
    alpha = 1 throughout. The paper's constants are of the same order as the SGD row and usually a good choice for Adam
    too: ``beta/alpha`` is (4N)^(-1/2).

    Args:
        n_encoder: encoder layers (attention and feed-forward together are one layer), >= 0.
        n_decoder: decoder layers, >= 0; at least one of the two is >= 1.
        optimizer: ``paper`` for the published table, else the family of the update rule.
        norm: ``post`` for LN(alpha x + F(x)), ``pre`` for x + F(LN(x)), for which the paper has no recipe.

    Returns:
        Four numbers; None for an absent stack.

    Raises:
        ValueError: fewer than one layer, an unknown name, or a combination without a recipe.

    Source: Scientific Spaces archive 8978; arXiv:2203.00555 (table 1 of its method section)
    """
    for name, count in (("n_encoder", n_encoder), ("n_decoder", n_decoder)):
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"{name} must be a whole number of layers >= 0, got {count!r}")
    if n_encoder + n_decoder < 1:
        raise ValueError("n_encoder or n_decoder must be >= 1, got 0 layers")
    _check_choice("optimizer", optimizer, get_args(Recipe))
    _check_choice("norm", norm, get_args(Norm))
    if optimizer == "paper" and norm == "pre":
        raise ValueError("optimizer must be sgd, adam or lamb with norm='pre', got 'paper': it has post-norm alone")
    if n_encoder and n_decoder:
        if optimizer != "paper":
            raise ValueError(
                f"optimizer must be 'paper' for an encoder with a decoder, got {optimizer!r}: "
                "the other recipes are for a single stack"
            )
        both = (n_encoder**4 * n_decoder) ** (1 / 16)
        return DeepNormConstants(0.81 * both, 0.87 / both, (3 * n_decoder) ** (1 / 4), (12 * n_decoder) ** (-1 / 4))
    layers = n_encoder or n_decoder
    if optimizer == "paper":
        alpha, beta = (2 * layers) ** (1 / 4), (8 * layers) ** (-1 / 4)
    elif norm == "pre":
        alpha, beta = 1.0, float((2 * layers) ** _PRE[optimizer])
    else:
        alpha, beta = ((2 * layers) ** power for power in _POST[optimizer])
    return DeepNormConstants(alpha, beta, None, None) if n_encoder else DeepNormConstants(None, None, alpha, beta)


def scaled_residual(x: Tensor, update: Tensor, alpha: float) -> Tensor:
    """Alpha times ``x`` plus ``update`` in one pass; with alpha = 1 the plain residual sum.

    Args:
        x: the residual stream, any shape.
        update: output of the sublayer, same shape.
        alpha: > 0.

    Returns:
        The sum, same shape. In half precision it is rounded once; on the CPU, PyTorch rounds alpha to that type too.
    """
    return torch.add(update, x, alpha=alpha)


class PreNorm(nn.Module):
    """x + F(norm(x)): the residual of most decoders.

    Args:
        norm: normalises the input of the sublayer.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, branch: Branch) -> Tensor:
        """One sublayer: ``x`` (..., hidden) and the function that computes F from the normalised x."""
        return x + branch(self.norm(x))


class DeepNormResidual(nn.Module):
    """norm(alpha x + F(x)): post-norm with the residual scaled.

    Equal to :class:`PostNorm` for alpha = 1. Since a norm ignores the scale of its input up to eps,
    ``norm(alpha x + F; eps)`` is ``norm(x + F/alpha; eps/alpha^2)``.

    Args:
        alpha: > 0, the same for every sublayer of a stack; see :func:`deepnorm_constants`.
        norm: normalises the sum; its gain and offset are learnt as usual.

    Raises:
        ValueError: ``alpha`` is not a positive number.

    Source: Scientific Spaces archive 8978; arXiv:2203.00555
    """

    def __init__(self, alpha: float, norm: nn.Module) -> None:
        super().__init__()
        self.alpha = check_positive("alpha", alpha)
        self.norm = norm

    def forward(self, x: Tensor, branch: Branch) -> Tensor:
        """One sublayer: ``x`` (..., hidden) and the function that computes F from x."""
        normalised: Tensor = self.norm(scaled_residual(x, branch(x), self.alpha))
        return normalised

    def extra_repr(self) -> str:
        """The factor, for printing."""
        return f"alpha={self.alpha:.4g}"


class PostNorm(DeepNormResidual):
    """norm(x + F(x)): the residual of the original Transformer and of BERT.

    Args:
        norm: normalises the sum.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(1.0, norm)


def check_positive(name: str, value: float) -> float:
    """The value as a float; raises ValueError unless it is a finite number > 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
    return float(value)


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
