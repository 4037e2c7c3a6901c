"""Low-rank optimisers in a state that hides nothing: both factors away from zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from danlu.optim.low_rank import LowRankOptimizer


def fill(optimizer: LowRankOptimizer, seed: int = 3) -> None:
    """Both factors away from zero, and the weights at them."""
    generator = torch.Generator().manual_seed(seed)
    for site in optimizer.sites:
        for factor in (site.A, site.B):
            factor.data.copy_(torch.randn(factor.shape, generator=generator, dtype=torch.float64) * 0.3)
    optimizer.change.attach()


def one_matrix(out: int = 12, inp: int = 8, dtype: torch.dtype = torch.float64) -> nn.Linear:
    return nn.Linear(inp, out, bias=False, dtype=dtype)


def sgd(model: nn.Module | list, **options: object) -> LowRankOptimizer:
    settings = {"base": torch.optim.SGD, "base_kwargs": {"lr": 0.1}, "rank": 4, "alpha": 4, **options}
    return LowRankOptimizer(model, **settings)


def give_gradient(weight: nn.Parameter, seed: int = 5) -> Tensor:
    G = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight.grad = G.to(weight.dtype)
    return G
