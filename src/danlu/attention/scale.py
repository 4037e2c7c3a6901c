"""Scales for attention logits: log n for more keys than trained, and the scale at which softmax learns fastest."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from danlu.attention.optimum import (
    Array,
    LogMoment,
    cosine_optimum,
    gaussian_optimum,
    golden_section,
    law_optimum,
    sample_log_moment,
)

__all__ = ["LogitScale", "effective_tokens", "log_n_factor", "optimal_scale", "sample_log_moment", "softmax_grad_l1"]

Score = Literal["gaussian", "cosine"] | LogMoment


def log_n_factor(positions: Tensor, trained_length: int, clip: bool = True, window: int | None = None) -> Tensor:
    """Factor on the query at each position that keeps attention entropy as it was at the trained length.

    The factor is ``ln n / ln trained_length`` with ``n = position + 1`` visible keys, and at least 1 when clipped.
    Multiply it into the queries only, so that cached keys stay valid: ``q * factor[..., None]``.

    Args:
        positions: integer positions of the queries, 0-based and without padding, any shape; negative ones count as 0.
        trained_length: number of keys at which the factor is 1, >= 2.
        clip: True for a model trained without the factor (identity inside ``trained_length``); False for one trained
            with it. Unclipped, position 0 gets 0, which is harmless: it has a single key.
        window: keys a query can see at most (sliding window), >= 1; None for all.

    Returns:
        float32 tensor of the shape of ``positions``.

    Raises:
        TypeError: ``positions`` is not an integer tensor.
        ValueError: ``trained_length`` < 2 or ``window`` < 1.

    Source: Scientific Spaces archive 8823, 9948
    """
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise TypeError(f"positions must be an integer tensor, got {positions.dtype}; n is a number of keys")
    if trained_length < 2:
        raise ValueError(f"trained_length must be >= 2, got {trained_length}; ln 1 = 0 cannot be the unit")
    if window is not None and window < 1:
        raise ValueError(f"window must be >= 1, got {window}; use None for no window")
    keys = (positions + 1).clamp(min=1, max=window)
    factor = keys.to(torch.float32).log() / math.log(trained_length)
    # Decided on integers: rounding must not move a position inside the trained length off exactly 1.
    inside = keys <= trained_length if clip else keys == trained_length
    return torch.where(inside, torch.ones_like(factor), factor)


def softmax_grad_l1(scores: Tensor, alpha: float | Tensor) -> Tensor:
    """Half the L1 norm of the Jacobian of ``softmax(alpha * scores)``: ``alpha * (1 - sum p^2)``.

    Args:
        scores: raw scores, shape ``(..., n)``; ``-inf`` masks a candidate.
        alpha: scale > 0, a number or a tensor that broadcasts to ``(...,)``.

    Returns:
        Shape ``(...,)``, float32 or float64.

    Source: Scientific Spaces archive 9812
    """
    wide = scores if scores.dtype == torch.float64 else scores.float()
    factor = torch.as_tensor(alpha, dtype=wide.dtype, device=wide.device)
    probs = torch.softmax(wide * factor[..., None], dim=-1)
    return factor * (1.0 - probs.square().sum(dim=-1))


def effective_tokens(probs: Tensor) -> Tensor:
    """Number of tokens that attention spreads over: ``1 / sum p^2``, the exponential of the Renyi-2 entropy.

    Args:
        probs: attention probabilities, shape ``(..., n)``, summing to 1 over the last dimension.

    Returns:
        Shape ``(...,)``, between 1 and n, float32 or float64.

    Source: Scientific Spaces archive 9595
    """
    wide = probs if probs.dtype == torch.float64 else probs.float()
    return wide.square().sum(dim=-1).reciprocal()


def optimal_scale(
    n: Any,
    score: Score = "gaussian",
    d: int | None = None,
    objective: Literal["surrogate", "empirical"] = "surrogate",
    scores: Tensor | Array | None = None,
    statistic: Literal["median", "mean"] = "median",
) -> Any:
    """Scale on the logits at which softmax over ``n`` candidates passes on the most gradient at initialisation.

    The surrogate maximises ``a * (1 - M(2a) / (n * M(a)^2))`` with ``M(a) = E exp(a*s)``; it sits in the safe,
    near-linear regime and is not the maximiser of the true expectation. ``"empirical"`` maximises the median (or mean)
    of :func:`softmax_grad_l1` over the rows of ``scores``.

    Args:
        n: number of candidates, >= 2: a number, a sequence, an array or a tensor (real values allowed).
        score: law of one raw score. ``"gaussian"``: variance 1, i.e. q.k/sqrt(head_dim) at initialisation;
            ``"cosine"``: cosine of two random directions in ``d`` dimensions; or a vectorised callable ``log M(a)``
            on float64 arrays, for instance :func:`sample_log_moment`.
        d: dimension, >= 2, for ``"cosine"`` only.
        objective: ``"surrogate"`` (default) or ``"empirical"``.
        scores: for ``"empirical"``: measured scores, shape ``(..., n)`` with ``n`` a single number; ``-inf`` masks a
            candidate.
        statistic: for ``"empirical"``: ``"median"`` (has a peak) or ``"mean"`` (nearly a plateau: a noisy peak).

    Returns:
        float64 in the form of ``n``: a float, an array or a tensor.

    Raises:
        ValueError: ``n`` < 2 or not finite, ``d`` missing or out of range, or a law without an interior maximum.
        TypeError: ``score`` is neither a known name nor callable.

    Source: Scientific Spaces archive 9812
    """
    tensor = n if isinstance(n, Tensor) else None
    counts = np.asarray(n.detach().cpu().numpy() if tensor is not None else n, dtype=np.float64)
    if not np.all(np.isfinite(counts)) or np.any(counts < 2):
        raise ValueError(f"n must be finite and >= 2, got {n}; one candidate has no gradient")
    if score == "cosine" and (d is None or d < 2):
        raise ValueError(f"d must be >= 2 for cosine scores, got {d}; pass the head dimension")
    if score != "cosine" and d is not None:
        raise ValueError(f'd is used by score="cosine" only, got d={d} with score={score!r}; leave it out')
    if objective == "empirical":
        result = np.asarray(_empirical(counts, scores, statistic))
    elif objective != "surrogate":
        raise ValueError(f'objective must be "surrogate" or "empirical", got {objective!r}')
    elif scores is not None:
        raise ValueError('scores needs objective="empirical"; for the surrogate pass score=sample_log_moment(scores)')
    elif score == "gaussian":
        result = gaussian_optimum(np.log(counts))
    elif score == "cosine":
        result = cosine_optimum(tuple(counts.ravel().tolist()), int(d or 0)).reshape(counts.shape)
    elif callable(score):
        result = law_optimum(score, np.log(counts.ravel())).reshape(counts.shape)
    else:
        raise TypeError(f'score must be "gaussian", "cosine" or a callable log M(a), got {score!r}')
    if tensor is not None:
        return torch.from_numpy(np.array(result, dtype=np.float64)).to(tensor.device)
    return float(result) if counts.ndim == 0 else np.array(result)


def _empirical(counts: Array, scores: Tensor | Array | None, statistic: str) -> float:
    if scores is None or counts.ndim != 0 or scores.shape[-1] != int(counts):
        shape = None if scores is None else tuple(scores.shape)
        raise ValueError(f"empirical needs one n and scores of shape (..., n), got n={counts} and shape {shape}")
    if statistic not in ("median", "mean"):
        raise ValueError(f'statistic must be "median" or "mean", got {statistic!r}')
    rows = torch.as_tensor(scores).detach().double().reshape(-1, scores.shape[-1])
    masked = rows == -math.inf
    kept = (~masked).sum(-1)
    mean = rows.masked_fill(masked, 0.0).sum(-1) / kept
    spread = (rows - mean[:, None]).masked_fill(masked, 0.0).square().sum(-1).div(kept).sqrt().mean().item()
    if not 0 < spread < math.inf:
        raise ValueError("scores must be finite (or -inf, which masks a candidate) and not all equal or masked")

    def objective(log_a: Array) -> Array:
        per_row = [softmax_grad_l1(rows, math.exp(x)) for x in np.ravel(log_a)]
        return np.asarray([(r.median() if statistic == "median" else r.mean()).item() for r in per_row])

    grid = np.log(np.exp2(np.arange(-8.0, 12.5, 0.5)) / spread)
    best = int(objective(grid).argmax())
    if best in (0, len(grid) - 1):
        raise ValueError("scores have no optimum between 1/256 and 4096 standard deviations; use the surrogate")
    return float(np.exp(golden_section(objective, grid[best - 1 : best], grid[best + 1 : best + 2], 36))[0])


class LogitScale(nn.Module):
    """Multiply queries by the scale at which softmax attention learns fastest, fixed or as the start of a learnt one.

    Gaussian scores are ``q.k/sqrt(head_dim)``: keep that factor in the attention call. Cosine scores come from queries
    and keys of length 1: call attention with ``scale=1``. The scale goes on the query, so cached keys stay valid, and
    commutes with rotary encoding.

    Args:
        n: number of keys for ``mode="constant"``, >= 2; for a causal decoder half the training length is usual. Unused
            for ``"per_position"``, where row i has i + 1 keys.
        score, d: as in :func:`optimal_scale`.
        mode: ``"constant"`` or ``"per_position"``.
        learnable: True adds a parameter, the logarithm of the scale (of a gain on it for ``"per_position"``).
        maximum: upper limit of the scale, > 0; at the limit gradients still pass, so that the scale can come back down.
        dtype: of the parameter; float16 is refused, since its steps are too coarse for small updates of a logarithm.

    Raises:
        ValueError: an argument is out of range, or the learnable scale is held in float16 (also after ``.half()``).

    Source: Scientific Spaces archive 9812
    """

    knots: Tensor
    _FIRST, _STEP, _KNOTS = math.log(2.0), 1.0 / 16.0, 345  # n from 2 to 2^32 in steps of 6 %

    def __init__(
        self,
        n: int | None = None,
        score: Score = "gaussian",
        d: int | None = None,
        *,
        mode: Literal["constant", "per_position"] = "constant",
        learnable: bool = False,
        maximum: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if mode not in ("constant", "per_position"):
            raise ValueError(f'mode must be "constant" or "per_position", got {mode!r}')
        if (n is None) == (mode == "constant"):
            raise ValueError(f'n is for mode="constant" (there it is needed), got n={n} with mode={mode!r}')
        if maximum is not None and not maximum > 0:
            raise ValueError(f"maximum must be > 0, got {maximum}; None for no limit")
        self.mode, self.maximum, self.learnable = mode, maximum, learnable
        if mode == "constant":
            values = np.atleast_1d(optimal_scale(n, score, d))
        else:
            values = optimal_scale(np.exp(self._FIRST + self._STEP * np.arange(self._KNOTS)), score, d)
        self.register_buffer("knots", torch.from_numpy(np.log(values)).float(), persistent=False)
        if learnable:
            start = self.knots[0] if mode == "constant" else torch.zeros(())
            self.log_scale = nn.Parameter(start.detach().clone().to(dtype))
            self._check_dtype()

    def scale(self, positions: Tensor | None = None) -> Tensor:
        """The scale, float32: a scalar, or of the shape of ``positions`` (0-based) for ``mode="per_position"``."""
        if self.mode == "constant":
            log = self.log_scale.float() if self.learnable else self.knots[0].float()
        else:
            if positions is None:
                raise ValueError('positions is needed for mode="per_position", got None; pass the query positions')
            place = ((positions + 1).clamp(min=2).float().log() - self._FIRST) / self._STEP
            index = place.floor().long().clamp(0, self._KNOTS - 2)
            knots = self.knots.float()
            log = torch.lerp(knots[index], knots[index + 1], (place - index).clamp(0.0, 1.0))
            if self.learnable:
                log = log + self.log_scale.float()
        if self.maximum is not None:
            log = log + (log.clamp(max=math.log(self.maximum)) - log).detach()
        return log.exp()

    def forward(self, q: Tensor, positions: Tensor | None = None) -> Tensor:
        """Scale queries.

        Args:
            q: queries, shape ``(batch, heads, length, head_dim)``.
            positions: integer positions, shape ``(length,)`` or ``(batch, length)``, for ``mode="per_position"``.

        Returns:
            The scaled queries, same shape and dtype.
        """
        self._check_dtype()
        scale = self.scale(positions)
        if scale.ndim == 2:
            scale = scale[:, None]
        wide = q if q.dtype == torch.float64 else q.float()
        return (wide * (scale[..., None] if scale.ndim else scale)).to(q.dtype)

    def _check_dtype(self) -> None:
        if self.learnable and self.log_scale.dtype == torch.float16:
            raise ValueError("log_scale must not be float16: keep it in float32 (module.log_scale.float()) or bfloat16")
