"""The stack of the decoder without a head: embedding, layers, masks and caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from danlu.models.decoder.attention import DanluAttention
from danlu.models.decoder.config import UNPACKED, DanluConfig
from danlu.models.decoder.layer import DanluLayer
from danlu.models.decoder.masks import layer_masks, mask_name
from danlu.models.decoder.mixers import fit_cache, keeps_own_state


class DanluPreTrainedModel(PreTrainedModel):
    """Initialisation, and what the host asks of every model."""

    config_class = DanluConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("DanluLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # half precision cannot hold 1 - |lambda| of a recurrence, nor the counts of a codebook
    _keep_in_fp32_modules_strict = ("nu_log", "theta_log", "gamma_log", "codebook")
    _can_record_outputs = {"hidden_states": DanluLayer, "attentions": DanluAttention}  # noqa: RUF012 - as in the host

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if hasattr(module, "reset_parameters") and type(module).__module__.startswith("danlu."):
            # what a checkpoint has filled stays
            tensors = (*module.parameters(), *module.buffers())
            loaded = [(t, t.clone()) for t in tensors if getattr(t, "_is_hf_initialized", False)]
            module.reset_parameters()
            for tensor, value in loaded:
                tensor.copy_(value)
        gain: Any = getattr(module, "deepnorm_gain", None)
        if isinstance(module, nn.Linear) and gain is not None:
            init.normal_(module.weight, std=gain * (2 / sum(module.weight.shape)) ** 0.5)


class DanluModel(DanluPreTrainedModel):
    """The stack without a head.

    Args:
        config: sizes and choices.
    """

    def __init__(self, config: DanluConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DanluLayer(config, i) for i in range(config.num_hidden_layers))
        normed = config.residual in ("post", "deepnorm")
        self.norm = nn.Identity() if normed else nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        prefix_lengths: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the stack.

        Args:
            input_ids: (batch, length).
            attention_mask: (batch, past + length), 1 for real tokens; padding on either side.
            position_ids: (batch, length); None: counted from the first real token of each row.
            past_key_values: a host cache; layers that keep a state of their own put it in.
            inputs_embeds: (batch, length, hidden), in place of ``input_ids``.
            use_cache: return a cache; None: as the configuration says, not in training.
            prefix_lengths: (batch,) real tokens at the start of each row that see each other, for mask ``prefix``.
            kwargs: passed on to the attention function.

        Returns:
            The last hidden states, and the cache.

        Raises:
            ValueError: not exactly one of ids and embeddings; a cache with a mask that looks ahead; prefix lengths
                missing, or past what is in the call; packed rows with a mixer that cannot tell them apart.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x: Any = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mixers: list[Any] = [layer.self_attn for layer in self.layers]
        looks_ahead = self.config.mask not in ("causal", "prefix")
        if looks_ahead and past_key_values is not None:
            raise ValueError(f"past_key_values cannot be used with mask {self.config.mask!r}: later tokens are seen")
        if use_cache and past_key_values is None and not looks_ahead:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            fit_cache(past_key_values, mixers)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        packed = attention_mask is None and not past and position_ids is not None
        if position_ids is None:
            position_ids = _positions(x, attention_mask, past)
        mixing = [kind for kind in dict.fromkeys(self.config.mixers) if kind in UNPACKED]
        if packed and mixing and bool((position_ids.diff(dim=-1) < 1).any()):
            raise ValueError(
                f"position_ids pack several texts into a row, which {', '.join(mixing)} would mix; pad them"
            )
        masks = layer_masks(self.config, x, attention_mask, position_ids, past_key_values, past, prefix_lengths)
        rotary = self.rotary_emb(x, position_ids)
        for i, (layer, mixer) in enumerate(zip(self.layers, mixers, strict=True)):
            options: dict[str, Any] = {"past_key_values": past_key_values, "position_embeddings": rotary, **kwargs}
            if keeps_own_state(mixer):
                options = {"cache_layer": None if past_key_values is None else past_key_values.layers[i]}
            mask = masks[mask_name(self.config, i)]
            x = layer(x, attention_mask=mask, position_ids=position_ids, **options)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)


def _positions(x: Tensor, mask: Any, past: int) -> Tensor:
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -x.shape[1] :]
    return (torch.arange(x.shape[1], device=x.device) + past)[None]
