"""Configuration of RoFormerV2 encoders, and the reading of the published ones."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

__all__ = ["RoFormerV2Config"]

#: What the published configurations say beside the sizes, and the only values that are RoFormerV2.
_PUBLISHED = {"norm_type": "rms_norm", "use_bias": False, "rotary_value": False}
#: Of the host's V1 class and of its decoders; without meaning here.
_DROPPED = ("gradient_checkpointing", "use_cache", "is_decoder", "add_cross_attention", "initializer_range")


class RoFormerV2Config(PreTrainedConfig):
    """Sizes of a RoFormerV2 encoder; the defaults are those of the published base model.

    Args:
        vocab_size: rows of the token table.
        embedding_size: width of the embeddings; None is ``hidden_size``.
        hidden_size: width, a multiple of ``num_attention_heads`` with an even quotient.
        num_hidden_layers: layers, each attention and feed-forward.
        num_attention_heads: heads.
        intermediate_size: width of the feed-forward layers.
        hidden_act: their activation, a name of the host library.
        hidden_dropout_prob: dropout of the embeddings and of both branches of a layer.
        attention_probs_dropout_prob: dropout of attention weights.
        max_position_embeddings: trained length; nothing in the weights limits it.
        type_vocab_size: rows of the token type table.
        layer_norm_eps: added to the mean square in every norm. The published PyTorch checkpoints say 1e-12, the
            original code 1e-7; they differ by a few hundredths of a percent after the embeddings and nowhere else.
        pad_token_id: token that fills up short rows.
        classifier_dropout: before task heads; None is ``hidden_dropout_prob``.
        tie_word_embeddings: masked-language-model logits come from the token table.

    Raises:
        ValueError: sizes that do not fit together.

    Source: Scientific Spaces archive 8998
    """

    model_type = "roformer_v2"

    vocab_size: int = 12000
    embedding_size: int | None = None
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "relu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        if self.num_attention_heads < 1 or self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                "hidden_size must be a multiple of twice num_attention_heads, since rotation pairs the dims of a head, "
                f"got {self.hidden_size} and {self.num_attention_heads}"
            )
        if not self.layer_norm_eps > 0:
            raise ValueError(f"layer_norm_eps must be > 0, got {self.layer_norm_eps}; 1e-12 is usual")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a configuration; one that says ``"model_type": "roformer"`` must say ``"norm_type": "rms_norm"`` too.

        Raises:
            ValueError: a configuration of RoFormer (V1), or of another model.
        """
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            config_dict = _from_published(config_dict, kind)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """The file's content, renamed where it is a published one, before the host compares model types."""
        found, unused = super().get_config_dict(*args, **kwargs)
        kind = found.get("model_type", cls.model_type)
        return (found if kind == cls.model_type else _from_published(found, kind)), unused


def _from_published(config: dict[str, Any], kind: str) -> dict[str, Any]:
    if kind != "roformer":
        raise ValueError(f'model_type must be "roformer_v2", or "roformer" as published, got {kind!r}')
    defaults = {"norm_type": None, "use_bias": False, "rotary_value": False}
    for name, wanted in _PUBLISHED.items():
        if (got := config.get(name, defaults[name])) != wanted:
            raise ValueError(
                f"{name} must be {wanted!r} in a RoFormerV2 configuration, got {got!r}: this is a RoFormer (V1) model, "
                "load it with transformers.RoFormerModel"
            )
    kept = {name: value for name, value in config.items() if name not in (*_PUBLISHED, *_DROPPED)}
    return kept | {"model_type": RoFormerV2Config.model_type}
