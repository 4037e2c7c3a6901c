"""The host's Trainer with checkpoints that are whole or absent, rows in a fixed order, and a checked first loss."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss

from danlu.optim.multitask_trainer import MultiTaskMixin


class RecipeTrainer(Trainer):
    """``transformers.Trainer`` for data sets that are shuffled already; see ``danlu.training.data.Rows``.

    A checkpoint is written beside its place and moved there when all of it is on the disk, so that a killed run, or a
    full disk, leaves the one before untouched. Validation uses the model's own cross entropy whatever the training loss
    is.
    """

    checked = False

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; the first loss of a run must be a finite number."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not self.checked:
            self.checked = True
            if not torch.isfinite(loss):
                raise ValueError(
                    f"loss must be finite at step {self.state.global_step}, got {loss.item()}: "
                    f"{find_nonfinite(self.accelerator.unwrap_model(model), self._prepare_inputs(inputs))}"
                )
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The training loss in training mode, cross entropy in evaluation mode."""
        if model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = ForCausalLMLoss(outputs.logits, inputs["labels"], outputs.logits.shape[-1])
        return (loss, outputs) if (args and args[0]) or kwargs.get("return_outputs") else loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        place = Path(self.args.output_dir)
        staging = place / ".saving"
        if self.is_world_process_zero():
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(staging)
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # safetensors and torch report a full disk by kinds of their own
            shutil.rmtree(staging, ignore_errors=True)
            last = newest_checkpoint(place)
            left = f"{last.name} is whole" if last is not None else "there was none before"
            raise OSError(
                f"cannot save checkpoint {self.state.global_step} in {place}: {error}; {left}; make room and go on "
                "with --resume"
            ) from error
        finally:
            self.args.output_dir = str(place)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            name = f"checkpoint-{self.state.global_step}"
            _flush(staging / name)
            shutil.rmtree(place / name, ignore_errors=True)
            (staging / name).rename(place / name)
            staging.rmdir()
            for old in checkpoints(place)[: -(self.args.save_total_limit or 1)]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()


class TaskTrainer(MultiTaskMixin, RecipeTrainer):
    """A trainer whose batches hold a batch of each task by name, the main one first."""

    def compute_losses(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The model's own loss on each task's batch."""
        return {name: model(**batch).loss for name, batch in inputs.items()}

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Cross entropy on one task's validation rows."""
        return RecipeTrainer.compute_loss(self, model, inputs, *args, **kwargs)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run by step, all of them whole."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the largest step, if there is one."""
    return next(reversed(checkpoints(folder)), None)


def find_nonfinite(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Names the first tensor of a forward pass that is not finite: a parameter, else a module's output.

    Args:
        model: run once more, without gradients.
        inputs: the batch that gave the loss.
    """
    for name, parameter in model.named_parameters():
        if bad := int((~torch.isfinite(parameter.detach())).sum()):
            return f"parameter {name} has {bad} of {parameter.numel()} entries that are not finite"
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = [output] if isinstance(output, Tensor) else [x for x in _values(output) if isinstance(x, Tensor)]
            if not found and any(x.is_floating_point() and not torch.isfinite(x).all() for x in tensors):
                found.append(f"the output of {name or 'the model'} ({type(module).__name__})")

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return f"{found[0]} is the first tensor that is not finite" if found else "every tensor before the loss is finite"


def _values(output: Any) -> list[Any]:
    if isinstance(output, Mapping):
        return list(output.values())
    return list(output) if isinstance(output, tuple | list) else []


def _flush(folder: Path) -> None:
    """All files of a folder are on the disk when this returns."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
