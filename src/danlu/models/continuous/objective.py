"""The two objectives of a continuous token: which Gaussian path, what is predicted, how tokens are drawn from it."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from danlu.diffusion.grids import time_grid
from danlu.diffusion.process import Process
from danlu.diffusion.processes import Cosine, RectifiedFlow
from danlu.diffusion.solvers import Solver, sample
from danlu.diffusion.targets import Denoiser, Prediction
from danlu.diffusion.times import LogitNormalTimes, TimeSampler, UniformTimes

Objective = Literal["flow", "epsilon"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)

#: The cosine path has no data left at t = 1, where a noise prediction says nothing, and near it every error of the
#: noise is blown up by sigma / alpha. Training and sampling end at alpha = 0.016; for tokens of mean 0 and variance 1
#: the noised tokens have that mean and variance too, so that starting from N(0, 1) costs next to nothing.
_COSINE_END = 0.99


def path_of(objective: str) -> tuple[Process, Prediction, TimeSampler]:
    """Process, kind of prediction and training times of an objective.

    Raises:
        ValueError: an unknown objective.
    """
    if objective == "flow":
        return RectifiedFlow(), "velocity", LogitNormalTimes()
    if objective == "epsilon":
        return Cosine(), "epsilon", UniformTimes(end=_COSINE_END)
    raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")


def denoise_tokens(
    denoiser: Denoiser, noise: Tensor, steps: int, solver: str | Solver, generator: torch.Generator
) -> Tensor:
    """Tokens from standard normal noise (tokens, token_dim), by any solver of the diffusion core."""
    process = denoiser.process
    start = _COSINE_END if isinstance(process, Cosine) else process.t_max
    times = time_grid(process, steps, start=start)
    return sample(denoiser, times=times, noise=noise, solver=solver, seed=generator, progress=None).samples


def draw_noise(shape: Any, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers, from a generator on the CPU, else from the default one of the tensor's device."""
    device = like.device if generator is None else None
    return torch.randn(shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
