"""The distribution of one continuous token given a vector: a small diffusion or flow model, as loss and as sampler."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from danlu.diffusion.losses import denoising_loss
from danlu.diffusion.process import widened
from danlu.diffusion.solvers import Solver
from danlu.diffusion.targets import Denoiser
from danlu.models.continuous.objective import Objective, denoise_tokens, draw_noise, path_of

__all__ = ["DiffusionHead"]

logger = logging.getLogger("danlu.models.continuous")

FREQUENCIES = 256
#: Times lie in 0..1 and the sinusoids were made for a thousand steps.
_TIME_SCALE = 1000.0


class DiffusionHead(nn.Module):
    """A multilayer perceptron that denoises a token under the condition of a backbone's output.

    Blocks ``s + gate(c) * MLP(LN(s) (1 + scale(c)) + shift(c))`` with ``c`` from time and condition. Modulations and
    output start at zero, so a fresh head predicts 0. It computes outside of autocast, in the dtype of its weights; its
    losses, and the states of its sampler, are in float32 or better.

    Args:
        token_dim: dimensions of a token, >= 1.
        cond_dim: width of the condition, >= 1.
        width: of the blocks, >= 1.
        depth: blocks, >= 1.
        objective: ``flow`` (straight lines, predicts the velocity eps - x; times are the sigmoid of a normal number) or
            ``epsilon`` (cosine schedule, predicts the noise; times are uniform).

    Raises:
        ValueError: a size below 1, or an unknown objective.

    Source: Scientific Spaces archive 10197; arXiv:2406.11838 (MAR), whose head this is but for two things: its noise
    levels are 1,000 discrete ones and here they are continuous, and it also learns a variance for ancestral sampling.
    """

    def __init__(
        self,
        token_dim: int,
        cond_dim: int,
        width: int = 1024,
        depth: int = 3,
        objective: Objective = "flow",
    ) -> None:
        super().__init__()
        for name, value in (("token_dim", token_dim), ("cond_dim", cond_dim), ("width", width), ("depth", depth)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.token_dim, self.cond_dim, self.objective = token_dim, cond_dim, objective
        self.process, self.prediction, self.times = path_of(objective)
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = nn.Linear(cond_dim, width)
        self.token = nn.Linear(token_dim, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, token_dim)
        self._checked = False  # whether the scale of the tokens has been looked at
        blocks: list[Any] = list(self.blocks)
        parts: list[Any] = list(self.modules())
        for part in parts:
            part.initial = _start_plain
        for part in (self.modulation, self.output, *(block.modulation for block in blocks)):
            part.initial = _start_at_zero
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew; modulations and output become zero. What a checkpoint has filled stays."""
        parts: list[Any] = list(self.modules())
        for part in parts:
            part.initial(part)

    def forward(self, y: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """Predict the velocity or the noise of noised tokens.

        Args:
            y: noised tokens (..., token_dim).
            t: times in 0..1, broadcast against the leading shape of ``y``.
            z: conditions (..., cond_dim), broadcast against it too.

        Returns:
            ``(..., token_dim)``, in float32 or better.
        """
        with torch.autocast(y.device.type, enabled=False):
            return self._denoise(y, t, self._project(z))

    def loss(
        self,
        x: Tensor,
        z: Tensor,
        mask: Tensor | None = None,
        mul: int = 4,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mean squared error of the prediction over tokens, their dimensions, and ``mul`` draws of time and noise each.

        Its expectation does not depend on ``mul``; more draws make the gradient less noisy for one backbone pass. Its
        floor is not 0: judge by samples, or by the difference of two losses.

        Args:
            x: normalised tokens (..., token_dim), of about unit variance.
            z: conditions (..., cond_dim), the same leading shape.
            mask: (...) bool, True for tokens that count; None: all do.
            mul: draws for each token, >= 1.
            generator: source of times and noise, on the CPU; None: torch's default generators, as for dropout, which
                the host's trainer seeds and stores.

        Returns:
            0-d tensor, in float32 or better; 0 where no token counts.

        Raises:
            ValueError: shapes that do not fit, or ``mul`` below 1.
        """
        if x.shape[:-1] != z.shape[:-1] or x.shape[-1] != self.token_dim or z.shape[-1] != self.cond_dim:
            raise ValueError(
                f"x must be (..., {self.token_dim}) and z (..., {self.cond_dim}) with the same leading shape, got "
                f"{tuple(x.shape)} and {tuple(z.shape)}"
            )
        if mul < 1:
            raise ValueError(f"mul must be at least 1, got {mul}")
        if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
            raise ValueError(f"mask must be bool of shape {tuple(x.shape[:-1])}, got {mask.dtype} {tuple(mask.shape)}")
        x, z = (x.flatten(0, -2), z.flatten(0, -2)) if mask is None else (x[mask], z[mask])
        x = widened(x)
        self._check_scale(x)
        with torch.autocast(x.device.type, enabled=False):
            projected = self._project(z)
            if not len(x):
                return self._denoise(x, x.new_zeros(0), projected).sum()
            clean = x.expand(mul, *x.shape).flatten(0, 1)
            t = self.times(len(clean), self.process, generator).to(x.device)
            noise = draw_noise(clean.shape, clean, generator)

            def predict(y: Tensor, t: Tensor) -> Tensor:
                # The condition of a token is projected once, for all of its draws.
                return self._denoise(y.view(mul, *x.shape), t.view(mul, -1), projected).flatten(0, 1)

            return denoising_loss(predict, clean, self.process, self.prediction, t=t, noise=noise).mean()

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        steps: int = 20,
        solver: str | Solver = "euler",
        temperature: float = 1.0,
        guidance: float = 1.0,
        generator: torch.Generator | int = 0,
        *,
        null: Tensor | None = None,
    ) -> Tensor:
        """Draw one token for each condition.

        Args:
            z: conditions (tokens, cond_dim).
            steps: of the solver, >= 1.
            solver: a name or object that ``danlu.diffusion.sample`` takes.
            temperature: factor of the first noise, >= 0; 1 samples the model.
            guidance: w of classifier-free guidance ``u + w (c - u)``, >= 0; 1 is none. Both predictions are for the
                same noised token.
            generator: source of the noise, on the CPU, or a seed.
            null: conditions without the class or text (tokens, cond_dim); needed for a guidance other than 1.

        Returns:
            Normalised tokens ``(tokens, token_dim)``, in float32 or better.

        Raises:
            ValueError: shapes that do not fit, a number out of range, or guidance without ``null``.
        """
        if z.ndim != 2 or z.shape[1] != self.cond_dim:
            raise ValueError(f"z must be (tokens, {self.cond_dim}), got {tuple(z.shape)}")
        if not (temperature >= 0 and math.isfinite(temperature) and guidance >= 0 and math.isfinite(guidance)):
            raise ValueError(f"temperature and guidance must be at least 0, got {temperature} and {guidance}")
        if guidance != 1 and (null is None or null.shape != z.shape):
            raise ValueError(
                f"guidance {guidance} needs null: conditions without class or text, of shape {tuple(z.shape)}, got "
                f"{None if null is None else tuple(null.shape)}; or take guidance=1"
            )
        if isinstance(generator, int):
            generator = torch.Generator().manual_seed(generator)
        with torch.autocast(z.device.type, enabled=False):
            rows = z if guidance == 1 or null is None else torch.cat([z, null])
            projected = self._project(rows)

            def predict(y: Tensor, t: Tensor) -> Tensor:
                # One time for all tokens comes as a view of stride 0: its embedding is needed once.
                t = t[:1] if t.stride() == (0,) else t
                if guidance == 1:
                    return self._denoise(y, t, projected)
                both = self._denoise(torch.stack([y, y]), t, projected.view(2, len(y), -1))
                return both[1] + guidance * (both[0] - both[1])

            noise = temperature * draw_noise((len(z), self.token_dim), widened(z), generator)
            denoiser = Denoiser(predict, self.process, self.prediction)
            return denoise_tokens(denoiser, noise, steps, solver, generator)

    def _project(self, z: Tensor) -> Tensor:
        return self.condition(z.to(self.condition.weight.dtype))

    def _denoise(self, y: Tensor, t: Tensor, projected: Tensor) -> Tensor:
        dtype = self.token.weight.dtype
        c = F.silu(self.time(sinusoids(t).to(dtype)) + projected)
        s = self.token(y.to(dtype))
        for block in self.blocks:
            s = block(s, c)
        shift, scale = self.modulation(c).chunk(2, -1)
        return widened(self.output(self.norm(s) * (1 + scale) + shift))

    def _check_scale(self, x: Tensor) -> None:
        """Say once when tokens are far from unit variance: the noise levels of training would miss them."""
        if self._checked or torch.compiler.is_compiling() or len(x) < 16:
            return
        self._checked = True
        std = float(x.std(unbiased=False))
        if not 0.5 <= std <= 2:
            logger.warning(
                "tokens have a standard deviation of %.3g, and the noise is made for 1: set token_mean and token_std "
                "of the configuration from danlu.models.continuous.token_statistics",
                std,
            )


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, s: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(c).chunk(3, -1)
        return s + gate * self.mlp(self.norm(s) * (1 + scale) + shift)


def _start_plain(module: Any) -> None:
    if isinstance(module, nn.Linear):
        init.xavier_uniform_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        init.ones_(module.weight)
        init.zeros_(module.bias)


def _start_at_zero(linear: Any) -> None:
    init.zeros_(linear.weight)
    init.zeros_(linear.bias)


def sinusoids(t: Tensor) -> Tensor:
    """(..., 256) cosines and sines of a time, in float32 or better."""
    half = FREQUENCIES // 2
    rates = torch.exp(-math.log(10000.0) / half * torch.arange(half, device=t.device, dtype=widened(t).dtype))
    angles = _TIME_SCALE * widened(t)[..., None] * rates
    return torch.cat([angles.cos(), angles.sin()], -1)
