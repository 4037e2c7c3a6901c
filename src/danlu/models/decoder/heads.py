"""A decoder for the host library whose token mixing, residual path and mask are chosen by name.

Importing this module registers it with the host's Auto classes under the model type ``danlu``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers import AutoModelForSequenceClassification as AutoForSequenceClassification
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput
from transformers.utils.generic import can_return_tuple

from danlu.models.decoder.config import DanluConfig
from danlu.models.decoder.model import DanluModel, DanluPreTrainedModel

__all__ = ["DanluConfig", "DanluForCausalLM", "DanluForMaskedLM", "DanluForSequenceClassification", "DanluModel"]


class DanluForCausalLM(DanluPreTrainedModel, GenerationMixin):
    """The decoder with a head, for training and ``generate``.

    Args:
        config: sizes and choices; the mask must be ``causal`` or ``prefix``.

    Raises:
        ValueError: the mask looks ahead.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - as in the host
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: DanluConfig) -> None:
        if config.mask not in ("causal", "prefix"):
            raise ValueError(f"mask must be 'causal' or 'prefix' here, got {config.mask!r}; take DanluForMaskedLM")
        super().__init__(config)
        self.model = DanluModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        prefix_lengths: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, and the loss.

        Args:
            input_ids: as of :class:`DanluModel`, like all that are not named here.
            attention_mask: there.
            position_ids: there.
            past_key_values: there.
            inputs_embeds: there.
            labels: (batch, length), -100 where a token does not count; shifted inside. A prefix that is only input
                has labels of -100.
            use_cache: there.
            logits_to_keep: the last so many positions, or their indices; 0: all.
            prefix_lengths: there; ``generate`` takes the prompt as the prefix unless it is given.
            kwargs: there.

        Returns:
            Loss, logits (batch, length, vocabulary) and cache.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            prefix_lengths=prefix_lengths,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            loss = loss + commitment(self)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """As the host's; with mask ``prefix`` the prompt is the prefix, unless ``prefix_lengths`` says otherwise."""
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if self.config.mask == "prefix" and kwargs.get("prefix_lengths") is None and ids is not None:
            mask = kwargs.get("attention_mask")
            kwargs["prefix_lengths"] = ids.new_full((len(ids),), ids.shape[1]) if mask is None else mask.long().sum(-1)
        return super().generate(inputs, **kwargs)


class DanluForMaskedLM(DanluPreTrainedModel):
    """The stack with any mask and a head that predicts the token at its own place.

    Args:
        config: sizes and choices.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - as in the host

    def __init__(self, config: DanluConfig) -> None:
        super().__init__(config)
        self.model = DanluModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any) -> MaskedLMOutput:
        """Logits (batch, length, vocabulary), and the loss over ``labels`` (batch, length; -100: does not count)."""
        output = self.model(input_ids=input_ids, use_cache=False, **kwargs)
        logits = self.lm_head(output.last_hidden_state)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten()) + commitment(self)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )


class DanluForSequenceClassification(GenericForSequenceClassification, DanluPreTrainedModel):
    """The stack with one score per class, read at the last real token."""


def commitment(model: Any) -> Tensor | float:
    """Weighted commitment loss of the codebooks of the last training call; 0 in evaluation or without codebooks."""
    if not model.training:
        return 0.0
    losses = [getattr(layer.self_attn, "commitment_loss", None) for layer in model.model.layers]
    return model.config.commitment * sum(loss for loss in losses if loss is not None)


AutoConfig.register(DanluConfig.model_type, DanluConfig)
AutoModel.register(DanluConfig, DanluModel)
AutoModelForCausalLM.register(DanluConfig, DanluForCausalLM)
AutoModelForMaskedLM.register(DanluConfig, DanluForMaskedLM)
AutoForSequenceClassification.register(DanluConfig, DanluForSequenceClassification)
