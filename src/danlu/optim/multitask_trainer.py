"""Several losses in the host library's Trainer."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from danlu.optim.multitask import MultiTaskBackward
from danlu.optim.task_weights import Combination


class MultiTaskMixin:
    """Makes any Trainer combine the losses that ``compute_losses`` returns; put it before the Trainer among the bases.

    Each log line then has ``<task>_loss``, ``<task>_weight`` and ``<task>_cosine`` (with the main task's gradient),
    as means since the last one. Evaluation reports the main loss as ``eval_loss``. Under gradient accumulation the
    gradients of the whole window are combined, not those of its parts.

    Args:
        combine: options of ``MultiTaskBackward``; ``metric="optimizer"`` stands for the Trainer's optimiser.
        heads: regular expressions; parameters whose names one of them is found in get plain gradients.
        args: those of the Trainer.
        kwargs: those of the Trainer.

    Raises:
        ValueError: a pattern that matches no trainable parameter; training under DeepSpeed, FSDP or ``DataParallel``.
    """

    def __init__(self, *args: Any, combine: Mapping[str, Any] | None = None, heads: Sequence[str] = (), **kwargs: Any):
        super().__init__(*args, **kwargs)
        host: Any = self
        if host.is_deepspeed_enabled or host.is_fsdp_enabled or host.args.n_gpu > 1:
            raise ValueError(
                "gradients of several tasks need whole parameters in one process per device: train with "
                "DistributedDataParallel (torchrun, accelerate launch), not DeepSpeed, FSDP or DataParallel"
            )
        named = [(name, p) for name, p in host.model.named_parameters() if p.requires_grad]
        for pattern in heads:
            if not any(re.search(pattern, name) for name, _ in named):
                raise ValueError(f"heads must match names of trainable parameters, got {pattern!r}, which matches none")
        is_head = {name: any(re.search(pattern, name) for pattern in heads) for name, _ in named}
        self._combine_options = {
            **(combine or {}),
            "params": [p for name, p in named if not is_head[name]],
            "heads": [p for name, p in named if is_head[name]],
        }
        self._multitask: MultiTaskBackward | None = None
        self._results: list[Combination] = []
        if (combine or {}).get("metric") != "optimizer":
            self.multitask  # noqa: B018 - so that wrong options show now, not in the first step

    @property
    def multitask(self) -> MultiTaskBackward:
        """What combines the gradients; made when the optimiser exists if that is its metric."""
        if self._multitask is None:
            options, host = dict(self._combine_options), self
            if options.get("metric") == "optimizer":
                options["metric"] = getattr(host.optimizer, "optimizer", host.optimizer)  # type: ignore[attr-defined]
            self._multitask = MultiTaskBackward(**options)
        return self._multitask

    def compute_losses(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The losses of one batch by task name, the main task first; write this method.

        Losses are means over the batch. Under gradient accumulation they are divided by the number of batches here,
        not by you.
        """
        raise NotImplementedError(
            "write compute_losses(model, inputs) -> dict of task names to losses, main task first"
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The main loss, for evaluation."""
        loss = next(iter(self.compute_losses(model, inputs).values()))
        return (loss, {}) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One batch: all losses, and where the accumulation window ends, one combined gradient."""
        host: Any = self
        model.train()
        switch = getattr(host.optimizer, "train", None)  # schedule-free optimisers have one
        if callable(switch):
            switch()
        inputs = host._prepare_inputs(inputs)
        # Means over processes are taken over the gradients of tasks: the model's own averaging must not begin.
        alone = getattr(model, "no_sync", contextlib.nullcontext)()
        with alone, host.compute_loss_context_manager():
            losses = self.compute_losses(model, inputs)
        parts = host.current_gradient_accumulation_steps
        losses = {name: loss / parts for name, loss in losses.items()}
        result = self.multitask.backward(losses, last=host.accelerator.sync_gradients, scaler=host.accelerator.scaler)
        if result is not None:
            self._results.append(result)
        return next(iter(losses.values())).detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with losses, weights and cosines of the tasks since the last time."""
        if self._results and "loss" in logs:
            logs = {**logs, **_summary(self._results)}
            self._results = []
        super().log(logs, start_time)  # type: ignore[misc]


class MultiTaskTrainer(MultiTaskMixin, Trainer):
    """The host library's Trainer for several losses: subclass it and write ``compute_losses``.

    Source: Scientific Spaces archives 8870, 8896 and 8907.
    """


def _summary(results: Sequence[Combination]) -> dict[str, float]:
    columns: dict[str, list[Tensor]] = {}
    for result in results:
        rows = {"loss": result.losses, "weight": result.weights}
        rows["cosine"] = None if result.cosines is None else result.cosines[0]
        for kind, values in rows.items():
            for name, value in zip(result.names, () if values is None else values, strict=values is not None):
                if kind != "cosine" or name != result.names[0]:
                    columns.setdefault(f"{name}_{kind}", []).append(value)
    return {name: round(float(torch.stack(values).mean()), 6) for name, values in columns.items()}
