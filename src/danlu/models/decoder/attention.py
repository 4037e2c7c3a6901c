"""Softmax attention over whole keys for the decoder: full, grouped, windowed, or without positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from danlu.attention.key_norm import key_norm
from danlu.attention.scale import log_n_factor, optimal_scale
from danlu.models.decoder.config import DanluConfig


class DanluAttention(nn.Module):
    """Attention with the parameter names of Llama, through the host's attention functions.

    Args:
        config: sizes and choices.
        layer_idx: which layer.
    """

    def __init__(self, config: DanluConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.kind = config.mixers[layer_idx]
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = logit_scale(config, config.head_dim)
        self.attention_dropout = config.attention_dropout
        self.sliding_window = config.sliding_window if self.kind == "window" else None
        self.is_causal = config.mask in ("causal", "prefix")
        hidden, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        groups = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, inner, bias=config.attention_bias)
        self.k_proj = nn.Linear(hidden, groups, bias=config.attention_bias)
        self.v_proj = nn.Linear(hidden, groups, bias=config.attention_bias)
        self.o_proj = nn.Linear(inner, hidden, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any,
        position_ids: Tensor,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix tokens.

        Args:
            hidden_states: (batch, length, hidden).
            position_embeddings: cosines and sines of the host's rotary module.
            attention_mask: what the host's mask functions made; a pair (causal, anti-causal) for ``mixed_heads``.
            position_ids: (batch or 1, length).
            past_key_values: the host's cache.
            kwargs: passed on to the attention function.

        Returns:
            Output (batch, length, hidden) and the probabilities, where the attention function gives them.
        """
        shape = hidden_states.shape[:-1]
        q, k, v = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.key_norm:
            k = key_norm(k, self.config.rms_norm_eps)
        if self.kind != "nope":
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if self.config.log_n is not None:
            factor = log_n_factor(position_ids, self.config.log_n, clip=False, window=self.sliding_window)
            q = (q * factor[:, None, :, None]).to(q.dtype)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        kwargs["position_ids"] = position_ids
        if not isinstance(attention_mask, tuple):
            out, weights = self._attend(q, k, v, attention_mask, **kwargs)
        else:  # one half of the heads looks back and the other ahead
            parts = zip(q.chunk(2, 1), k.chunk(2, 1), v.chunk(2, 1), attention_mask, strict=True)
            outs, both = zip(*(self._attend(*part, **kwargs) for part in parts), strict=True)
            out, weights = torch.cat(outs, 2), None if both[0] is None else torch.cat(both, 1)
        return self.o_proj(out.reshape(*shape, -1)), weights

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        return function(
            self, q, k, v, mask, dropout=dropout, scaling=self.scaling, sliding_window=self.sliding_window, **kwargs
        )


def logit_scale(config: DanluConfig, head_dim: int) -> float:
    """Factor of the scores q.k that a configuration asks for, with heads of this size."""
    if config.attention_scale is None:
        return float(head_dim**-0.5)
    if config.attention_scale == "optimal":
        # a causal row i has i + 1 keys; half of the training length stands for all rows
        keys = max(2, config.max_position_embeddings // 2)
        return float(optimal_scale(keys)) * float(head_dim**-0.5)
    return float(config.attention_scale)
