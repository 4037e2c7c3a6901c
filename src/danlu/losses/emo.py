"""The earth-mover loss as a module: for ``Trainer(compute_loss_func=...)``, or in a model that makes no logits."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from danlu.losses.emo_functional import emo_loss, linear_emo_loss
from danlu.losses.emo_plan import Cost
from danlu.losses.heads import head_weight, host_model, logit_factor, output_head
from danlu.losses.mixing import MixingSchedule, Mixture

__all__ = ["EMOLoss"]

_COSTS = ("fixed", "adaptive")


class EMOLoss(nn.Module):
    """Earth-mover loss of a model's outputs, mixed with cross entropy.

    Two ways to use it with a host model:

    - ``Trainer(compute_loss_func=EMOLoss(model))``: takes the logits that the model made.
    - ``EMOLoss(model).attach(model)``: the model itself returns this loss, and while it trains no logits are made.

    Both divide by ``num_items_in_batch``, so that gradient accumulation is exact.

    Args:
        cost_embedding: a table (V_e, d_e) whose row directions give the cost, or a host model, whose output head is
            taken: the head, not the input embeddings, with its LoRA adapter where PEFT put one.
        cost: ``fixed`` keeps a copy of the directions as they are now, as the paper does: construct it from the
            pre-trained model, also when a run is resumed. ``adaptive`` uses the head as it is at each step, as a
            constant, and needs no copy; with a frozen head it is the same.
        mode: as in :func:`danlu.emo_loss`.
        weight: as in :func:`danlu.emo_loss`.
        ratio: as in :func:`danlu.emo_loss`.
        ratio_clip: as in :func:`danlu.emo_loss`.
        schedule: share of the mixture over the training steps; the rest is cross entropy. The loss is told the step by
            ``Trainer(callbacks=[loss.callback()])``, which also finds it again in a resumed run, or by setting
            ``loss.step``; the state dict holds it.
        shift: whether tokens before n predict label n. None decides as ``Trainer`` does: yes for a causal language
            model, no for other models and for a table.
        ignore_index: as in :func:`danlu.emo_loss`.
        row_chunk: as in :func:`danlu.emo_loss`.

    Attributes:
        cost_embedding: the fixed directions, a buffer that is neither trained nor saved; none for ``adaptive``.
        step: the training step that ``schedule`` is read at, none before it is known.

    Raises:
        ValueError: a bad option, or a model without an output head.

    Source: Scientific Spaces archive 9797; arXiv:2310.04691
    """

    def __init__(
        self,
        cost_embedding: Tensor | nn.Module,
        *,
        cost: str = "fixed",
        mode: str = "mix1",
        weight: float | None = None,
        ratio: str = "released",
        ratio_clip: float | None = None,
        schedule: MixingSchedule | None = None,
        shift: bool | None = None,
        ignore_index: int = -100,
        row_chunk: int | None = None,
    ) -> None:
        super().__init__()
        if cost not in _COSTS:
            raise ValueError(f"cost must be one of {', '.join(_COSTS)}, got {cost!r}")
        Mixture(mode, weight, ratio, ratio_clip)  # a bad option fails here and not in the first step
        is_model = isinstance(cost_embedding, nn.Module)
        if cost == "adaptive" and not is_model:
            raise ValueError("cost_embedding must be a model when cost is 'adaptive', got a tensor; use cost='fixed'")
        self.options: dict[str, Any] = {
            "mode": mode,
            "ratio": ratio,
            "ratio_clip": ratio_clip,
            "ignore_index": ignore_index,
            "row_chunk": row_chunk,
        }
        self.weight, self.cost, self.schedule = weight, cost, schedule
        self.shift = (is_model and _shifts(cost_embedding)) if shift is None else shift
        self.step: int | None = None
        # In a tuple, so that the model is not a part of this module.
        self._head: tuple[Any, ...] = (output_head(cost_embedding),) if is_model else ()
        table: Tensor | None = None
        if cost == "fixed":
            raw: Any = head_weight(self._head[0], exact=False)[0] if self._head else cost_embedding
            table = Cost.of(raw.detach()).unit()
        self.cost_embedding: Any
        self.register_buffer("cost_embedding", table, persistent=False)

    def forward(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | float | None = None) -> Tensor:
        """Loss of a model's outputs, with the signature of ``Trainer``'s ``compute_loss_func``.

        Args:
            outputs: of a model, with ``logits``, or logits of shape (..., V).
            labels: shape (...), not shifted.
            num_items_in_batch: number of tokens that the sum is divided by; none takes those that count here.

        Returns:
            A scalar.

        Raises:
            ValueError: no labels or no logits; a schedule without a step.
        """
        logits = outputs if isinstance(outputs, Tensor) else _logits(outputs)
        return self.of_logits(logits, self._shifted(labels), num_items_in_batch)

    def of_logits(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | float | None = None) -> Tensor:
        """Loss of logits and labels that are aligned."""
        return emo_loss(
            logits,
            labels.to(logits.device),
            self._cost(logits, None),
            weight=self.weight,
            share=self.share,
            num_items_in_batch=num_items_in_batch,
            **self.options,
        )

    def of_hidden(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | float | None = None,
        *,
        bias: Tensor | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
    ) -> Tensor:
        """Loss of hidden states, a head and labels that are aligned."""
        return linear_emo_loss(
            hidden,
            weight,
            labels.to(hidden.device),
            self._cost(hidden, weight),
            bias=bias,
            softcap=softcap,
            logit_scale=logit_scale,
            emo_weight=self.weight,
            share=self.share,
            num_items_in_batch=num_items_in_batch,
            **self.options,
        )

    @property
    def share(self) -> float:
        """Share of the mixture at the present step, 1 without a schedule.

        Raises:
            ValueError: there is a schedule, and the step is not known.
        """
        if self.schedule is None:
            return 1.0
        if self.step is None:
            raise ValueError(
                "step must be set for the schedule: pass Trainer(callbacks=[loss.callback()]), or set loss.step"
            )
        return self.schedule(self.step)

    def callback(self) -> TrainerCallback:
        """A callback that tells this loss the step; ``Trainer`` keeps the step in its own checkpoints."""
        return _StepCallback(self)

    def attach(self, model: nn.Module) -> AttachedLoss:
        """Make a host model return this loss, and make no logits while it trains.

        The official setter ``model.loss_function`` takes the loss, and a hook on the head hands on the first position
        alone, while the loss goes through all hidden states with the head's weight. A training step with labels then
        returns logits of one position; in evaluation mode and without labels the model is as before. The model must
        call ``self.loss_function`` as the host's causal and masked language models do.

        Attach after wrapping with PEFT, before DDP. A LoRA adapter on the head is merged at each step, which costs a
        matrix of the head's size and its gradient. ``Trainer`` needs no ``compute_loss_func`` then.

        Args:
            model: a host model, or a PEFT model.

        Returns:
            A handle: ``remove()`` or the end of a ``with`` block gives the model its own loss back.

        Raises:
            ValueError: the model has no output head, or has a loss attached already.
        """
        return AttachedLoss(self, model)

    def get_extra_state(self) -> dict[str, Any]:
        """The step, for the state dict."""
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take the step from a state dict."""
        self.step = state["step"]

    def _cost(self, like: Tensor, weight: Tensor | None) -> Cost:
        if self.cost == "adaptive":
            return Cost.of((head_weight(self._head[0], exact=False)[0] if weight is None else weight).detach())
        if self.cost_embedding.device != like.device:  # Trainer moves the model after this was built
            self.cost_embedding = self.cost_embedding.to(like.device)
        return Cost(self.cost_embedding)

    def _shifted(self, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise ValueError("labels must be given, got None; the batch needs a 'labels' entry")
        return F.pad(labels, (0, 1), value=self.options["ignore_index"])[..., 1:] if self.shift else labels


class AttachedLoss:
    """A model whose loss is an :class:`EMOLoss`, until ``remove()``."""

    def __init__(self, loss: EMOLoss, model: Any) -> None:
        self.loss, self.host, self.head = loss, host_model(model), output_head(model)
        if isinstance(getattr(getattr(self.host, "_loss_function", None), "__self__", None), AttachedLoss):
            raise ValueError("model has a loss attached already; call remove() on its handle first")
        self._hidden: Tensor | None = None
        self._fused = False
        self._reading: tuple[float, float | None] | None = None
        self._before = self.host.__dict__.get("_loss_function")
        # PEFT calls the host's forward past its hooks, so the flag is set where the caller enters.
        self._handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.head.register_forward_pre_hook(self._keep),
        ]
        self.host.loss_function = self._loss

    def _enter(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._fused, self._hidden = model.training and kwargs.get("labels") is not None, None

    def _keep(self, head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not self._fused:
            return None
        self._hidden = args[0]
        return (args[0][:, :1], *args[1:])

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        aligned = self.loss._shifted(labels) if shift_labels is None else shift_labels
        if not self._fused:
            if self.host.training:
                raise ValueError("attach() must be given the model that is called: call it after wrapping with PEFT")
            return self.loss.of_logits(logits, aligned, num_items_in_batch)
        hidden, self._hidden, self._fused = self._hidden, None, False
        if hidden is None:
            raise ValueError(f"{type(self.host).__name__} must call its output head to make logits, and it did not")
        weight, bias = head_weight(self.head, exact=True)
        if self._reading is None:
            raw = F.linear(hidden[:1, 0], weight, bias).detach()
            self._reading = logit_factor(self.host.config, raw, logits[:1, 0])
        scale, cap = self._reading
        return self.loss.of_hidden(
            hidden, weight, aligned, num_items_in_batch, bias=bias, softcap=cap, logit_scale=scale
        )

    def remove(self) -> None:
        """Give the model its own loss and logits back."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._before is None:
            self.host.__dict__.pop("_loss_function", None)
        else:
            self.host._loss_function = self._before

    def __enter__(self) -> AttachedLoss:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class _StepCallback(TrainerCallback):
    def __init__(self, loss: EMOLoss) -> None:
        self.loss = loss

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loss.step = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loss.step = state.global_step


def _shifts(model: Any) -> bool:
    host = host_model(model)
    if getattr(getattr(host, "config", None), "is_encoder_decoder", False):
        return False
    # By class name as well: GPT-2's has no loss type, and its loss shifts all the same.
    named = {kind.__name__ for kind in type(host).__mro__} & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return bool(named) or LOSS_MAPPING.get(getattr(host, "loss_type", None)) is ForCausalLMLoss


def _logits(outputs: Any) -> Tensor:
    logits = outputs.get("logits") if hasattr(outputs, "get") else outputs[0]
    if not isinstance(logits, Tensor):
        raise ValueError(f"outputs must hold logits, got {type(outputs).__name__} without them")
    return logits
