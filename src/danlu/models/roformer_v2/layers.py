"""Layers of RoFormerV2: embeddings, attention, feed-forward, and the stack with its residual factor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from danlu.models.roformer_v2.config import RoFormerV2Config
from danlu.models.roformer_v2.norm import rms_normalise
from danlu.positions.rotary import Rotary, inverse_frequencies

__all__ = ["RoFormerV2Embeddings", "RoFormerV2Encoder", "RoFormerV2Layer", "RoFormerV2SelfAttention"]


class RoFormerV2Embeddings(nn.Module):
    """Token plus token type, dropped out (before the norm, as the original does), normalised, projected if need be."""

    def __init__(self, config: RoFormerV2Config) -> None:
        super().__init__()
        width: int = config.embedding_size  # type: ignore[assignment]
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.dropout, self.eps = config.hidden_dropout_prob, config.layer_norm_eps

    def forward(self, input_ids: Tensor | None, token_type_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """(batch, length, embedding_size); token types are 0 unless given."""
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            x = x + self.token_type_embeddings.weight[0]
        else:
            x = x + self.token_type_embeddings(token_type_ids)
        return rms_normalise(F.dropout(x, self.dropout, self.training), self.eps)


def _eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    # at least float32: half precision cannot hold a sum of hundreds of probabilities
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    weights = scores.softmax(-1, dtype=wide).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class RoFormerV2SelfAttention(nn.Module):
    """Softmax attention with queries and keys rotated by pairs (2i, 2i+1); values are not rotated."""

    def __init__(self, config: RoFormerV2Config) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = width // config.num_attention_heads
        self.scaling = self.attention_head_size**-0.5
        self.is_causal = False
        self.dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.rotary = Rotary(inverse_frequencies(self.attention_head_size), layout="interleaved")

    def forward(
        self, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Mixed values (batch, length, hidden) and, from eager attention, the weights."""
        shape = (*x.shape[:-1], self.num_attention_heads, self.attention_head_size)
        q, k, v = (one(x).view(shape).transpose(1, 2) for one in (self.query, self.key, self.value))
        q, k = self.rotary.apply(q, cos, sin), self.rotary.apply(k, cos, sin)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, _eager_attention
        )
        dropout = self.dropout if self.training else 0.0
        mixed, weights = attend(self, q, k, v, mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return mixed.reshape(x.shape), weights


class _Dense(nn.Module):
    """A linear map without bias under the name that checkpoints have for it."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, width_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mapped: Tensor = self.dense(x)
        return mapped


class RoFormerV2Attention(nn.Module):
    """Attention and its output map."""

    def __init__(self, config: RoFormerV2Config) -> None:
        super().__init__()
        self.self = RoFormerV2SelfAttention(config)
        self.output = _Dense(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor, **kwargs: Any) -> Tensor:
        """The branch that is added to the residual stream, (batch, length, hidden)."""
        mixed: Tensor = self.output(self.self(x, mask, cos, sin, **kwargs)[0])
        return mixed


class RoFormerV2Layer(GradientCheckpointingLayer):
    """x <- N(x + alpha attention(x)), x <- N(x + alpha act(x W1) W2)."""

    def __init__(self, config: RoFormerV2Config) -> None:
        super().__init__()
        self.attention = RoFormerV2Attention(config)
        self.intermediate = _Dense(config.hidden_size, config.intermediate_size)
        self.output = _Dense(config.intermediate_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]
        self.dropout, self.eps = config.hidden_dropout_prob, config.layer_norm_eps

    def forward(
        self, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor, alpha: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """One layer; ``alpha`` None is 1."""
        x = self._add(x, self.attention(x, mask, cos, sin, **kwargs), alpha)
        return self._add(x, self.output(self.act(self.intermediate(x))), alpha)

    def _add(self, x: Tensor, branch: Tensor, alpha: Tensor | None) -> Tensor:
        branch = F.dropout(branch, self.dropout, self.training)
        total = x + branch if alpha is None else torch.addcmul(x, branch, alpha.to(x.dtype))
        return rms_normalise(total, self.eps)


class RoFormerV2Encoder(nn.Module):
    """The layers, and the factor alpha of their branches, which is saved with the model and never trained."""

    residual_alpha: Tensor

    def __init__(self, config: RoFormerV2Config) -> None:
        super().__init__()
        self.layer = nn.ModuleList([RoFormerV2Layer(config) for _ in range(config.num_hidden_layers)])
        self.register_buffer("residual_alpha", torch.ones(()))

    def forward(self, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor, **kwargs: Any) -> Tensor:
        """All layers."""
        alpha = self.residual_alpha
        # The usual value costs nothing where it can be read without waiting for a device.
        idle = not torch.compiler.is_compiling() and alpha.device.type == "cpu" and bool(alpha == 1)
        for layer in self.layer:
            x = layer(x, mask, cos, sin, None if idle else alpha, **kwargs)
        return x
