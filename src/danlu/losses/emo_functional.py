"""Earth-mover loss: the expected distance between predicted token and label, measured between their embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from danlu.losses.emo_kernels import EarthMover
from danlu.losses.emo_logits import GivenLogits, HeadLogits, LogitSource
from danlu.losses.emo_plan import Cost, Plan, make_plan
from danlu.losses.mixing import Mixture

__all__ = ["Cost", "emo_loss", "linear_emo_loss"]

_REDUCTIONS = ("mean", "sum", "none")
#: Elements of one tile when the caller names no chunk: 24 MiB in float32. Fewer make the products slower.
TILE = 3 * 2**21


def emo_loss(
    logits: Tensor,
    labels: Tensor | None,
    cost_embedding: Tensor | Cost,
    *,
    mode: str = "mix1",
    weight: float | None = None,
    ratio: str = "released",
    ratio_clip: float | None = None,
    share: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: Tensor | float | None = None,
    soft_labels: Tensor | None = None,
    row_chunk: int | None = None,
) -> Tensor:
    """Earth-mover loss of logits, alone or mixed with cross entropy.

    With p = softmax(logits), label t and directions e_i of the cost embedding's rows, the loss of a token is
    EMO = sum_i p_i (1 - <e_i, e_t>): exact optimal transport, since a single label leaves one plan. Its gradient
    p_j (c_jt - EMO) is bounded by 1/2. Alone it is no proper scoring rule: in the limit it is best to put all
    probability on one token. The default mixes it with cross entropy.

    A few rows are worked on at a time. Beside the logits there is one tensor of their size: their gradient, made during
    the forward pass (in float16 during the backward pass, so that loss scaling acts on it).

    Args:
        logits: any floating dtype, shape (..., V), after whatever scale or soft-cap the model applies.
        labels: integers in 0..V-1 or ``ignore_index``, shape (...). With ``soft_labels`` they only say which tokens are
            ignored, and may be None.
        cost_embedding: shape (V_e, d_e), V_e <= V, without gradient: the head's weight, or any table of the same
            vocabulary. Tokens from V_e on and rows of zeros have cost 1. ``Cost.of(table)`` measures it once for many
            calls.
        mode: ``mix1``, ``mix2``, ``emo`` or ``weighted``, see :class:`danlu.losses.mixing.Mixture`.
        weight: of EMO beside cross entropy in mode ``weighted``, >= 0.
        ratio: ``released`` or ``plain``, which EMO the ratios of the mixes see.
        ratio_clip: upper bound of the ratio of ``mix1``, > 0.
        share: in 0..1, share of the mixture; the rest is plain cross entropy.
        ignore_index: label of tokens that do not count and get no gradient.
        reduction: ``mean`` over the tokens that count (0 if none does, where cross entropy gives NaN), ``sum``, or
            ``none``: shape (...), 0 at ignored tokens.
        num_items_in_batch: with ``mean``, divide the sum by this in place of the number of tokens that count.
        soft_labels: distributions, shape (..., V). EMO is then 1 - <E^T p, E^T tau>, the cost of the product plan: an
            upper bound of the transport cost, not 0 at p = tau, and the released EMO' is EMO + sum_i p_i tau_i s_i.
        row_chunk: rows worked on at a time; none takes 6 million / V, and at most an eighth of all or 64.

    Returns:
        The loss in float32 (float64 for float64), a scalar unless ``reduction="none"``.

    Raises:
        TypeError: logits, labels or cost embedding of a wrong kind.
        ValueError: shapes that do not match, labels out of range, a cost embedding that is larger than the vocabulary,
            not finite, or requires a gradient, or an option out of range.

    Source: Scientific Spaces archive 9797; arXiv:2310.04691
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating-point, got {logits.dtype}; convert them first")
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must have shape (..., vocabulary), got {tuple(logits.shape)}")
    plan = make_plan(
        logits.shape,
        labels,
        soft_labels,
        cost_embedding if isinstance(cost_embedding, Cost) else Cost.of(cost_embedding),
        Mixture(mode, weight, ratio, ratio_clip),
        share,
        ignore_index,
        _rows(row_chunk, logits.numel() // logits.shape[-1], logits.shape[-1]),
        logits.shape[-1],
    )
    flat = logits.reshape(-1, logits.shape[-1])
    return _reduced(plan, GivenLogits, (flat,), logits.shape[:-1], reduction, num_items_in_batch)


def linear_emo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    cost_embedding: Tensor | Cost | str = "weight",
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mode: str = "mix1",
    emo_weight: float | None = None,
    ratio: str = "released",
    ratio_clip: float | None = None,
    share: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: Tensor | float | None = None,
    soft_labels: Tensor | None = None,
    row_chunk: int | None = None,
    vocab_chunk: int | None = None,
) -> Tensor:
    """Earth-mover loss of the last hidden states and the head, without ever holding all logits.

    The same as ``emo_loss(softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap), ...)``. By default some
    rows meet the whole vocabulary at a time, and the gradients to hidden states and head are made with the loss: the
    work is one product with the cost embedding more than that of cross entropy. With ``vocab_chunk`` rows also meet the
    vocabulary piece by piece, with a running maximum: the state is a few numbers a token, and logits and similarities
    are computed twice. A tensor that requires no gradient costs none.

    ``reduction="none"`` with a head that is trained, and float16, compute the gradients in the backward pass instead.
    Under autocast the products are taken in its dtype.

    Args:
        hidden: as handed to the head, shape (..., d).
        weight: of the head, shape (V, d), dtype of ``hidden``.
        labels: as in :func:`emo_loss`.
        cost_embedding: as in :func:`emo_loss`, or ``"weight"``: the head as it is now, as a constant. No second table
            is made of it, only the V lengths of its rows.
        bias: of the head, shape (V,).
        softcap: soft-cap of the logits, > 0.
        logit_scale: factor of the logits, not 0.
        mode: as in :func:`emo_loss`.
        emo_weight: ``weight`` of :func:`emo_loss`.
        ratio: as in :func:`emo_loss`.
        ratio_clip: as in :func:`emo_loss`.
        share: as in :func:`emo_loss`.
        ignore_index: as in :func:`emo_loss`.
        reduction: as in :func:`emo_loss`.
        num_items_in_batch: as in :func:`emo_loss`.
        soft_labels: as in :func:`emo_loss`.
        row_chunk: rows worked on at a time; none takes as many as :func:`emo_loss`, or all with ``vocab_chunk``.
        vocab_chunk: tokens of the vocabulary worked on at a time; none takes all.

    Returns:
        As :func:`emo_loss`.

    Raises:
        TypeError: as :func:`emo_loss`.
        ValueError: as :func:`emo_loss`, or hidden states, weight and bias that do not fit each other.

    Source: Scientific Spaces archive 9797; arXiv:2310.04691
    """
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise TypeError(f"hidden and weight must be floating-point, got {hidden.dtype} and {weight.dtype}")
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden (..., d) and weight (V, d) must agree, got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0, got {softcap}; None means no cap")
    if not math.isfinite(logit_scale) or logit_scale == 0:
        raise ValueError(f"logit_scale must be finite and not 0, got {logit_scale}")
    if isinstance(cost_embedding, str):
        if cost_embedding != "weight":
            raise ValueError(f"cost_embedding must be a tensor or 'weight', got {cost_embedding!r}")
        cost_embedding = weight.detach()
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        raise ValueError(f"hidden, weight and bias must have one dtype, got {hidden.dtype} and {weight.dtype}")
    vocabulary = len(weight)
    plan = make_plan(
        (*hidden.shape[:-1], vocabulary),
        labels,
        soft_labels,
        cost_embedding if isinstance(cost_embedding, Cost) else Cost.of(cost_embedding),
        Mixture(mode, emo_weight, ratio, ratio_clip),
        share,
        ignore_index,
        _rows(row_chunk, hidden.numel() // hidden.shape[-1], vocabulary if vocab_chunk is None else None),
        vocabulary if vocab_chunk is None else _positive("vocab_chunk", vocab_chunk),
    )

    def source(h: Tensor, w: Tensor, b: Tensor | None) -> HeadLogits:
        return HeadLogits(h, w, b, softcap, logit_scale)

    flat = hidden.reshape(-1, hidden.shape[-1])
    return _reduced(plan, source, (flat, weight, bias), hidden.shape[:-1], reduction, num_items_in_batch)


def _reduced(
    plan: Plan,
    make: Callable[..., LogitSource],
    tensors: tuple[Tensor | None, ...],
    shape: torch.Size,
    reduction: str,
    num_items: Tensor | float | None,
) -> Tensor:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items_in_batch needs reduction='mean', got {reduction!r}")
    if reduction == "mean" and num_items is None:
        num_items = max(1, len(plan.index))
    divisor = None
    if reduction != "none":
        divisor = torch.as_tensor(1 if num_items is None else num_items).to(plan.index.device)
        divisor = torch.where(divisor == 0, 1, divisor)  # where nothing counts the loss is 0, not NaN
    losses: Tensor = EarthMover.apply(plan, make, divisor, torch.is_grad_enabled(), *tensors)
    return losses.view(shape) if divisor is None else losses


def _rows(chunk: int | None, rows: int, columns: int | None) -> int:
    """Rows of a tile: few enough for its size, and an eighth of all, so that three tiles are less than one matrix."""
    if chunk is not None:
        return _positive("row_chunk", chunk)
    return max(1, rows if columns is None else min(TILE // columns, max(64, rows // 8)))


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
