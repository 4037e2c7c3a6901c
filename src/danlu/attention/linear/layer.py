"""Linear attention as a layer: Performer, exponential maps and soft vector quantisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from danlu.attention.linear.engine import linear_attention
from danlu.attention.linear.feature_maps import (
    EluFeatures,
    ExpFeatures,
    FavorFeatures,
    FeatureMap,
    KeyWeight,
    Norms,
    SoftVQ,
)
from danlu.attention.linear.inputs import check_heads, real_tokens
from danlu.positions.rotary import Rotary, inverse_frequencies

__all__ = ["LinearAttention"]

FEATURE_MAPS = ("favor", "exp", "elu", "soft_vq")


class LinearAttention(nn.Module):
    """Causal token mixer in time linear in the length, with a state of fixed size.

    Args:
        hidden_size: width of the input.
        heads: query heads.
        kv_heads: key-value heads, a divisor of heads; default: heads.
        head_dim: size of a head; default hidden_size / heads.
        feature_map: ``favor`` (Performer), ``exp``, ``elu``, or ``soft_vq``.
        features: per head. Default 4 * head_dim for ``favor`` and ``soft_vq``; head_dim for ``exp`` and ``elu``, whose
            queries and keys are projected to this width.
        chunk: tokens worked on at once, 64 to 256; the result does not depend on it.
        bias: bias in the projections of queries, keys and values.
        rotary: rotate queries and keys before the map. Default: where the map stands for softmax of q.k, that is
            ``favor`` and ``soft_vq``. The others know positions only through causality.
        rope_base: base of the rotation.
        norms: of ``favor``, see :class:`danlu.attention.linear.feature_maps.FavorFeatures`.
        tau: of ``soft_vq``, see :class:`danlu.attention.linear.feature_maps.SoftVQ`.
        key_weight: of ``soft_vq``, there.
        seed: of the rows of ``favor`` and of the first codes of ``soft_vq``.

    Raises:
        ValueError: a size or name out of range, or rotation with a map that acts on each dimension by itself.

    Source: Scientific Spaces archives 7546, 7921, 8601, 9862; arXiv:2009.14794
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        feature_map: str = "favor",
        features: int | None = None,
        chunk: int = 128,
        bias: bool = False,
        rotary: bool | None = None,
        rope_base: float = 10000.0,
        norms: Norms = "chi",
        tau: float = 1.0,
        key_weight: KeyWeight = "none",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = check_heads(hidden_size, heads, kv_heads, head_dim)
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, got {feature_map!r}")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        self.chunk = chunk
        self.seed = seed
        width = self.head_dim
        if feature_map == "favor":
            made: FeatureMap = FavorFeatures(width, features, norms=norms, seed=seed)
        elif feature_map == "soft_vq":
            codes = 4 * width if features is None else features
            made = SoftVQ(torch.zeros(self.kv_heads, codes, width), tau=tau, key_weight=key_weight)
        else:
            width = width if features is None else features
            made = (ExpFeatures if feature_map == "exp" else EluFeatures)(width)
        self.feature_map = made
        rotary = made.estimates_softmax if rotary is None else rotary
        if rotary and not made.estimates_softmax:
            raise ValueError(
                f"rotary must be False with feature_map {feature_map!r}: rotated features would see absolute places"
            )
        self.rotary = Rotary(inverse_frequencies(width, rope_base)) if rotary else None
        self.q_proj = nn.Linear(hidden_size, self.heads * width, bias=bias)
        self.k_proj = nn.Linear(hidden_size, self.kv_heads * width, bias=bias)
        self.v_proj = nn.Linear(hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the rows of ``favor`` or the codes of ``soft_vq``; projections keep the default initialisation.

        Args:
            generator: of the codes, on the CPU; default: seeded by ``seed``. Rows always follow ``seed``.
        """
        if isinstance(self.feature_map, FavorFeatures):
            self.feature_map.reset_parameters()
        elif isinstance(self.feature_map, SoftVQ):
            generator = torch.Generator(device="cpu").manual_seed(self.seed) if generator is None else generator
            codebook = self.feature_map.codebook
            # of the size of unit keys after scaling
            codes = torch.randn(codebook.shape, generator=generator, device="cpu") * codebook.shape[-1] ** -0.25
            codebook.copy_(codes)

    def redraw(self, seed: int) -> None:
        """New random rows for ``favor``, for instance every thousand steps of training.

        Raises:
            ValueError: the map has no random rows.
        """
        if not isinstance(self.feature_map, FavorFeatures):
            raise ValueError(f"redraw needs feature_map 'favor', got {type(self.feature_map).__name__}")
        self.feature_map.redraw(seed)

    def make_cache(self) -> Any:
        """A fresh cache layer."""
        from danlu.attention.linear.cache import LinearCache

        return LinearCache()

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        """Mix tokens causally.

        Args:
            x: (batch, length, hidden_size).
            positions: (length,) or (batch, length) int64.
            mask: (batch, past + length) bool, True = real token; None: all.
            cache: from :meth:`make_cache`, or None.

        Returns:
            Tensor (batch, length, hidden_size).

        Raises:
            ValueError: a mask of four dimensions.
        """
        length = x.shape[1]
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        if self.rotary is not None:
            turn = self.rotary.angles(positions, x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)
            q, k = self.rotary.apply(q, *turn), self.rotary.apply(k, *turn)
        state = None if cache is None else cache.state
        real = real_tokens(mask, length)
        out, state = linear_attention(q, k, v, self.feature_map, chunk=self.chunk, mask=real, state=state)
        if cache is not None:
            cache.advance(state.detach(), length)
        return self.o_proj(out.transpose(1, 2).flatten(2))
