"""One step of naive-Bayes context extension: the next-token distributions of several prompts become one.

Row 0 is the prompt without a context, rows 1..n are the same prompt with one context each. With ``lp`` their log
probabilities, each row cut to its nucleus (tokens outside are ``-inf``, nothing is renormalised)::

    H_i    = - sum_T p_i(T) max(lp_i(T), -100)            entropy over what is left
    k      = argmin_i  H_i - eta [i = context of the token before],   i = 1..n
    out(T) = (1 + beta) lp_k(T) - beta lp_0(T)            where lp_0(T) > -100
           = lp_k(T)                                      where row 0 was cut at T

Exact naive Bayes, ``log p(T | S_1..S_n) = sum_k log p(T | S_k) - (n - 1) log p(T)``, is ``pooling="mean"`` with
``beta = n - 1`` and ``top_p = 1``. One context with ``top_p = 1`` is classifier-free guidance of scale ``1 + beta``,
also known as context-aware decoding; ``beta = 0`` is then plain generation, ``beta = -1`` generation without the
context.

Departures and what the source leaves open: tokens that tie with the last one of a nucleus are all kept, so that the
result does not depend on a sorting order; ``lp_k(T) = -inf`` gives ``-inf`` (``beta = -1``: ``lp_0(T)``, where the
plain formula has ``0 * inf``); under ``mean``, a token that some but not all nuclei hold counts -100 in the others,
since ``-inf`` would leave nothing wherever the nuclei are disjoint.

Source: Scientific Spaces archive 9617 and 9632; arXiv:2305.14739 (one context).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

POOLINGS = ("min_entropy", "mean", "max")
#: Log probabilities below this count as cut: they say nothing that can be trusted.
FLOOR = -100.0

# Values looked at first; bands of a histogram, and the nats they span.
_FEW, _BANDS, _SPAN = 64, 2048, 24.0

#: Of log probabilities (contexts, vocabulary), cut, and entropies (contexts,): pooled log probabilities (vocabulary,).
Pooling = str | Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """How rows are combined; see the module.

    Attributes:
        beta: weight against the prompt without context, >= -1; larger stays closer to the contexts.
        eta: nats by which another context must be surer than the one before to take over, >= 0.
        top_p: mass of the nucleus that each row is cut to, in (0, 1]; 1 cuts nothing.
        pooling: ``min_entropy`` (recommended), ``mean``, ``max``, or a function of log probabilities
            (contexts, vocabulary) and entropies (contexts,) that returns (vocabulary,).

    Raises:
        ValueError: a value out of range.
        TypeError: one of another kind.
    """

    beta: float = 0.25
    eta: float = 0.1
    top_p: float = 0.95
    pooling: Pooling = "min_entropy"

    def __post_init__(self) -> None:
        _real("beta", self.beta)
        _real("eta", self.eta)
        _real("top_p", self.top_p)
        if not -1 <= self.beta < math.inf:
            raise ValueError(f"beta must be a number >= -1 (0.25 is usual, -1 ignores the contexts), got {self.beta}")
        if not self.eta >= 0:
            raise ValueError(f"eta must be >= 0 nats (0.1 is usual, inf never switches contexts), got {self.eta}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1] (0.95 is usual, 1 cuts nothing), got {self.top_p}")
        if isinstance(self.pooling, str) and self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be {', '.join(POOLINGS)} or a function, got {self.pooling!r}")
        if not isinstance(self.pooling, str) and not callable(self.pooling):
            raise TypeError(f"pooling must be a name or a function, got {type(self.pooling).__name__}")


@dataclass(frozen=True)
class Combined:
    """One step's result.

    Attributes:
        scores: (vocabulary,), unnormalised log probabilities of the next token.
        context: the context that was chosen, counted from 0; None where the pooling chooses none.
        entropies: (contexts,), in nats, of the cut rows and without the bonus for staying.
        log_probs: (1 + contexts, vocabulary), of the rows as the model gave them.
    """

    scores: Tensor
    context: int | None
    entropies: Tensor
    log_probs: Tensor

    def context_of(self, token: int) -> int:
        """The context a token came from: the chosen one, or else the one that gives the token most probability."""
        if self.context is not None:
            return self.context
        return int(self.log_probs[1:, token].argmax())


def nucleus(log_probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Cut rows to their most probable tokens of mass ``top_p``.

    Args:
        log_probs: (rows, vocabulary), normalised.
        top_p: in (0, 1]. A token stays while the mass of those above it is below ``top_p``, so at least one does;
            tokens that tie with the last one stay too.

    Returns:
        The least log probability that stays, (rows, 1), and the entropy in nats of what stays, not normalised again,
        (rows,).
    """
    rows, vocabulary = log_probs.shape
    if top_p == 1:
        return log_probs.new_full((rows, 1), -math.inf), _entropy(log_probs)
    # Nuclei are small as a rule: a few largest values tell all, except of rows where they do not suffice.
    largest = log_probs.topk(min(_FEW, vocabulary), dim=-1).values
    floors = _last_that_stays(largest, 0.0, top_p)
    entropies = _entropy(largest.masked_fill(largest < floors, -math.inf))
    wide = (largest[:, -1:] >= floors)[:, 0]
    if vocabulary > _FEW and bool(wide.any()):
        logs = log_probs[wide]
        floors[wide] = _wide_floors(logs, top_p)
        entropies[wide] = _entropy(logs.masked_fill(logs < floors[wide], -math.inf))
    return floors, entropies


def _last_that_stays(descending: Tensor, before: Tensor | float, top_p: float) -> Tensor:
    mass = descending.exp()
    stays = before + mass.cumsum(-1) - mass < top_p
    return descending.gather(-1, (stays.sum(-1, keepdim=True) - 1).clamp(min=0))


def _wide_floors(logs: Tensor, top_p: float) -> Tensor:
    """Floors without a sort: a histogram of mass finds the narrow band in which the nucleus ends."""
    logs = logs.detach()
    mass = logs.exp()
    place = ((logs.amax(-1, keepdim=True) - logs) * (_BANDS / _SPAN)).clamp(max=_BANDS - 1).long()
    weight = mass.new_zeros(len(logs), _BANDS).scatter_add_(1, place, mass)
    before = weight.cumsum(-1) - weight
    band = (before < top_p).sum(-1, keepdim=True) - 1
    inside = place == band
    count = max(1, int(inside.sum(-1).max()))
    values = logs.masked_fill(~inside, -math.inf).topk(count, dim=-1).values
    return _last_that_stays(values, before.gather(-1, band), top_p)


def combine(logits: Tensor, settings: Settings, previous: int | None = None) -> Combined:
    """Combine the rows of one step.

    Args:
        logits: (1 + contexts, vocabulary), of the prompt without context and with each context; a constant added to a
            row changes nothing. Computed in float32 or better.
        settings: how.
        previous: the context of the token before, which is chosen again unless another is surer by ``eta``.

    Returns:
        Scores, choice, entropies and what the rows themselves say.

    Raises:
        ValueError: fewer than two rows, logits that are nan, or a pooling that returns another shape.
    """
    if logits.ndim != 2 or logits.shape[0] < 2:
        raise ValueError(
            f"logits must be (1 + contexts, vocabulary) with at least one context, got shape {tuple(logits.shape)}"
        )
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    log_probs = logits.log_softmax(-1)
    if bool((bad := log_probs[:, 0].isnan()).any()):
        raise ValueError(
            f"logits of rows {bad.nonzero().flatten().tolist()} hold nan, inf or only -inf (row 0 is the prompt "
            "without context): the model overflowed, try bfloat16 or float32 instead of float16"
        )
    floors, entropies = nucleus(log_probs, settings.top_p)
    entropies = entropies[1:]

    def cut(rows: slice | int) -> Tensor:
        return log_probs[rows].masked_fill(log_probs[rows] < floors[rows], -math.inf)

    context: int | None = None
    if settings.pooling == "min_entropy":  # two rows are all that is needed of the vocabulary
        context = _surest(entropies, settings.eta, previous)
        pooled = cut(1 + context)
    else:
        pooled = _pool(cut(slice(1, None)), entropies, settings.pooling)
    return Combined(_contrast(pooled, cut(0), settings.beta), context, entropies, log_probs)


def _entropy(logs: Tensor) -> Tensor:
    return -(logs.exp() * logs.clamp(min=FLOOR)).sum(-1)


def _surest(entropies: Tensor, eta: float, previous: int | None) -> int:
    ranked = entropies.detach().clone()
    if previous is not None:
        ranked[previous] -= eta
    return int(ranked.argmin())


def _pool(cut: Tensor, entropies: Tensor, pooling: Pooling) -> Tensor:
    if pooling == "max":
        return cut.amax(0)
    if pooling == "mean":
        gone = cut.isneginf()
        return cut.masked_fill(gone & ~gone.all(0), FLOOR).mean(0)
    assert callable(pooling)  # for the type checker: Settings has looked
    pooled: Any = pooling(cut, entropies)
    if not isinstance(pooled, Tensor) or pooled.shape != cut.shape[1:]:
        got = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
        raise ValueError(f"pooling must return log probabilities of shape ({cut.shape[1]},), got {got}")
    return pooled


def _contrast(pooled: Tensor, prior: Tensor, beta: float) -> Tensor:
    known = prior > FLOOR
    if beta == -1:
        return torch.where(known, prior, pooled)
    # The masked prior keeps inf - inf, and its gradient, out of the branch that is not taken.
    return torch.where(known, (1 + beta) * pooled - beta * prior.masked_fill(~known, 0.0), pooled)


def _real(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if math.isnan(value):
        raise ValueError(f"{name} must be a number, got nan")
