"""What reads the end of a ladder: the backbone's own frozen head, run by the host's code, or a new linear one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

_CHUNK_NUMBERS = 1 << 22  # logits that are alive at a time in training: 16 MiB in float32
_CHUNK_ROWS = 256  # at least so many rows, or matrix products get slow


class _Passed(nn.Module):
    """Stands for the base model: what it is given as embeddings is its last hidden state."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        # the host class whose fields cover those of all others
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)


def host_logits(model: Any, states: Tensor, **inputs: Any) -> Tensor:
    """Logits of the host's own head for states that did not come from its base model.

    The host's forward runs, so scales, caps and the transform of a masked model's head are the host's own. It runs on a
    shallow copy whose base model is a stand-in; the model itself is not changed.

    Args:
        model: host model with a head for token logits.
        states: (batch, length, d), in the place of the base model's last hidden state.
        inputs: more arguments of the host's forward, such as ``logits_to_keep``.

    Returns:
        (batch, length, vocabulary).
    """
    view = copy.copy(model)
    view._modules = {**model._modules, model.base_model_prefix: _Passed()}
    # The class's forward, since an instance may carry one that is bound to the original.
    logits: Tensor = type(model).forward(view, inputs_embeds=states, **inputs).logits
    return logits


def check_head(model: Any) -> None:
    """Refuse a backbone whose head cannot be run on its own.

    Raises:
        ValueError: no head, or one that gives no token logits.
    """
    name = type(model).__name__
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or prefix not in model._modules:
        raise ValueError(
            f"head='lm' needs a backbone with a language-model head, got {name}; load it with AutoModelForCausalLM or "
            "AutoModelForMaskedLM, or use head='classification'"
        )
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        raise ValueError(f"head='lm' needs a backbone with a language-model head, got {name}")


def is_masked(model: Any) -> bool:
    """Whether the host's loss compares each logit with the label of its own token, not of the next."""
    return getattr(model, "loss_type", None) == "ForMaskedLM"


def token_loss(logits: Tensor, targets: Tensor, count: Any = None) -> Tensor:
    """Mean cross-entropy in float32 over targets that are not -100, or their sum over ``count``."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-100, reduction="sum")
    return loss / (_count(targets) if count is None else count)


def _count(targets: Tensor) -> Tensor:
    return (targets != -100).sum()


def shifted(labels: Tensor) -> Tensor:
    """Label of the next token at every place, -100 at the last."""
    return F.pad(labels[..., 1:], (0, 1), value=-100)


def head_loss(logits_of: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, count: Any = None) -> Tensor:
    """The same loss as :func:`token_loss` of all logits, without ever holding them.

    Places whose target is -100 are left out, and the others go through the head in chunks, each of which is
    differentiated at once: a frozen head has no weight gradients, so the gradient of its input is all that has to be
    kept. Saved for backward are d numbers for each counted place; the products are those of an ordinary step.

    Args:
        logits_of: the head, (1, n, d) to (1, n, vocabulary).
        states: (batch, length, d).
        targets: (batch, length), -100 where nothing is asked.
        count: what the sum is divided by; none means the number of targets.

    Returns:
        A scalar; 0/0 without targets is 0.

    Raises:
        ValueError: the head does not pass gradients on, as an integer-quantised one may not.
    """
    count = _count(targets).clamp(min=1) if count is None else count
    loss: Tensor = _HeadLoss.apply(states.flatten(0, 1), targets.flatten(), count, logits_of)
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, count: Any, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
        wanted = (targets != -100).nonzero()[:, 0].to(states.device)
        ctx.shape = states.shape
        gradient = states.new_empty(len(wanted), states.shape[1])
        total = torch.zeros((), dtype=torch.promote_types(states.dtype, torch.float32), device=states.device)
        rows, start = _CHUNK_ROWS, 0
        while start < len(wanted):
            places = wanted[start : start + rows]
            part = states[places].detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                logits = logits_of(part[None])
                loss = token_loss(logits, targets[None, places], count)
            if ctx.needs_input_grad[0]:
                if not loss.requires_grad:
                    raise ValueError(
                        "the backbone's head must pass gradients on to train under it; leave it out of the quantisation"
                    )
                (gradient[start : start + rows],) = torch.autograd.grad(loss, part)
            total += loss.detach()
            start += rows
            rows = max(_CHUNK_ROWS, _CHUNK_NUMBERS // logits.shape[-1])
        ctx.save_for_backward(gradient, wanted)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, wanted = ctx.saved_tensors
        whole = gradient.new_zeros(ctx.shape)
        whole[wanted] = gradient * grad.to(gradient.dtype)
        return whole, None, None, None


def pooled(states: Tensor, mask: Tensor | None, *, last: bool) -> Tensor:
    """The state that stands for a sequence: of its last unpadded token, or of its first.

    Args:
        states: (batch, length, width).
        mask: 1 for tokens, 0 for padding on either side; none means no padding.
        last: the last token, else the first.

    Returns:
        (batch, width).

    Raises:
        ValueError: a mask of another form.
    """
    if mask is not None and mask.ndim != 2:
        raise ValueError(f"attention_mask must be (batch, length) for a classification head, got {tuple(mask.shape)}")
    if mask is None:
        return states[:, -1 if last else 0]
    places = torch.arange(mask.shape[1], device=mask.device)
    index = (mask.bool() * (places + 1)).argmax(-1) if last else mask.bool().int().argmax(-1)
    return states[torch.arange(len(states), device=states.device), index.to(states.device)]
