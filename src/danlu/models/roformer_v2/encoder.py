"""The RoFormerV2 encoder as a model of the host library, without a head."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as host_init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from danlu.models.roformer_v2.config import RoFormerV2Config
from danlu.models.roformer_v2.initialise import initial_std
from danlu.models.roformer_v2.layers import (
    RoFormerV2Embeddings,
    RoFormerV2Encoder,
    RoFormerV2Layer,
    RoFormerV2SelfAttention,
)
from danlu.positions.rotary import Rotary, inverse_frequencies

__all__ = ["RoFormerV2Model", "RoFormerV2PreTrainedModel"]

logger = logging.getLogger("danlu.models")

#: Parameters that RoFormer (V1) has and RoFormerV2 has not.
_V1 = re.compile(r"LayerNorm|(encoder|embeddings|embeddings_project)\b.*\.bias$|cls\.predictions\.(bias|transform)")


class RoFormerV2PreTrainedModel(PreTrainedModel):
    """What all RoFormerV2 models share: initial weights, loading, the residual factor."""

    config_class = RoFormerV2Config
    base_model_prefix = "roformer"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["RoFormerV2Layer", "RoFormerV2Embeddings"]  # noqa: RUF012 - the host reads a class attribute
    _can_record_outputs = {"hidden_states": RoFormerV2Layer, "attentions": RoFormerV2SelfAttention}  # noqa: RUF012
    _keys_to_ignore_on_load_missing = [r"encoder\.residual_alpha"]  # noqa: RUF012 - published checkpoints have none
    _keys_to_ignore_on_load_unexpected = [r"encoder\.embed_positions\.weight"]  # noqa: RUF012 - the table sin | cos

    @property
    def residual_alpha(self) -> float:
        """The factor of both branches of every layer, 0..1; 1 in a finished model."""
        return float(self.base_model.encoder.residual_alpha)

    @residual_alpha.setter
    def residual_alpha(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise ValueError(f"residual_alpha must be in 0..1, got {value}")
        self.base_model.encoder.residual_alpha.fill_(value)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a checkpoint saved by this class, or one of the published PyTorch checkpoints.

        Args:
            args: as in the host library.
            output_loading_info: return the host's report of the loading too.
            kwargs: as in the host library.

        Returns:
            The model in evaluation mode.

        Raises:
            ValueError: the checkpoint has biases or LayerNorm weights, so it is RoFormer (V1); the message lists them.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if foreign := sorted(key for key in info["unexpected_keys"] if _V1.search(key)):
            raise ValueError(
                f"the checkpoint must have no biases and no LayerNorm weights, got {len(foreign)} of them "
                f"({', '.join(foreign[:6])}{', ...' if len(foreign) > 6 else ''}): this is a RoFormer (V1) model, "
                "load it with transformers.RoFormerModel"
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save as in the host library; logs a warning when the residual warm-up is not over."""
        if self.residual_alpha < 1:
            logger.warning(
                "saving a model with residual_alpha = %.4g: its warm-up is not over, and other RoFormerV2 code takes 1",
                self.residual_alpha,
            )
        return super().save_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            # both tables and maps keep what is summed over, or what a row holds, in the last axis
            std = initial_std(module.weight.shape[-1], self.config.num_hidden_layers)
            host_init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            if getattr(module, "bias", None) is not None:
                host_init.zeros_(module.bias)
        elif isinstance(module, RoFormerV2Encoder):
            host_init.ones_(module.residual_alpha)


class RoFormerV2Model(RoFormerV2PreTrainedModel):
    """RoFormerV2 without a head: hidden states of a bias-free, post-norm encoder with rotary positions.

    Importing it registers all RoFormerV2 classes with the host library's Auto classes.

    Args:
        config: sizes.

    Source: Scientific Spaces archive 8998
    """

    def __init__(self, config: RoFormerV2Config) -> None:
        super().__init__(config)
        self.embeddings = RoFormerV2Embeddings(config)
        if config.embedding_size != config.hidden_size:
            self.embeddings_project = nn.Linear(config.embedding_size, config.hidden_size, bias=False)  # type: ignore[arg-type]
        self.encoder = RoFormerV2Encoder(config)
        self.rotary = Rotary(inverse_frequencies(config.hidden_size // config.num_attention_heads))
        self._angles: tuple[Tensor, Tensor] | None = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token table."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token table."""
        self.embeddings.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Encode a batch.

        Args:
            input_ids: (batch, length) int64.
            attention_mask: (batch, length), 1 for tokens and 0 for padding on either side.
            token_type_ids: (batch, length); default 0 everywhere, pairs included, as the models were trained.
            position_ids: (length,) or (batch, length); default 0, 1, ... Only differences matter.
            inputs_embeds: (batch, length, embedding_size) in place of ``input_ids``.
            kwargs: ``output_hidden_states``, ``output_attentions``, ``return_dict`` and the attention function's own.

        Returns:
            ``last_hidden_state`` (batch, length, hidden), every row of mean square 1.

        Raises:
            ValueError: not exactly one of ``input_ids`` and ``inputs_embeds``.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        x = self.embeddings(input_ids, token_type_ids, inputs_embeds)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask)
        if self.config.embedding_size != self.config.hidden_size:
            x = self.embeddings_project(x)
        cos, sin = self._rotation(x, position_ids)
        return BaseModelOutput(last_hidden_state=self.encoder(x, mask, cos, sin, **kwargs))

    def _rotation(self, x: Tensor, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines for the batch, kept between calls where positions are 0, 1, ..."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        if position_ids is not None:
            return self.rotary.angles(position_ids, x.device, wide)
        length = x.shape[1]
        kept = self._angles
        if torch.compiler.is_compiling():
            return self.rotary.angles(torch.arange(length, device=x.device), x.device, wide)
        if kept is None or len(kept[0]) < length or (kept[0].device, kept[0].dtype) != (x.device, wide):
            rows = max(length, self.config.max_position_embeddings)
            kept = self._angles = self.rotary.angles(torch.arange(rows, device=x.device), x.device, wide)
        return kept[0][:length], kept[1][:length]
