"""A host decoder over text and continuous patches: embeddings, losses, checkpoints.

Importing this module registers it with the host's Auto classes under the model type ``danlu_continuous``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput, can_return_tuple

from danlu.models.continuous.config import ContinuousConfig
from danlu.models.continuous.generation import PatchGeneration
from danlu.models.continuous.head import DiffusionHead

__all__ = ["ContinuousCausalLM", "ContinuousOutput"]


@dataclass
class ContinuousOutput(ModelOutput):
    """What a forward pass returns.

    Args:
        loss: cross entropy of the labelled text plus the weighted patch loss; what there is of the two.
        logits: (batch, length, vocabulary) where there is text.
        past_key_values: the backbone's cache, if asked for.
        text_loss: the cross entropy alone.
        patch_loss: the diffusion loss alone, unweighted.
        conditions: z (patches, hidden) or (batch, patches, hidden): the backbone's output in front of each patch.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    text_loss: Tensor | None = None
    patch_loss: Tensor | None = None
    conditions: Tensor | None = None


class ContinuousCausalLM(PatchGeneration, PreTrainedModel, GenerationMixin):
    """A causal Transformer over clean patches (and text), whose output conditions a diffusion head for the next patch.

    The condition of a patch is the backbone's output at the position before it, so that it depends on the class or text
    and on earlier patches only. Text is learned by cross entropy as ever.

    Args:
        config: sizes and choices.
        backbone: the decoder, if it exists already; else it is built from ``config.backbone_config``.

    Source: Scientific Spaces archive 10197 (Mode II); arXiv:2406.11838
    """

    config_class = ContinuousConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    #: The loss is a mean over this call's patches: the host's trainer has to divide it over accumulation steps.
    accepts_loss_kwargs = False
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ("diffusion_head",)

    def __init__(self, config: ContinuousConfig, backbone: Any = None) -> None:
        super().__init__(config)
        if backbone is None:
            auto = AutoModelForCausalLM if config.text else AutoModel
            backbone = auto.from_config(config.backbone_config)
        else:
            for module in backbone.modules():
                module._is_hf_initialized = True  # what the caller hands in keeps its weights
        self.backbone = backbone
        width = config.backbone_config.get_text_config().hidden_size
        self.patch_embedding = nn.Linear(config.token_dim, width)
        self.start_embedding = None if config.text and not config.num_classes else nn.Embedding(
            config.num_classes + 1, width
        )  # fmt: skip
        self.place_embedding = nn.Embedding(config.num_places, width) if config.num_places else None
        self.target_embedding = nn.Embedding(config.num_places, width) if config.num_places else None
        self.diffusion_head = DiffusionHead(
            config.token_dim, width, config.head_width, config.head_depth, config.objective
        )
        if not config.text:
            # Without text the backbone's table is not used, and a parameter without gradient stops DDP.
            backbone.get_input_embeddings().requires_grad_(False)
        self.post_init()

    @classmethod
    def from_backbone(cls, backbone: Any, **options: Any) -> ContinuousCausalLM:
        """Build around a decoder that exists, with its weights.

        Args:
            backbone: a causal language model of the host library, for text and patches, or a decoder without output
                head (``AutoModel``), for patches alone.
            options: fields of :class:`ContinuousConfig` but ``backbone_config`` and ``text``.

        Returns:
            The model; the backbone is part of it, not copied.

        Raises:
            ValueError: an option out of range, or an encoder-decoder.
        """
        if backbone.config.is_encoder_decoder:
            raise ValueError(f"backbone must be a decoder, got the encoder-decoder {type(backbone).__name__}")
        text = backbone.get_output_embeddings() is not None
        return cls(ContinuousConfig(backbone.config, text, **options), backbone).to(device=backbone.device)

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        if hasattr(module, "initial"):  # a part of the head, which knows how it starts
            module.initial(module)
        elif isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)

    def get_input_embeddings(self) -> Any:
        """The backbone's token table."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the backbone's token table."""
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        """The backbone's output head, None without text."""
        return self.backbone.get_output_embeddings() if self.config.text else None

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the backbone's output head."""
        self.backbone.set_output_embeddings(new_embeddings)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Inputs of one step of the host's ``generate``: patches of the prompt are read in the first alone."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if not kwargs.get("is_first_iteration"):
            inputs.pop("patches", None)
            inputs.pop("order", None)
        return inputs

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        patches: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        classes: Tensor | None = None,
        order: Tensor | None = None,
        patch_mask: Tensor | None = None,
        use_cache: bool | None = None,
        return_loss: bool = True,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> ContinuousOutput:
        """Read patches, or text and patches, and compare the predictions.

        Args:
            input_ids: (batch, length) text, with ``config.patch_token_id`` in the place of every patch; None: every
                sequence is a class and patches.
            patches: (batch, patches, token_dim), in their own scale; beside text also (patches of all rows, token_dim).
            attention_mask: (batch, past + length), 1 for real tokens.
            position_ids: (batch, length); None: counted from the first real token.
            past_key_values: the backbone's cache; no losses with one.
            labels: (batch, length) int64 text to be learned, -100 elsewhere; shifted here.
            classes: (batch,) classes, -1 for none; None: none. Not beside text.
            order: (patches,) or of the leading shape of ``patches``: the place in the image of each patch, for models
                with ``num_places``. None: 0, 1, 2, ...
            patch_mask: of the leading shape of ``patches``, True for those to be learned; None: all.
            use_cache: return a cache.
            return_loss: compute the loss of the patches.
            generator: of noise, times and withheld classes in training; None: torch's default one, as for dropout.
            kwargs: passed on to the backbone.

        Returns:
            Losses, and logits where there is text.

        Raises:
            ValueError: inputs that do not fit together or this configuration.
        """
        text_loss = patch_loss = None
        common = {"past_key_values": past_key_values, "position_ids": position_ids, **kwargs}
        if input_ids is None:
            if patches is None or patches.ndim != 3:
                shape = None if patches is None else tuple(patches.shape)
                raise ValueError(
                    f"patches must be (batch, patches, {self.config.token_dim}) without input_ids: {shape}"
                )
            x: Tensor | None = self.normalise(patches)
            embeds = self._slots(self.normalise(patches), classes, order, generator)
            outputs = self._decode(embeds, attention_mask, use_cache=bool(use_cache), **common)
            z, logits = outputs.last_hidden_state, None
        else:
            if classes is not None:
                raise ValueError("classes are for patches alone: beside input_ids write the class as text")
            embeds, places = self._mixed_slots(input_ids, patches, order, past_key_values is not None, generator)
            outputs = self._decode(embeds, attention_mask, text=True, use_cache=use_cache, **common)
            x = None if patches is None else self.normalise(patches).reshape(-1, self.config.token_dim)
            z = outputs.hidden_states[-1][:, :-1][places[:, 1:]] if past_key_values is None else None
            logits = outputs.logits
            if labels is not None:
                text_loss = _cross_entropy(logits, labels.masked_fill(places, -100))
        if x is not None and return_loss and past_key_values is None:
            mask = None if patch_mask is None else patch_mask.reshape(x.shape[:-1])
            patch_loss = self.diffusion_head.loss(x, z, mask, self.config.mul, generator)
        losses = [text_loss, None if patch_loss is None else self.config.patch_loss_weight * patch_loss]
        known = [loss for loss in losses if loss is not None]
        return ContinuousOutput(
            loss=sum(known[1:], known[0]) if known else None,
            logits=logits,
            past_key_values=outputs.past_key_values,
            text_loss=text_loss,
            patch_loss=patch_loss,
            conditions=z,
        )


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labelled tokens, 0 where there is none."""
    wanted = labels[:, 1:].flatten()
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted, ignore_index=-100, reduction="sum")
    return total / (wanted != -100).sum().clamp_min(1)


AutoConfig.register(ContinuousConfig.model_type, ContinuousConfig, exist_ok=True)
AutoModel.register(ContinuousConfig, ContinuousCausalLM, exist_ok=True)
