"""Multi-head latent attention: trains like multi-head attention, decodes like multi-query attention over a latent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from danlu.attention.latent.absorbed import absorbed_attention, prefers_absorbed
from danlu.kernels.flash import attend
from danlu.kernels.regions import Part
from danlu.positions.rotary import Layout, Rotary, inverse_frequencies

if TYPE_CHECKING:
    from danlu.attention.latent.cache import LatentLayer

Form = Literal["auto", "mha", "absorbed"]


class MultiheadLatentAttention(nn.Module):
    r"""Causal attention whose keys and values are linear maps of one cached latent per token.

    $$
    c_i = \mathrm{norm}(x_i W_c), \quad
    k_i^s = [c_i W_{kc}^s, R_i(x_i W_{kr})], \quad
    v_i^s = c_i W_v^s, \quad
    q_t^s = [c'_t W_{qc}^s, R_t(c'_t W_{qr}^s)]
    $$

    The cache holds $c_i$ and the one rotated key that all heads share: `kv_rank + rope_dim` numbers per token, whatever
    the number of heads. Two forms give the same output. The "mha" form expands keys and values (training, prefill); the
    "absorbed" form moves $W_{kc}$ to the query and $W_v$ to the output and reads the latents as they are (decoding).

    Parameters have the names and layouts of DeepSeek-V3's attention in the host library, so that its weights load as
    they are. Departures from the article: the latents are normalised (as in the released models; it leaves that out).
    Without `q_rank` there is no query latent, as in DeepSeek-V2-Lite. With ``nope_dim = 0`` all heads share one rotary
    key.

    Args:
        hidden_size: width of the input and output.
        heads: number of heads; costs no cache.
        kv_rank: width of the latent that is cached.
        q_rank: width of the query latent; None: queries come from the input directly.
        nope_dim: width of a head's query and key without positions, 0 or more.
        rope_dim: width of the rotary part, even, at least 2.
        value_dim: width of a head's value.
        rope_base: base of the rotary frequencies.
        rope_layout: which dims of the rotary part form a pair: "interleaved" (2i, 2i + 1), as DeepSeek's weights have
            it, or "half" (i, i + rope_dim / 2).
        eps: of the latents' RMS normalisation.
        bias: biases on the projections from and to the hidden size, except `q_proj`, as in the host.
        impl: "auto" takes the cheaper form for each call (see `prefers_absorbed`); "mha" or "absorbed" forces one.
        scale: factor of the scores; None: `(nope_dim + rope_dim) ** -0.5`. YaRN models multiply it by mscale squared.

    Raises:
        ValueError: a size or `impl` is out of range.

    Source: Scientific Spaces archive 10091, 10907, 11111; arXiv:2405.04434.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        heads: int,
        kv_rank: int,
        q_rank: int | None = None,
        nope_dim: int,
        rope_dim: int,
        value_dim: int,
        rope_base: float = 10000.0,
        rope_layout: Layout = "interleaved",
        eps: float = 1e-6,
        bias: bool = False,
        impl: Form = "auto",
        scale: float | None = None,
    ) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "heads": heads, "kv_rank": kv_rank, "value_dim": value_dim}
        if q_rank is not None:
            sizes["q_rank"] = q_rank
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if nope_dim < 0:
            raise ValueError(f"nope_dim must be 0 or more, got {nope_dim}")
        if rope_dim < 2 or rope_dim % 2:
            raise ValueError(f"rope_dim must be even (pairs are rotated) and at least 2, got {rope_dim}")
        if impl not in get_args(Form):
            raise ValueError(f"impl must be one of {get_args(Form)}, got {impl!r}")
        if not eps > 0:
            raise ValueError(f"eps must be > 0, got {eps}; 1e-6 is usual")
        self.heads, self.kv_rank, self.impl = heads, kv_rank, impl
        self.nope_dim, self.rope_dim, self.value_dim = nope_dim, rope_dim, value_dim
        self.scale = float((nope_dim + rope_dim) ** -0.5 if scale is None else scale)
        self.rotary = Rotary(inverse_frequencies(rope_dim, rope_base), layout=rope_layout)
        queries = heads * (nope_dim + rope_dim)
        if q_rank is None:
            self.q_proj = nn.Linear(hidden_size, queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, q_rank, bias=bias)
            self.q_a_layernorm = nn.RMSNorm(q_rank, eps)
            self.q_b_proj = nn.Linear(q_rank, queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, kv_rank + rope_dim, bias=bias)
        self.kv_a_layernorm = nn.RMSNorm(kv_rank, eps)
        self.kv_b_proj = nn.Linear(kv_rank, heads * (nope_dim + value_dim), bias=False)
        self.o_proj = nn.Linear(heads * value_dim, hidden_size, bias=bias)

    def make_cache(self) -> LatentLayer:
        """Give a fresh cache layer for `forward`."""
        from danlu.attention.latent.cache import LatentLayer

        return LatentLayer()

    def prefers_absorbed(self, queries: int, keys: int) -> bool:
        """Tell whether "auto" takes the absorbed form for so many new tokens and keys per row."""
        return prefers_absorbed(
            queries,
            keys,
            kv_rank=self.kv_rank,
            nope_dim=self.nope_dim,
            rope_dim=self.rope_dim,
            value_dim=self.value_dim,
        )

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor | None = None, cache: LatentLayer | None = None
    ) -> Tensor:
        """Mix tokens.

        Args:
            x: (batch, length, hidden_size).
            positions: int64 (length,) or (batch, length), counted from the first real token.
            mask: None, or bool (batch, past + length), True = real token, or bool
                (batch, 1 or heads, length, past + length), True = visible. Without a 4-D mask attention is causal.
            cache: from `make_cache`; the new tokens are appended.

        Returns:
            Tensor of shape (batch, length, hidden_size). A token that sees no other has attention output 0.

        Raises:
            ValueError: the mask is no bool tensor of one of these shapes.
        """
        batch, length, _ = x.shape
        q = self._queries(x).view(batch, length, self.heads, self.nope_dim + self.rope_dim).transpose(1, 2)
        q_nope, q_rope = q.split([self.nope_dim, self.rope_dim], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.kv_rank, self.rope_dim], -1)
        latent = self.kv_a_layernorm(latent)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = self.rotary.angles(positions, x.device, dtype)
        q_rope, k_rope = self.rotary.apply(q_rope, cos, sin), self.rotary.apply(k_rope, cos, sin)
        if cache is not None:
            latent, k_rope = (part[:, 0] for part in cache.update(latent[:, None], k_rope[:, None]))
        visible, causal = self._visible(mask, batch, length, latent.shape[1])
        absorb = self.impl == "absorbed" or (self.impl == "auto" and self.prefers_absorbed(length, latent.shape[1]))
        weight = self.kv_b_proj.weight.view(self.heads, self.nope_dim + self.value_dim, self.kv_rank)
        w_key, w_value = weight.split([self.nope_dim, self.value_dim], 1)
        if absorb:
            out = absorbed_attention(
                q_nope, q_rope, latent, k_rope, w_key, w_value, self.scale, mask=visible, causal=causal
            )
        else:
            out = self._expanded(q_nope, q_rope, latent, k_rope, visible, causal)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _queries(self, x: Tensor) -> Tensor:
        if hasattr(self, "q_proj"):
            return self.q_proj(x)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))

    def _expanded(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, visible: Tensor | None, causal: bool
    ) -> Tensor:
        """The same attention with every head's keys and values made, (batch, heads, length, value_dim)."""
        expanded = self.kv_b_proj(latent).unflatten(-1, (self.heads, self.nope_dim + self.value_dim)).transpose(1, 2)
        k_nope, value = expanded.split([self.nope_dim, self.value_dim], -1)
        key = torch.cat((k_nope, k_rope[:, None].expand(-1, self.heads, -1, -1)), -1)
        query = torch.cat((q_nope, q_rope), -1)
        part = Part() if causal else Part(nearest=None)
        out, _ = attend([query], [key], value, [part], self.scale, bias=visible)
        return out

    def _visible(self, mask: Tensor | None, batch: int, length: int, total: int) -> tuple[Tensor | None, bool]:
        """The mask in four dimensions, or None, and whether causality comes on top of it."""
        if mask is None:
            return None, True
        good = mask.dtype == torch.bool and (
            mask.shape == (batch, total)
            or (mask.ndim == 4 and mask.shape[1] in (1, self.heads) and mask[:, 0].shape == (batch, length, total))
        )
        if not good:
            raise ValueError(
                f"mask must be bool of shape ({batch}, {total}) or ({batch}, 1 or {self.heads}, {length}, {total}), "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        if mask.ndim == 4:
            return mask, False
        # without padding the plain causal path serves, which needs no mask in memory
        if not torch.compiler.is_compiling() and bool(mask.all()):
            return None, True
        return mask[:, None, None].expand(-1, -1, length, -1), True

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return (
            f"heads={self.heads}, kv_rank={self.kv_rank}, nope_dim={self.nope_dim}, rope_dim={self.rope_dim}, "
            f"value_dim={self.value_dim}, impl={self.impl}"
        )
