"""The earth-mover loss in tiles: a few rows of logits by a stretch of the vocabulary, values and gradients at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from danlu.losses.emo_logits import LogitSource, Workspace, wide
from danlu.losses.emo_plan import Plan


def evaluate(source: LogitSource, plan: Plan, scale: Tensor | None = None) -> Tensor:
    """Losses of all rows, and with ``scale`` also gradients, which the source takes.

    With e_j = exp(z_j - max), S = sum e_j and A = sum e_j s_j the losses are CE = max + log S - z_t and EMO = 1 - A/S.
    With per-row weights w_c and w_e of their gradients, dL/dz_j = w_c (p_j - [j = t]) + w_e p_j (A/S - s_j). A row of
    one tile keeps its e and e s for the gradient; otherwise both are made again, tile by tile.

    Args:
        source: of the logits.
        plan: what to compute.
        scale: factor of each row's gradient, shape () or (N,).

    Returns:
        Loss of each row, shape (N,), 0 where the row does not count.
    """
    space = Workspace(wide(source.dtype), source.device)
    losses = torch.zeros(source.rows, dtype=space.dtype, device=source.device)
    tiles = plan.tiles(source.vocabulary)
    for index in plan.chunks():
        target = plan.target(index, source.vocabulary)
        top = losses.new_full((len(index),), torch.finfo(losses.dtype).min)
        total, similar, own, aimed = (losses.new_zeros(len(index)) for _ in range(4))
        for start, stop in tiles:
            e = source.tile(index, start, stop, space)
            aimed += target.pick(e, start, stop)
            raised = torch.maximum(top, e.amax(1))
            shrink = (top - raised).exp_()
            top = raised
            e.sub_(top[:, None]).exp_()
            g = target.similarity(start, stop, space).mul_(e)
            total.mul_(shrink).add_(e.sum(1))
            similar.mul_(shrink).add_(g.sum(1))
            own.mul_(shrink).add_(target.pick(g, start, stop))
        mean = similar / total
        value, of_ce, of_emo = plan.mixture.combine(top + total.log() - aimed, 1 - mean, own / total, plan.share)
        losses.index_copy_(0, index, value)
        if scale is None:
            continue
        factor = scale if scale.ndim == 0 else scale.index_select(0, index)
        of_ce, of_emo = of_ce * factor, of_emo * factor
        alpha, beta = ((of_ce + of_emo * mean) / total)[:, None], (of_emo / total)[:, None]
        for start, stop in tiles:
            if len(tiles) > 1:
                e = source.tile(index, start, stop, space).sub_(top[:, None]).exp_()
                g = target.similarity(start, stop, space).mul_(e)
            dz = e.mul_(alpha).sub_(g.mul_(beta))
            target.subtract_(dz, of_ce, start, stop)
            source.pull_back(index, start, stop, dz)
    return losses


class EarthMover(torch.autograd.Function):
    """Losses of all rows, each or their sum over a divisor; gradients are made early where scaling is all they need."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        make: Callable[..., LogitSource],
        divisor: Tensor | None,
        recording: bool,
        *tensors: Tensor | None,
    ) -> Tensor:
        """Losses of the logits that ``make(*tensors)`` gives: each of them, or with a divisor their sum over it."""
        source = make(*tensors)
        # Inputs also "need" gradients under no_grad, and within this function nothing is recorded: hence ``recording``.
        wanted = tuple(recording and need for need in ctx.needs_input_grad[4:])
        # Rows that are weighted later can be scaled in their own gradient, but not inside a sum over rows.
        early = any(wanted) and source.dtype != torch.float16 and (divisor is not None or not any(wanted[1:]))
        one = torch.ones((), dtype=wide(source.dtype), device=source.device)
        scale = one if divisor is None else one / divisor
        with torch.autocast(source.device.type, enabled=False):
            if early:
                source.begin(wanted, len(plan.chunks()))
            losses = evaluate(source, plan, scale if early else None)
        ctx.plan, ctx.make, ctx.wanted, ctx.scale = plan, make, wanted, scale
        ctx.early = source.gradients() if early else None
        ctx.save_for_backward(*tensors)
        return losses if divisor is None else losses.sum() * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        """Gradients of the tensors: those made early, scaled, or new ones."""
        gradients, ctx.early = ctx.early, None
        if gradients is None:  # never made, or given away by an earlier backward pass
            source = ctx.make(*ctx.saved_tensors)
            with torch.autocast(source.device.type, enabled=False):
                source.begin(ctx.wanted, len(ctx.plan.chunks()))
                evaluate(source, ctx.plan, upstream * ctx.scale)
            gradients = source.gradients()
        elif upstream.ndim or upstream.device.type != "cpu" or upstream != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(upstream[:, None] if upstream.ndim else upstream)
        return None, None, None, None, *gradients
