"""Muon for hidden matrices and AdamW for the rest, behind one optimiser face."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from danlu.hosts.parameters import Kind, classify_parameters


class MuonAdamW(torch.optim.Optimizer):
    """``torch.optim.Muon`` for matrices inside the blocks, AdamW without decay for embeddings, head and vectors.

    Args:
        model: its trainable parameters are optimised; the head counts as an embedding.
        lr: learning rate of both; Muon's updates are scaled to AdamW's size.
        weight_decay: of the matrices.
        betas: of AdamW.
    """

    def __init__(self, model: Any, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)):
        kinds = classify_parameters(model)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                hidden = kinds[name] is Kind.MATRIX and parameter.ndim == 2
                outer = head is not None and parameter is getattr(head, "weight", None)
                (matrices if hidden and not outer else rest).append(parameter)
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=0.0, fused=True),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        # The schedule edits our groups, so the parts must read the same dictionaries.
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups = [group]

    def step(self, closure: Any = None) -> Any:
        """Both parts take a step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """States of both parts by their number."""
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What ``state_dict`` gave."""
        for i, part in enumerate(self.parts):
            part.load_state_dict(state_dict[str(i)])
        self.param_groups = [group for part in self.parts for group in part.param_groups]
