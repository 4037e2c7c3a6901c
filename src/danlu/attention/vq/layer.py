"""Attention to quantised keys as a layer (Transformer-VQ): softmax attention in linear time with a compressed cache."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from danlu.attention.key_norm import key_norm
from danlu.attention.linear.inputs import check_heads, real_tokens
from danlu.attention.vq.codebook import VQCodebook, look_up
from danlu.attention.vq.engine import vq_attention
from danlu.positions.rotary import Rotary, inverse_frequencies

__all__ = ["VQAttention"]


class VQAttention(nn.Module):
    """Causal softmax attention to keys that are quantised, exactly and in linear time.

    Queries and keys are normalised per head (root mean square 1, no gain), so that codes and keys stay of one size.
    Keys are quantised inside the window too: the layer equals one softmax over all quantised keys.

    Positions enter where tokens are kept one by one, with distances counted in real tokens: by rotation, with all older
    tokens at the distance ``block`` (ReRoPE), or as a learnt bias per head and distance, with none for older tokens.
    Rotating keys to their places before quantisation would turn equal keys into different ones.

    In training the codebooks follow the keys by a moving average, which takes effect at the next forward (see
    :class:`danlu.attention.vq.codebook.VQCodebook`), and ``commitment_loss`` has to be added to the loss with a weight
    of about 1e-4, to hold keys near their codes.

    Args:
        hidden_size: width of the input.
        heads: query heads.
        kv_heads: key-value heads, a divisor of heads, each with its own codebook; default: heads.
        head_dim: size of a head; default hidden_size / heads.
        codes: codes per key-value head.
        block: tokens worked on at once, and least number of tokens before a query whose values are kept one by one.
        position: ``rotary`` (learns faster, and takes over projections that were trained with rotary positions), or
            ``bias`` (no second product of queries and window).
        window: of ``bias``: greatest distance that has one, at most ``block``; default: block.
        rope_base: base of the rotation.
        bias: bias in the projections of queries, keys and values.
        normalise: normalise queries and keys; switch off for the projections of a trained model.
        decay: of the moving average.
        revive_below: replace codes whose count falls below this; 0: never.
        seed: of the first codes.

    Attributes:
        commitment_loss: of the last forward in training mode: mean over real tokens of the sum over heads of
            ``|k - code|^2``; None in evaluation.

    Raises:
        ValueError: a size out of range.

    Source: Scientific Spaces archive 9844; arXiv:2309.16354
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        codes: int = 256,
        block: int = 256,
        position: Literal["rotary", "bias"] = "rotary",
        window: int | None = None,
        rope_base: float = 10000.0,
        bias: bool = False,
        normalise: bool = True,
        decay: float = 0.99,
        revive_below: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = check_heads(hidden_size, heads, kv_heads, head_dim)
        if codes < 1 or block < 1:
            raise ValueError(f"codes and block must be at least 1, got {codes} and {block}")
        window = block if window is None else window
        if not 0 <= window <= block:
            raise ValueError(f"window must be between 0 and block = {block}, got {window}")
        if position not in ("bias", "rotary"):
            raise ValueError(f'position must be "rotary" or "bias", got {position!r}')
        self.block = block
        self.normalise = normalise
        self.q_proj = nn.Linear(hidden_size, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden_size, bias=False)
        biased = position == "bias"
        self.position_bias = nn.Parameter(torch.zeros(self.heads, window + 1)) if biased else None
        self.rotary = None if biased else Rotary(inverse_frequencies(self.head_dim, rope_base))
        self.codebook = VQCodebook(
            self.kv_heads, codes, self.head_dim, decay=decay, revive_below=revive_below, seed=seed
        )
        self.commitment_loss: Tensor | None = None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Bias of positions 0 and the first codes again; projections keep the default initialisation."""
        if self.position_bias is not None:
            self.position_bias.zero_()
        self.codebook.reset_parameters()

    def make_cache(self) -> Any:
        """A fresh cache layer."""
        from danlu.attention.linear.cache import VQCache

        return VQCache()

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        """Mix tokens causally.

        Args:
            x: (batch, length, hidden_size).
            positions: not used: distances count real tokens.
            mask: (batch, past + length) bool, True = real token; None: all.
            cache: from :meth:`make_cache`, or None. Decode with a codebook that stands still (``eval()``).

        Returns:
            Tensor (batch, length, hidden_size).

        Raises:
            ValueError: a mask of four dimensions.
        """
        length = x.shape[1]
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        if self.normalise:
            q, k = key_norm(q), key_norm(k)
        real = real_tokens(mask, length)
        # a recomputation in the backward pass must see the codes of its forward
        learns = self.training and torch._C._current_graph_task_id() == -1
        if learns:
            self.codebook.apply_pending()
        codebook = self.codebook.codebook
        state = None if cache is None else cache.state
        out, codes, state = vq_attention(
            q,
            k,
            v,
            codebook,
            block=self.block,
            bias=self.position_bias,
            rotary=self.rotary,
            mask=real,
            state=state,
        )
        if cache is not None:
            cache.advance(state, length)
        self.commitment_loss = None
        if self.training:
            if learns:
                self.codebook.record(k, codes, real)
            self.commitment_loss = _commitment(k, look_up(codes, codebook), real)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def _commitment(k: Tensor, quantised: Tensor, real: Tensor | None) -> Tensor:
    distance = (k.float() - quantised).square().sum((1, 3))
    if real is None:
        return distance.mean()
    return (distance * real).sum() / real.sum().clamp_min(1)
