"""Exact attention as a state of constant size that can be extended, merged and read out.

A query's state over any set of keys is (m, z, y): the largest score m, z = sum exp(s - m) and y = sum exp(s - m) v.
States over disjoint sets of keys merge in any order; the output is y / z and the log-sum-exp m + ln z. Everything exact
about chunked attention, split caches and sequence parallelism follows from that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from danlu.kernels import flash, streamed
from danlu.kernels.regions import Part
from danlu.kernels.streamed import BlockRule, Pairs

__all__ = ["SoftmaxState", "attention_over_parts", "chunked_attention"]

_HIGH = (torch.float32, torch.float64)


@dataclass(frozen=True)
class SoftmaxState:
    """Running softmax sums of a set of queries over the keys seen so far.

    Attributes:
        m: largest score, shape ``(batch, heads, rows)``, -inf before the first key; carries no gradient.
        z: sum of ``exp(s - m)``, same shape.
        y: sum of ``exp(s - m) v``, shape ``(batch, heads, rows, value_dim)``.

    Source: Scientific Spaces archive 10017; arXiv:2112.05682; arXiv:2205.14135
    """

    m: Tensor
    z: Tensor
    y: Tensor

    @classmethod
    def empty(
        cls,
        rows: Sequence[int],
        value_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> SoftmaxState:
        """The state before any key: the identity of :meth:`merge`.

        Args:
            rows: ``(batch, heads, rows)``.
            value_dim: width of the values.
            dtype: float32 or float64.
            device: where it lives.

        Raises:
            ValueError: another dtype: half precision overflows and forgets.
        """
        _check_dtype(dtype)
        z = torch.zeros(tuple(rows), dtype=dtype, device=device)
        return cls(torch.full_like(z, -math.inf), z, z.new_zeros(*rows, value_dim))

    @classmethod
    def from_output(cls, out: Tensor, lse: Tensor) -> SoftmaxState:
        """The state behind a finished attention, for instance one that a kernel computed.

        Args:
            out: output, shape ``(batch, heads, rows, value_dim)``.
            lse: natural log-sum-exp, shape ``(batch, heads, rows)``, -inf where no key was seen.

        Raises:
            ValueError: shapes disagree.
        """
        if out.shape[:-1] != lse.shape:
            raise ValueError(f"lse must be {tuple(out.shape[:-1])} like out, got {tuple(lse.shape)}")
        dtype = torch.float64 if torch.float64 in (out.dtype, lse.dtype) else torch.float32
        lse = lse.to(dtype)
        m = lse.detach()
        z = (lse - m.masked_fill(m == -math.inf, 0.0)).exp()
        return cls(m, z, out.to(dtype) * z[..., None])

    def update(self, scores: Tensor, values: Tensor, dropout: Tensor | None = None) -> SoftmaxState:
        """The state after more keys. Differentiable.

        Args:
            scores: scaled and masked scores, shape ``(batch, heads, rows, n)``; -inf hides a key.
            values: shape ``(batch, kv_heads, n, value_dim)``, kv_heads dividing heads.
            dropout: factors on the probabilities, like ``scores`` (0, or 1 / (1 - p)). They act on y and not on z,
                which is dropout after the softmax.

        Raises:
            ValueError: shapes disagree.
        """
        _check_update(self, scores, values)
        if scores.shape[-1] == 0:
            return self
        return SoftmaxState(
            *streamed.absorb(self.m, self.z, self.y, scores.to(self.z.dtype), values.to(self.y.dtype), dropout)
        )

    def merge(self, other: SoftmaxState) -> SoftmaxState:
        """The state over the keys of both, which must be disjoint. Commutative and associative up to rounding.

        Raises:
            TypeError: ``other`` is no state.
            ValueError: states of different shapes.
        """
        if not isinstance(other, SoftmaxState):
            raise TypeError(
                f"other must be a SoftmaxState, got {type(other).__name__}: a finished (out, lse) becomes one by "
                "SoftmaxState.from_output(out, lse)"
            )
        if self.y.shape != other.y.shape or self.y.dtype != other.y.dtype:
            raise ValueError(
                f"states must agree, got y of {tuple(self.y.shape)} {self.y.dtype} and {tuple(other.y.shape)} "
                f"{other.y.dtype}"
            )
        m, (a, b) = flash.relative_weights(torch.stack((self.m, other.m)))
        y = a[..., None] * self.y
        return SoftmaxState(m, a * self.z + b * other.z, y.addcmul_(b[..., None], other.y))

    def finalize(self) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp; a query that has seen no key has output 0 and log-sum-exp -inf.

        Returns:
            Output of shape ``(batch, heads, rows, value_dim)`` and log-sum-exp of shape ``(batch, heads, rows)``, in
            the dtype of the state.
        """
        seen = self.z > 0
        safe = torch.where(seen, self.z, torch.ones_like(self.z))
        return self.y / safe[..., None], torch.where(seen, self.m + safe.log(), -math.inf)

    def all_reduce(self, group: Any = None) -> SoftmaxState:
        """The state over the keys of every process of a group, each of which holds a part of them. No gradient.

        Args:
            group: as ``torch.distributed`` takes it; None: all processes.
        """
        import torch.distributed as dist

        m = self.m.clone()
        dist.all_reduce(m, dist.ReduceOp.MAX, group=group)
        factor = torch.exp(self.m - m.masked_fill(m == -math.inf, 0.0))
        sums = torch.cat((self.z[..., None], self.y), -1).detach() * factor[..., None]
        dist.all_reduce(sums, group=group)
        return SoftmaxState(m, sums[..., 0].contiguous(), sums[..., 1:].contiguous())

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> SoftmaxState:
        """The state in another dtype (float32 or float64) or on another device.

        Raises:
            ValueError: half precision.
        """
        _check_dtype(self.z.dtype if dtype is None else dtype)
        return SoftmaxState(*(getattr(self, field.name).to(dtype=dtype, device=device) for field in fields(self)))

    def numbers(self) -> int:
        """How many numbers the state holds, whatever the number of keys."""
        return self.m.numel() + self.z.numel() + self.y.numel()


def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    score_bias: BlockRule | None = None,
    scale: float | None = None,
    q_chunk: int = 256,
    kv_chunk: int = 512,
    return_lse: bool = False,
) -> Any:
    """Exact softmax attention that never holds an Lq x Lk matrix, forward or backward.

    Plain, causal and windowed attention runs on the vendor kernels of ``danlu.kernels.flash``; whatever they do not
    know (masks, segments, biases) goes by in blocks, recomputed in the backward pass.

    Args:
        q: queries, shape ``(batch, heads, Lq, d)``; rows are the last Lq of Lk slots.
        k: keys, shape ``(batch, kv_heads, Lk, d)``, kv_heads dividing heads.
        v: values, shape ``(batch, kv_heads, Lk, dv)``.
        causal: a row sees no later slot.
        window: a row sees only the last ``window`` slots up to its own, >= 1; needs ``causal``.
        mask: bool, True = visible, shape ``(batch, Lk)`` or broadcastable to ``(batch, heads, Lq, Lk)``; or additive
            floats of the latter kind. It may be as large as the matrix that this function avoids: see the next two.
        segment_ids: integers of shape ``(batch, Lk)``; a row sees only keys of its own segment (packed documents).
            Blocks of other segments are skipped.
        score_bias: called as ``score_bias(rows, columns)`` with int64 slots ``(r,)`` and ``(c,)``; returns bool or
            additive values that broadcast to ``(batch, heads, r, c)``, without a gradient.
        scale: factor of the scores; default ``d ** -0.5``.
        q_chunk: rows of a block, >= 1.
        kv_chunk: keys of a block, >= 1.
        return_lse: also return the log-sum-exp.

    Returns:
        Output of shape ``(batch, heads, Lq, dv)`` like q; with ``return_lse`` also the natural log-sum-exp of shape
        ``(batch, heads, Lq)``, float32 or float64. A row without a visible key has output 0 and log-sum-exp -inf.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or an argument is out of range.

    Source: Scientific Spaces archive 10017; arXiv:2112.05682
    """
    _check_attention(q, k, v, causal, window, min(q_chunk, kv_chunk))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if mask is None and segment_ids is None and score_bias is None:
        part = Part(nearest=0 if causal else None, farthest=window)
        out, lse = flash.attend([q], [k], v, [part], scale)
    else:
        shape = (*q.shape[:3], k.shape[2])
        if mask is not None:
            mask = mask[:, None, None] if mask.ndim == 2 else mask
            if mask.ndim != 4 or any(a not in (1, b) for a, b in zip(mask.shape, shape, strict=True)):
                raise ValueError(
                    f"mask must be {(shape[0], shape[3])} or broadcast to {shape}, got {tuple(mask.shape)}"
                )
        if segment_ids is not None and segment_ids.shape != (shape[0], shape[3]):
            raise ValueError(f"segment_ids must be {(shape[0], shape[3])}, got {tuple(segment_ids.shape)}")
        slot = torch.zeros(1, dtype=torch.int64, device=q.device)
        rules = [mask, None if score_bias is None else score_bias(slot, slot)]
        if any(rule is not None and rule.requires_grad for rule in rules):
            raise ValueError("mask and score_bias must not require a gradient: none would reach them; detach them")
        pairs = Pairs(causal, window, mask, segment_ids, score_bias, shape[3] - shape[2])
        out, lse = streamed.attend(q, k, v, pairs, scale, q_chunk, kv_chunk)
    return (out, lse) if return_lse else out


def attention_over_parts(
    q: Tensor,
    parts: Sequence[tuple[Any, ...]],
    *,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """One softmax attention over a cache that lies in several pieces, of any origin.

    Args:
        q: queries, shape ``(batch, heads, Lq, d)``.
        parts: tuples ``(k, v)`` or ``(k, v, logit_bias)`` with k ``(batch, kv_heads, n, d)`` and v
            ``(batch, kv_heads, n, dv)``; kv_heads may differ from part to part. The bias is a number added to all
            scores of the part, or a tensor that broadcasts to ``(batch, heads, Lq, n)``, additive or bool (True =
            visible).
        causal: the last Lq keys of the last part are the queries' own, which see no later one. All else is seen by all.
        scale: factor of the scores; default ``d ** -0.5``.
        return_lse: also return the log-sum-exp.

    Returns:
        As :func:`chunked_attention`.

    Raises:
        ValueError: no part, a part that is not a pair or triple, or shapes that disagree.

    Source: Scientific Spaces archive 10017
    """
    if not parts or any(len(part) not in (2, 3) for part in parts):
        raise ValueError("parts must be a non-empty list of (k, v) or (k, v, logit_bias)")
    outs, lses = [], []
    for place, (k, v, *rest) in enumerate(parts):
        own = causal and place == len(parts) - 1
        _check_attention(q, k, v, own, None, 1)
        bias = rest[0] if rest else 0.0
        tensor = bias if isinstance(bias, Tensor) and bias.ndim else None
        if tensor is not None:
            tensor = tensor.expand(*q.shape[:3], k.shape[2])
        out, lse = flash.attend([q], [k], v, [Part(nearest=0 if own else None)], scale, bias=tensor)
        outs.append(out)
        lses.append(lse if tensor is not None else lse + bias)
    out, lse = flash.merge(outs, lses)
    return (out, lse) if return_lse else out


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _HIGH:
        raise ValueError(
            f"dtype of a state must be float32 or float64, got {dtype}: sums of exponentials need the range"
        )


def _check_update(state: SoftmaxState, scores: Tensor, values: Tensor) -> None:
    fits = scores.ndim == 4 and scores.shape[:3] == state.z.shape and values.ndim == 4
    fits = fits and values.shape[0] == scores.shape[0] and values.shape[2:] == (scores.shape[3], state.y.shape[3])
    if not fits or values.shape[1] == 0 or scores.shape[1] % values.shape[1]:
        raise ValueError(
            f"scores must be {(*state.z.shape, 'n')} and values (batch, kv_heads, n, {state.y.shape[3]}), got "
            f"{tuple(scores.shape)} and {tuple(values.shape)}"
        )


def _check_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, chunk: int) -> None:
    good = q.ndim == k.ndim == v.ndim == 4 and k.shape[:3] == v.shape[:3]
    if not good or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]) or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q, k and v must be (batch, heads, Lq, d), (batch, kv_heads, Lk, d) and (batch, kv_heads, Lk, dv) with "
            f"kv_heads dividing heads, got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if len({(x.dtype, x.device) for x in (q, k, v)}) > 1:
        raise ValueError("q, k and v must share one dtype and one device")
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(
            f"causal attention needs Lq <= Lk, got {q.shape[2]} > {k.shape[2]}: rows are the last of the slots"
        )
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window must be >= 1 and needs causal=True, got window={window}, causal={causal}")
    if chunk < 1:
        raise ValueError(f"q_chunk and kv_chunk must be >= 1, got {chunk}")
