"""Configuration of a decoder over text and continuous patches."""

from __future__ import annotations

import math
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from danlu.models.continuous.objective import OBJECTIVES, Objective

__all__ = ["ContinuousConfig"]


class ContinuousConfig(PreTrainedConfig):
    """A backbone's configuration, and what turns it into a model of continuous tokens.

    Args:
        backbone_config: of any decoder of the host library that takes ``inputs_embeds``.
        text: the backbone has an output head, and sequences may hold text; without it they hold patches only.
        token_dim: dimensions of a patch, >= 1.
        token_mean: what is subtracted from patches, one number or token_dim numbers.
        token_std: what they are divided by then, likewise, > 0; see ``danlu.models.continuous.token_statistics``.
        patch_token_id: the id that marks the place of a patch in ``input_ids``; needed with ``text``.
        num_classes: classes that a sequence of patches alone can be conditioned on, >= 0.
        condition_dropout: share of training sequences whose class is withheld, in 0..1; above 0 for guidance.
        num_places: places of patches that have embeddings, for orders that differ between sequences; 0: none.
        head_width: of the diffusion head.
        head_depth: of the diffusion head.
        objective: ``flow`` or ``epsilon``, see :class:`DiffusionHead`.
        mul: draws of noise for each patch and backbone pass in training.
        patch_loss_weight: of the diffusion loss beside the cross entropy.
        input_noise: standard deviation of the noise on input patches in training, against exposure bias; 0.05 to 0.1 if
            any.
        initializer_range: standard deviation of the embeddings' first weights.

    Raises:
        ValueError: values out of range or that do not fit together.

    Source: Scientific Spaces archive 10197
    """

    model_type = "danlu_continuous"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012 - the host reads an attribute of the class
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - the host adds lists to it

    def __init__(
        self,
        backbone_config: PreTrainedConfig | dict[str, Any] | None = None,
        text: bool = False,
        token_dim: int = 16,
        token_mean: float | list[float] = 0.0,
        token_std: float | list[float] = 1.0,
        patch_token_id: int | None = None,
        num_classes: int = 0,
        condition_dropout: float = 0.1,
        num_places: int = 0,
        head_width: int = 1024,
        head_depth: int = 3,
        objective: Objective = "flow",
        mul: int = 4,
        patch_loss_weight: float = 1.0,
        input_noise: float = 0.0,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        if isinstance(backbone_config, dict):
            values = dict(backbone_config)
            backbone_config = AutoConfig.for_model(values.pop("model_type", "llama"), **values)
        # The host makes a configuration without arguments to find out what differs from the defaults.
        self.backbone_config: Any = AutoConfig.for_model("llama") if backbone_config is None else backbone_config
        self.text = text
        self.token_dim = token_dim
        self.token_mean = _numbers(token_mean)
        self.token_std = _numbers(token_std)
        self.patch_token_id = patch_token_id
        self.num_classes = num_classes
        self.condition_dropout = condition_dropout
        self.num_places = num_places
        self.head_width = head_width
        self.head_depth = head_depth
        self.objective = objective
        self.mul = mul
        self.patch_loss_weight = patch_loss_weight
        self.input_noise = input_noise
        self.initializer_range = initializer_range
        _check(self)
        kwargs.setdefault("tie_word_embeddings", False)
        # The host would otherwise reset the attention of a backbone that exists already.
        own = getattr(self.backbone_config, "_attn_implementation", None)
        kwargs.setdefault("attn_implementation", {"backbone_config": own})
        super().__init__(**kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """The backbone's configuration: what the host sizes caches and vocabularies by."""
        return self.backbone_config.get_text_config(decoder=decoder, encoder=encoder)


def _numbers(value: float | list[float]) -> list[float]:
    return [float(value)] if isinstance(value, int | float) else [float(each) for each in value]


def _check(config: ContinuousConfig) -> None:
    for name, least in (
        ("token_dim", 1), ("num_classes", 0), ("num_places", 0), ("head_width", 1), ("head_depth", 1), ("mul", 1),
    ):  # fmt: skip
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}")
    for name in ("token_mean", "token_std"):
        if len(getattr(config, name)) not in (1, config.token_dim):
            raise ValueError(f"{name} must be 1 or {config.token_dim} numbers, got {len(getattr(config, name))}")
    if not all(0 < std < math.inf for std in config.token_std):
        raise ValueError(f"token_std must be above 0, got {min(config.token_std)}")
    if config.objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {config.objective!r}")
    if not 0 <= config.condition_dropout <= 1:
        raise ValueError(f"condition_dropout must be in 0..1, got {config.condition_dropout}")
    for name in ("patch_loss_weight", "input_noise"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be at least 0, got {getattr(config, name)}")
    if config.text:
        vocabulary = config.backbone_config.get_text_config().vocab_size
        if config.patch_token_id is None or not 0 <= config.patch_token_id < vocabulary:
            raise ValueError(
                f"patch_token_id must be an id in 0..{vocabulary - 1} that no text uses, got {config.patch_token_id}: "
                "add a special token such as <patch> to the tokenizer and resize the backbone's embeddings"
            )
