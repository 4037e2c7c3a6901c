"""Mode I: one Transformer that reads clean patches and noisy copies of them in one sequence, and denoises by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from danlu.diffusion.losses import denoising_loss
from danlu.diffusion.process import widened
from danlu.diffusion.solvers import Solver
from danlu.diffusion.targets import Denoiser
from danlu.models.continuous.head import FREQUENCIES, sinusoids
from danlu.models.continuous.mask import JointLayout, joint_noise_mask
from danlu.models.continuous.objective import Objective, denoise_tokens, draw_noise, path_of
from danlu.progress import watched

__all__ = ["JointNoiseDecoder"]


class JointNoiseDecoder(nn.Module):
    """A causal Transformer whose own output at a noisy copy of a patch is the prediction: no separate head.

    It costs ``steps + 1`` backbone steps for each sampled patch where a diffusion head costs one; the head
    (:class:`ContinuousCausalLM`) is the one to prefer. This one is for comparisons, and for images alone.

    Args:
        backbone: a decoder of the host library without output head, with attention ``sdpa``, ``eager`` or
            ``flex_attention``; with the last the mask is block-sparse, so that only pairs that see each other cost.
        token_dim: dimensions of a patch, >= 1.
        objective: as for :class:`DiffusionHead`.

    Raises:
        ValueError: an attention that takes no mask of its own, or an unknown objective.

    Source: Scientific Spaces archive 10197 (Mode I)
    """

    def __init__(self, backbone: Any, token_dim: int, objective: Objective = "flow") -> None:
        super().__init__()
        self.process, self.prediction, self.times = path_of(objective)
        attention = backbone.config._attn_implementation
        if attention not in ("sdpa", "eager", "flex_attention"):
            raise ValueError(f"attention of the backbone must be sdpa, eager or flex_attention, got {attention!r}")
        if token_dim < 1:
            raise ValueError(f"token_dim must be at least 1, got {token_dim}")
        width = backbone.config.hidden_size
        self.backbone = backbone
        self.token_dim = token_dim
        self.start = nn.Parameter(torch.randn(width) * 0.02)
        self.patch_embedding = nn.Linear(token_dim, width)
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.output = nn.Linear(width, token_dim)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Read clean patches and noisy copies.

        Args:
            x: normalised clean patches (batch, patches, token_dim).
            y: noisy copies (batch, patches, levels, token_dim); levels may be 0.
            t: their times (batch, patches, levels).

        Returns:
            The backbone's outputs at the clean patches (batch, patches, hidden), and predictions of the shape of ``y``.

        Raises:
            ValueError: shapes that do not fit.
        """
        batch, count = x.shape[:2]
        if x.ndim != 3 or y.ndim != 4 or y.shape[:2] != x.shape[:2] or t.shape != y.shape[:3]:
            raise ValueError(
                "x must be (batch, patches, token_dim), y (batch, patches, levels, token_dim) and t (batch, patches, "
                f"levels), got {tuple(x.shape)}, {tuple(y.shape)} and {tuple(t.shape)}"
            )
        layout = JointLayout(count, y.shape[2], text=1)
        embeds = torch.cat(
            [self.start.expand(batch, 1, -1), self._embed(x), self._embed(y.flatten(1, 2), t.flatten(1, 2))], 1
        )
        outputs = self.backbone(
            inputs_embeds=embeds,
            attention_mask=self._mask(layout, embeds),
            position_ids=layout.position_ids(embeds.device)[None],
            use_cache=False,
        )
        hidden = outputs.last_hidden_state
        return hidden[:, 1 : 1 + count], widened(self.output(hidden[:, layout.noisy :])).view(y.shape)

    def loss(self, x: Tensor, levels: int = 4, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of the prediction over patches, dimensions and ``levels`` noisy copies of each patch.

        Args:
            x: normalised patches (batch, patches, token_dim).
            levels: noisy copies of each patch, >= 1.
            generator: source of times and noise, on the CPU; None: torch's default generators.

        Returns:
            0-d tensor in float32 or better.

        Raises:
            ValueError: ``levels`` below 1.
        """
        if levels < 1:
            raise ValueError(f"levels must be at least 1, got {levels}")
        shape = (*x.shape[:2], levels, self.token_dim)
        clean = widened(x)[:, :, None].expand(shape).reshape(-1, self.token_dim)
        t = self.times(len(clean), self.process, generator).to(x.device)
        noise = draw_noise(clean.shape, clean, generator)

        def predict(y: Tensor, t: Tensor) -> Tensor:
            return self(x, y.view(shape), t.view(shape[:3]))[1].view(-1, self.token_dim)

        return denoising_loss(predict, clean, self.process, self.prediction, t=t, noise=noise).mean()

    @torch.no_grad()
    def generate_patches(
        self, count: int, num_samples: int = 1, *, steps: int = 20, solver: str | Solver = "euler", generator: Any = 0
    ) -> Tensor:
        """Sample patches; a noisy query reads the backbone's cache and leaves nothing in it.

        Args:
            count: patches of a sequence, >= 1.
            num_samples: sequences, >= 1.
            steps: of the solver for each patch, >= 1.
            solver: a name or object that ``danlu.diffusion.sample`` takes.
            generator: source of the noise, on the CPU, or a seed.

        Returns:
            Normalised patches ``(num_samples, count, token_dim)``.

        Raises:
            ValueError: a number below 1.
        """
        if count < 1 or num_samples < 1:
            raise ValueError(f"count and num_samples must be at least 1, got {count} and {num_samples}")
        if isinstance(generator, int):
            generator = torch.Generator().manual_seed(generator)
        cache = self.backbone(inputs_embeds=self.start.expand(num_samples, 1, -1), use_cache=True).past_key_values
        tokens: list[Tensor] = []
        for _ in watched(range(count), "patches"):
            if tokens:
                self.backbone(inputs_embeds=self._embed(tokens[-1][:, None]), past_key_values=cache, use_cache=True)
            denoiser = Denoiser(lambda y, t: self.query(y, t, cache), self.process, self.prediction)
            noise = draw_noise((num_samples, self.token_dim), widened(self.start), generator)
            tokens.append(denoise_tokens(denoiser, noise, steps, solver, generator))
        return torch.stack(tokens, 1)

    def query(self, y: Tensor, t: Tensor, cache: Any) -> Tensor:
        """Predict for noisy copies of the next patch from a cache, which is left as it was.

        Args:
            y: noisy copies (batch, token_dim).
            t: their times (batch,).
            cache: of the start and the clean patches so far; a kind of the host's that can drop its last position.

        Returns:
            The predictions ``(batch, token_dim)``.
        """
        outputs = self.backbone(inputs_embeds=self._embed(y, t)[:, None], past_key_values=cache, use_cache=True)
        cache.crop(-1)
        return widened(self.output(outputs.last_hidden_state[:, 0]))

    def _embed(self, patches: Tensor, t: Tensor | None = None) -> Tensor:
        dtype = self.patch_embedding.weight.dtype
        embeds: Tensor = self.patch_embedding(patches.to(dtype))
        return embeds if t is None else embeds + self.time(sinusoids(t).to(dtype))

    def _mask(self, layout: JointLayout, like: Tensor) -> Any:
        if self.backbone.config._attn_implementation == "flex_attention":
            from torch.nn.attention.flex_attention import create_block_mask

            length = layout.length
            return create_block_mask(layout.mask_mod(), None, None, length, length, device=str(like.device))
        visible = joint_noise_mask(layout, like.device)[None, None]
        if self.backbone.config._attn_implementation == "sdpa":
            return visible
        return torch.zeros_like(visible, dtype=like.dtype).masked_fill(~visible, torch.finfo(like.dtype).min)
