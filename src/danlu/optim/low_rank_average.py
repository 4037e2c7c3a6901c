"""Gradients averaged over processes outside of DDP: one reduction for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace each ``.grad`` by its mean over all processes; a process without one counts as zero.

    A gradient that no process has stays None. One reduction says which there are, and one per dtype and device carries
    them. Without a process group nothing happens. Averaging twice is the same as once.

    Args:
        parameters: the same ones in the same order on every process.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or not parameters:
        return
    present = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    distributed.all_reduce(present)
    used = [parameter for parameter, count in zip(parameters, present.tolist(), strict=True) if count]
    for kind in dict.fromkeys((p.dtype, p.device) for p in used):
        alike = [p for p in used if (p.dtype, p.device) == kind]
        for parameter in alike:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.flatten() for p in alike])  # type: ignore[union-attr]
        distributed.all_reduce(flat)
        flat /= distributed.get_world_size()
        for parameter, part in zip(alike, flat.split([p.numel() for p in alike]), strict=True):
            parameter.grad.copy_(part.view_as(parameter))  # type: ignore[union-attr]
