"""One layer of the decoder: a token mixer and a feed-forward on their residual paths, and how they start."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP

from danlu.models.decoder.attention import DanluAttention
from danlu.models.decoder.config import DanluConfig
from danlu.models.decoder.mixers import build_mixer
from danlu.models.residual import deepnorm_constants, scaled_residual


class DanluLayer(GradientCheckpointingLayer):
    """One layer: a token mixer and a gated feed-forward, each on a residual path."""

    def __init__(self, config: DanluConfig, layer_idx: int) -> None:
        super().__init__()
        self.residual = config.residual
        self.alpha = _deepnorm(config)[0]
        self.self_attn = build_mixer(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.residual == "deepnorm":
            _set_gains(self, _deepnorm(config)[1])

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Map (batch, length, hidden) to the same shape; ``kwargs`` are those of the mixer."""
        hidden_states = self._sublayer(hidden_states, self.input_layernorm, lambda x: self._mix(x, **kwargs))
        return self._sublayer(hidden_states, self.post_attention_layernorm, self.mlp)

    def _sublayer(self, x: Tensor, norm: Any, branch: Any) -> Tensor:
        if self.residual == "pre":
            return x + branch(norm(x))
        if self.residual == "none":
            return branch(norm(x))
        return norm(scaled_residual(x, branch(x), self.alpha))

    def _mix(self, x: Tensor, **kwargs: Any) -> Tensor:
        mixer: Any = self.self_attn
        if isinstance(mixer, DanluAttention):
            return mixer(x, **kwargs)[0]
        return mixer(x, kwargs["position_ids"], kwargs["attention_mask"], kwargs["cache_layer"])


def _deepnorm(config: DanluConfig) -> tuple[float, float]:
    if config.residual != "deepnorm":
        return 1.0, 1.0
    recipe: Any = config.deepnorm_recipe
    constants: Any = deepnorm_constants(n_decoder=config.num_hidden_layers, optimizer=recipe)
    return constants.decoder_alpha, constants.decoder_beta


def _set_gains(layer: DanluLayer, gain: float) -> None:
    """Tell the matrices of a layer their initial gain: the host initialises matrices one by one."""
    attention: Any = layer.self_attn
    scaled = [getattr(attention, name, None) for name in ("v_proj", "o_proj")]
    for part in (*scaled, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
        if isinstance(part, nn.Linear):
            part.deepnorm_gain = gain  # type: ignore[assignment]
    for part in (getattr(attention, name, None) for name in ("q_proj", "k_proj")):
        if isinstance(part, nn.Linear):
            part.deepnorm_gain = 1.0  # type: ignore[assignment]
