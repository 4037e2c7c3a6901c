"""Gradients that go into the momentum inside the backward pass: no gradient memory, with accumulation."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from danlu.kernels.rounding import stochastic_round_
from danlu.kernels.signs import generator
from danlu.optim.backward import GradientConsumer
from danlu.optim.groups import refuse_flattened
from danlu.optim.momentum import local, shard_dims
from danlu.optim.tiger import Tiger

logger = logging.getLogger("danlu.optim")


class Folding:
    """Handle of a folded optimiser; ``remove`` undoes it. Made by ``fold_in_backward``."""

    def __init__(self, optimizer: Tiger, model: nn.Module | None):
        self.optimizer = optimizer
        self._model = model
        self._entries = [
            (parameter, group, index)
            for index, (parameter, group) in enumerate((p, g) for g in optimizer.param_groups for p in g["params"])
            if parameter.requires_grad
        ]
        places = {id(parameter): (group, index) for parameter, group, index in self._entries}
        self._consumer = GradientConsumer(
            [parameter for parameter, _, _ in self._entries],
            lambda parameter, gradient: optimizer._fold(parameter, gradient, *places[id(parameter)]),
        )
        self._parallel = isinstance(model, nn.parallel.DistributedDataParallel)
        self._sharded = any(shard_dims(parameter) for parameter, _, _ in self._entries)
        if self._parallel or self._sharded:
            optimizer._agree = self._agree
        if self._parallel:
            model.require_backward_grad_sync = False  # type: ignore[union-attr]
        optimizer._folded = True
        # A scaler hands its scale to such an optimiser, which then can refuse it.
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]

    def remove(self) -> None:
        """Detach: gradients stay in ``.grad`` again, and data-parallel ranks average them again."""
        self._consumer.remove()
        self.optimizer._agree, self.optimizer._folded = None, False
        self.optimizer.__dict__.pop("_step_supports_amp_scaling", None)
        if self._parallel:
            self._model.require_backward_grad_sync = True  # type: ignore[union-attr]

    def __enter__(self) -> Folding:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _agree(self) -> None:
        """At the end of a window: ranks agree on what was seen, and copies of a momentum are averaged."""
        copies = [entry for entry in self._entries if not shard_dims(entry[0])] if self._parallel else []
        if copies:
            self._agree_on(copies, self._model.process_group)  # type: ignore[union-attr]
            self._average(copies, self._model.process_group)  # type: ignore[union-attr]
        by_group: dict[Any, list[Any]] = {}
        for entry in self._entries:
            for dim in shard_dims(entry[0]):
                by_group.setdefault(entry[0].device_mesh.get_group(dim), []).append(entry)
        for group, entries in by_group.items():
            self._agree_on(entries, group, rows=False)

    def _agree_on(self, entries: list[Any], group: Any, rows: bool = True) -> None:
        """Most gradients of any rank; a rank that had none of a parameter, or of a row, lets its momentum decay."""
        optimizer = self.optimizer
        device = local(entries[0][0]).device
        zero = torch.zeros(2, dtype=torch.int64, device=device)
        mine = [optimizer.state[parameter].get("window", zero) for parameter, _, _ in entries]
        most = torch.stack(mine)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=group)
        for (parameter, options, _), own, agreed in zip(
            entries, torch.stack(mine).tolist(), most.tolist(), strict=True
        ):
            if not any(agreed):
                continue
            state = optimizer.state[parameter]
            state.setdefault("arrived", 0)
            momentum = local(optimizer._momentum(parameter))
            lazy = "rows" if options["rule"] == "row_rms" and options["lazy_rows"] else ""
            if lazy:
                seen = state.get("rows", torch.zeros(len(momentum), dtype=torch.bool, device=device))
                some = seen.to(torch.uint8)
                if rows:
                    torch.distributed.all_reduce(some, torch.distributed.ReduceOp.MAX, group=group)
                state["rows"] = some.bool()
                momentum[state["rows"] & ~seen] *= options["beta"]
            elif agreed[0] and not own[0]:
                momentum.mul_(options["beta"])
            state["window"] = torch.tensor(agreed, device=device)

    def _average(self, entries: list[Any], group: Any) -> None:
        optimizer, world = self.optimizer, torch.distributed.get_world_size(group)
        for parameter, options, index in entries:
            if "window" not in optimizer.state[parameter]:
                continue
            momentum: Tensor = optimizer.state[parameter]["momentum"]
            wide = momentum if momentum.dtype in (torch.float32, torch.float64) else momentum.float()
            wide.div_(world)
            torch.distributed.all_reduce(wide, group=group)
            if wide is momentum:
                continue
            noise = optimizer._noise(options["step"], index, 2)
            if noise is None:
                momentum.copy_(wide)
            else:
                limit = torch.finfo(momentum.dtype).max
                stochastic_round_(momentum, wide.clamp_(-limit, limit), generator(momentum.device, *noise))


def fold_in_backward(optimizer: Any, model: nn.Module | None = None) -> Folding:
    """Feed each gradient to Tiger's momentum as soon as the backward pass has it, and free it.

    Training then needs parameters, one momentum, and the largest single gradient, also with accumulation: every
    backward pass is a micro-batch, and the gradients of all passes until the window closes add up in the momentum.
    ``optimizer.step()`` only takes the step along its sign, at every ``accumulation_steps``-th call; in a loop that
    accumulates by itself leave ``accumulation_steps`` at 1 and call ``step`` once per window, as such loops do.
    ``zero_grad`` has nothing to do and does no harm.

    Nothing can be known of all gradients at once, so clipping by the global norm is impossible: the norm of freed
    gradients is 0. Tiger's step does not depend on it. A ``GradScaler`` is refused at ``step``.

    Data parallel training (DDP): hand over the wrapped model. Gradients are not synchronised any more; the momenta are
    averaged once per window, which is the same. Sharded models (FSDP2) fold the reduced gradient of each shard. There a
    gradient that is not finite is left out for the shards that have one, or on the ranks that have one, and parameters
    shrink as often as on the rank that saw most of them.

    Args:
        optimizer: a ``Tiger``, or accelerate's wrapper of one.
        model: needed if it is wrapped for data parallel training; the wrapper.

    Returns:
        A handle with ``remove``; also a context manager.

    Raises:
        TypeError: another optimiser. Lion's step needs the old momentum and the whole gradient, AdamW's the square of
            the mean.
        ValueError: gradients that are there already, folding twice, or a wrapper that flattens parameters (FSDP1).

    Source: Scientific Spaces archives 9512, 8634.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, Tiger):
        raise TypeError(
            f"optimizer must be a Tiger, got {type(optimizer).__name__}: only an update that depends on the momentum "
            "and the parameter alone can accumulate in the momentum"
        )
    if optimizer._folded:
        raise ValueError("optimizer is folded already; remove the first handle before folding again")
    if model is not None:
        refuse_flattened(model)
    return Folding(optimizer, model)


def fold_in_trainer(trainer: Any) -> None:
    """Fold the Tiger of a ``transformers.Trainer`` for as long as it trains.

    The Trainer's ``gradient_accumulation_steps`` decides the window; its loss is already the mean over it.

    Args:
        trainer: with ``optimizer_cls_and_kwargs=(danlu.Tiger, {...})`` or ``optimizers=(tiger, None)``, and
            ``max_grad_norm=0``.

    Raises:
        ValueError: clipping is on, training is in float16 with a changing scale, under DeepSpeed, or
            ``accumulation_steps`` of the optimiser also is more than 1. What depends on the optimiser is raised when
            training begins.
    """
    from transformers import TrainerCallback

    class _FoldWhileTraining(TrainerCallback):
        handle: Folding | None = None
        each_batch = False

        def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
            tiger = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
            if getattr(tiger, "accumulation_steps", 1) > 1 and args.gradient_accumulation_steps > 1:
                raise ValueError(
                    f"accumulation_steps={tiger.accumulation_steps} of the optimiser and gradient_accumulation_steps="
                    f"{args.gradient_accumulation_steps} of the Trainer would both act; set one of them to 1"
                )
            self.on_train_end(args, state, control)  # of a training that broke off
            # FSDP2 hands over a gradient only when it is reduced: without this the whole window's would be kept.
            options = trainer.accelerator.gradient_state.plugin_kwargs
            self.each_batch, options["sync_each_batch"] = options.get("sync_each_batch", False), True
            self.handle = fold_in_backward(tiger, trainer.model_wrapped)

        def on_train_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
            if self.handle is not None:
                self.handle.remove()
                self.handle = None
                trainer.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = self.each_batch

    args = trainer.args
    if args.max_grad_norm and args.max_grad_norm > 0:
        raise ValueError(
            f"max_grad_norm must be 0 with folded gradients, got {args.max_grad_norm}: they are freed one by one, so "
            "that there is no global norm; Tiger's step does not depend on it"
        )
    if args.fp16:
        raise ValueError("fp16 scales the loss by a factor that changes; use bf16=True with folded gradients")
    if getattr(args, "deepspeed", None):
        raise ValueError("DeepSpeed takes the gradients itself; use DDP or FSDP2 with folded gradients")
    trainer.add_callback(_FoldWhileTraining())
