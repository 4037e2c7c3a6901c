"""RoFormerV2 with task heads, registered with the host library's Auto classes."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import (
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from danlu.models.roformer_v2.config import RoFormerV2Config
from danlu.models.roformer_v2.encoder import RoFormerV2Model, RoFormerV2PreTrainedModel

__all__ = [
    "RoFormerV2Config",
    "RoFormerV2ForMaskedLM",
    "RoFormerV2ForMultipleChoice",
    "RoFormerV2ForQuestionAnswering",
    "RoFormerV2ForSequenceClassification",
    "RoFormerV2ForTokenClassification",
    "RoFormerV2Model",
    "RoFormerV2PreTrainedModel",
]


class _Predictions(nn.Module):
    """The output map of the masked language model, under the published name."""

    def __init__(self, config: RoFormerV2Config) -> None:
        super().__init__()
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class _MaskedHead(nn.Module):
    def __init__(self, config: RoFormerV2Config) -> None:
        super().__init__()
        self.predictions = _Predictions(config)


class RoFormerV2ForMaskedLM(RoFormerV2PreTrainedModel):
    """RoFormerV2 with logits ``hidden @ table^T``: no transform before them and no bias.

    Args:
        config: sizes; ``embedding_size`` must be ``hidden_size`` where the table is tied.

    Raises:
        ValueError: a tied table of another width.

    Source: Scientific Spaces archive 8998
    """

    _tied_weights_keys = {"cls.predictions.decoder.weight": "roformer.embeddings.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: RoFormerV2Config) -> None:
        super().__init__(config)
        if config.tie_word_embeddings and config.embedding_size != config.hidden_size:
            raise ValueError(
                "embedding_size must be hidden_size for logits from the token table, got "
                f"{config.embedding_size} and {config.hidden_size}; or set tie_word_embeddings=False"
            )
        self.roformer = RoFormerV2Model(config)
        self.cls = _MaskedHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The output map."""
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the output map."""
        self.cls.predictions.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Predict tokens.

        Args:
            input_ids: as all inputs here, see :class:`RoFormerV2Model`.
            attention_mask: as there.
            token_type_ids: as there.
            position_ids: as there.
            inputs_embeds: as there.
            labels: (batch, length) int64, -100 where a token does not count.
            num_items_in_batch: what the summed loss is divided by; None: the tokens that count.
            kwargs: as there.

        Returns:
            ``logits`` (batch, length, vocab_size), and ``loss`` where labels are given.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        outputs = self.roformer(*inputs, return_dict=True, **kwargs)
        logits = self.cls.predictions.decoder(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        return MaskedLMOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class _WithHead(RoFormerV2PreTrainedModel):
    """The encoder and one linear map, with a bias, after a dropout."""

    head_name = "classifier"
    outputs: int | None = None

    def __init__(self, config: RoFormerV2Config) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.roformer = RoFormerV2Model(config)
        setattr(self, self.head_name, nn.Linear(config.hidden_size, self.outputs or config.num_labels))
        self.post_init()

    def _head(self, hidden: Tensor) -> Tensor:
        dropout = self.config.classifier_dropout
        dropout = self.config.hidden_dropout_prob if dropout is None else dropout
        logits: Tensor = getattr(self, self.head_name)(F.dropout(hidden, dropout, self.training))
        return logits


class RoFormerV2ForSequenceClassification(_WithHead):
    """RoFormerV2 with a classifier or regressor on the first token's state; there is no pooler.

    Args:
        config: sizes; ``num_labels`` and ``problem_type`` as in the host library.
    """

    accepts_loss_kwargs = False

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Classify texts or pairs; ``labels`` (batch,) int64, or floats for regression and several labels per text."""
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        outputs = self.roformer(*inputs, return_dict=True, **kwargs)
        logits = self._head(outputs.last_hidden_state[:, 0])
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class RoFormerV2ForTokenClassification(_WithHead):
    """RoFormerV2 with a classifier on every token.

    Args:
        config: sizes; ``num_labels`` as in the host library.
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Classify tokens; ``labels`` (batch, length) int64, -100 where a token does not count."""
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        outputs = self.roformer(*inputs, return_dict=True, **kwargs)
        logits = self._head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=num_items_in_batch)
        return TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class RoFormerV2ForQuestionAnswering(_WithHead):
    """RoFormerV2 with logits for the first and the last token of an answer.

    Args:
        config: sizes.
    """

    accepts_loss_kwargs = False
    head_name = "qa_outputs"
    outputs = 2

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Find answers; ``start_positions`` and ``end_positions`` (batch,) int64, beyond the length for no answer."""
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        outputs = self.roformer(*inputs, return_dict=True, **kwargs)
        start, end = self._head(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start, end, start_positions, end_positions)
        return QuestionAnsweringModelOutput(loss, start, end, outputs.hidden_states, outputs.attentions)


class RoFormerV2ForMultipleChoice(_WithHead):
    """RoFormerV2 with one logit per choice, from the first token's state.

    Args:
        config: sizes.
    """

    accepts_loss_kwargs = False
    outputs = 1

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput:
        """Choose; inputs (batch, choices, length), ``labels`` (batch,) int64."""
        given = (input_ids, attention_mask, token_type_ids, position_ids)
        flat = [None if one is None else one.flatten(0, 1) for one in (*given, inputs_embeds)]
        choices = (inputs_embeds if input_ids is None else input_ids).shape[1]  # type: ignore[union-attr]
        outputs = self.roformer(*flat, return_dict=True, **kwargs)
        logits = self._head(outputs.last_hidden_state[:, 0]).view(-1, choices)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return MultipleChoiceModelOutput(loss, logits, outputs.hidden_states, outputs.attentions)


def _register() -> None:
    heads = {
        "AutoModel": RoFormerV2Model,
        "AutoModelForMaskedLM": RoFormerV2ForMaskedLM,
        "AutoModelForSequenceClassification": RoFormerV2ForSequenceClassification,
        "AutoModelForTokenClassification": RoFormerV2ForTokenClassification,
        "AutoModelForQuestionAnswering": RoFormerV2ForQuestionAnswering,
        "AutoModelForMultipleChoice": RoFormerV2ForMultipleChoice,
    }
    transformers.AutoConfig.register(RoFormerV2Config.model_type, RoFormerV2Config, exist_ok=True)
    for auto, model in heads.items():
        getattr(transformers, auto).register(RoFormerV2Config, model, exist_ok=True)
    transformers.AutoTokenizer.register(RoFormerV2Config, transformers.BertTokenizer, exist_ok=True)


_register()
