"""What one process does in the test of codebook use over processes; a module that a spawned process can import."""

from __future__ import annotations

import torch

from danlu.vision.usage import CodebookUsage
from danlu.vision.vq import VectorQuantizer


def indices(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Random indices of a codebook."""
    return torch.randint(size, (count,), generator=torch.Generator().manual_seed(seed))


def count_on_a_rank(rank: int, world: int, path: str) -> None:
    """Count different indices on every process and train one moving average; write what this process sees."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/meeting", rank=rank, world_size=world)
    usage = CodebookUsage([50, 7])
    if rank:  # the other has seen nothing yet
        usage.update(torch.stack((indices(30, 50), indices(30, 7)), 1))
        usage.update(torch.stack((indices(9, 50, 1), indices(9, 7, 1)), 1))
    assert usage.report().codebooks[0].tokens == 39
    if not rank:
        usage.update(torch.stack((indices(20, 50, 2), indices(20, 7, 2)), 1))
    quantizer = VectorQuantizer(4, 2, update="ema")
    z = torch.randn(20, 2, generator=torch.Generator().manual_seed(rank))
    quantizer.initialise(z)
    quantizer(z), quantizer(z)
    torch.save((usage.report().to_json(), quantizer.state_dict()), f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()
