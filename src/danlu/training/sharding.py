"""FSDP2 for recipes: the model is sharded block by block, whatever the device, and checkpoints hold whole tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from danlu.hosts.architecture import read_architecture
from danlu.training.trainer import RecipeTrainer

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: nn.Module) -> Any:
    """Shard a host model over all processes with ``fully_shard``: each block, then what is left.

    Args:
        model: of a kind that ``read_architecture`` understands, equal on all processes.

    Returns:
        The same model; its parameters are ``DTensor``.

    Raises:
        UnsupportedArchitecture: another kind of model.
    """
    from torch.distributed.fsdp import fully_shard

    for block in read_architecture(model).blocks:
        fully_shard(block.module)
    return fully_shard(model)


class ShardedTrainer(RecipeTrainer):
    """A trainer for a model that ``shard`` has prepared: accelerate is kept from wrapping it a second time."""

    def create_accelerator_and_postprocess(self) -> None:
        """Accelerate's own FSDP2 needs an accelerator device; sharded beforehand, any device will do."""
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_model
        self.accelerator.prepare_model = lambda model, device_placement=None, evaluation_mode=False: prepare(
            model, device_placement=False, evaluation_mode=True
        )

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Gather whole weights, which every process must take part in, and write them from one."""
        state = get_model_state_dict(self.model, options=_WHOLE)
        if self.args.should_save:
            once = {name for name, _ in [*self.model.named_parameters(), *self.model.named_buffers()]}
            self._save(output_dir, state_dict={name: tensor for name, tensor in state.items() if name in once})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        from safetensors.torch import load_file

        target = self.model if model is None else model
        state = load_file(Path(resume_from_checkpoint) / "model.safetensors")
        # A tied head is stored once and found again through its table.
        set_model_state_dict(target, state, options=StateDictOptions(full_state_dict=True, strict=False))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = get_optimizer_state_dict(self.model, _bare(self.optimizer), options=_WHOLE)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self.model, _bare(self.optimizer), state, options=options)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)
