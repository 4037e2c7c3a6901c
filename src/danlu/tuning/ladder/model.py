"""Ladder side-tuning: train a small network beside a frozen backbone, never back-propagating through the backbone."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)

from danlu.hosts.architecture import find_blocks
from danlu.tuning.ladder import blocks as ladder_blocks
from danlu.tuning.ladder import files as ladder_files
from danlu.tuning.ladder import head as ladder_head
from danlu.tuning.ladder import init as ladder_init
from danlu.tuning.ladder import side as ladder_side
from danlu.tuning.ladder.config import LadderConfig
from danlu.tuning.ladder.features import FeatureMethods
from danlu.tuning.ladder.generate import LadderCache

__all__ = ["LadderCache", "LadderConfig", "LadderModel"]

logger = logging.getLogger("danlu.tuning")


class LadderModel(FeatureMethods, PreTrainedModel, GenerationMixin):
    """A frozen backbone with a trainable side network that is fed by its states.

        Y = D_emb(H_0);  for each link i:  Y = S_i(mu_i Y + (1 - mu_i) D_i(H_{i+1}));  out = Head(Up(Norm(Y)))

    The backbone runs without gradients and always in evaluation mode, its blocks above the last link not at all, so a
    step costs one forward pass of it and a step of the side. In training with ``labels`` and the backbone's head the
    output holds the loss alone: its logits are never formed as a whole. Evaluation mode, or a call without ``labels``,
    gives logits.

    Args:
        backbone: a ``transformers`` model with one stack of blocks: Llama-like, GPT-2-like, BERT-like, and others whose
            blocks shrink evenly. It is frozen in place. Its weights may be quantised (with ``init="random"``), the
            language-model head only if it passes gradients on.
        config: shape of the ladder.
        samples: batches with ``labels`` for the backbone's own loss, for ``init="fisher"``; a few hundred rows do.

    Raises:
        UnsupportedArchitecture: blocks that cannot be linked or narrowed, with the reason, before any long work.
        ValueError: widths that the reduction does not divide, layers that are not there, missing samples, an
            initialisation that needs weights that the backbone does not show, or a head that is not there.

    Departures: new heads read Norm(Y) without Up, since two linear maps in a row are one; with ``merge_last``, H is the
    backbone's state as its head reads it, after the final norm. Encoder-decoders are not supported.

    Source: Scientific Spaces archive 9138; arXiv:2206.06522
    """

    supports_gradient_checkpointing = True
    # Said of the backbone by its own class; here only so that its configuration passes the host's check unchanged.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self,
        backbone: Any,
        config: LadderConfig | None = None,
        samples: Iterable[Mapping[str, Tensor]] | None = None,
    ):
        config = config or LadderConfig()
        stack = find_blocks(backbone)
        layers = config.resolve_layers(len(stack.blocks))
        small = ladder_blocks.side_config(backbone.config, layers, config.reduction, config.min_head_dim)
        if config.head == "lm":
            ladder_head.check_head(backbone)
        blocks = ladder_blocks.build_blocks(stack, backbone.config, small, config.seed)
        kept = None
        if config.init != "random":
            scores = ladder_init.importance(backbone, config.init, samples)
            kept = ladder_init.prune_into(blocks, backbone, layers, scores)
        super().__init__(backbone.config)
        wide = backbone.config.hidden_size
        with_up = config.head == "lm" or config.merge_last
        side = ladder_side.Side(blocks, config, wide, post_norm=stack.norms[1] is None, with_up=with_up)
        self.head: nn.Linear | None = None
        if config.num_labels is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed + 2)
                self.head = nn.Linear(wide if with_up else small.hidden_size, config.num_labels)
        self.merge = nn.Parameter(torch.zeros(())) if config.merge_last else None
        if kept is not None and config.links == "select":
            side.select(kept)
        self.backbone = backbone.requires_grad_(False).eval()
        self.side = side
        self.ladder_config, self.layers, self.side_config = config, layers, small
        self.is_causal = any(getattr(module, "is_causal", False) for module in stack.blocks[0].modules())
        if getattr(backbone, "generation_config", None) is not None:
            self.generation_config = backbone.generation_config
        for part in self.trained_modules():
            part.to(backbone.device, backbone.dtype)
        if self.merge is not None:
            self.merge.data = self.merge.data.to(backbone.device, backbone.dtype)

    # --- the parts --------------------------------------------------------------------------------------------------

    def trained_modules(self) -> list[nn.Module]:
        """The side and a new head."""
        return [self.side] if self.head is None else [self.side, self.head]

    def train(self, mode: bool = True) -> LadderModel:
        """Set the mode of the side; the backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's token table."""
        table: nn.Module = self.backbone.get_input_embeddings()
        return table

    def get_output_embeddings(self) -> nn.Module | None:
        """The backbone's head, or none where a new head stands in its place."""
        return self.backbone.get_output_embeddings() if self.head is None else None

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        self.side.base._set_gradient_checkpointing(*args, **kwargs)

    # --- forward ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LadderCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        token_type_ids: Tensor | None = None,
        features: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run backbone and side.

        Args:
            input_ids: (batch, length), or ``inputs_embeds``.
            attention_mask: as the backbone takes it.
            position_ids: as the backbone takes them.
            past_key_values: keys and values of earlier tokens, of both parts.
            inputs_embeds: (batch, length, d), without gradient: nothing trainable may come before a frozen block.
            labels: (batch, length) for ``lm`` and ``tokens``, -100 where not counted; (batch,) for ``classification``.
            use_cache: return a cache; on where one is given.
            logits_to_keep: as in the host, for ``lm``.
            token_type_ids: for backbones with segments.
            features: (batch, links, length, d) from ``precompute``; the backbone does not run.
            num_items_in_batch: divisor of the summed loss, as the host's Trainer passes it.
            return_dict: False gives a tuple.
            kwargs: more arguments for the backbone's and the side's attention.

        Returns:
            A host output with ``loss``, ``logits`` and ``past_key_values`` where there are any.

        Raises:
            ValueError: contradicting arguments, or a backbone with trainable parameters in training.
        """
        if kwargs.pop("output_hidden_states", None) or kwargs.pop("output_attentions", None):
            raise ValueError("a ladder returns no hidden states or attentions; ask its backbone")
        if past_key_values is not None and not isinstance(past_key_values, LadderCache):
            raise TypeError(f"past_key_values must be a LadderCache, got {type(past_key_values).__name__}")
        if past_key_values is None and use_cache:
            past_key_values = LadderCache.empty(self.config, self.side_config)
        shared = {**kwargs, "attention_mask": attention_mask, "position_ids": position_ids}
        if features is not None:
            if past_key_values is not None:
                raise ValueError("features hold whole sequences: leave past_key_values and use_cache out")
            parts, last = self._read(features)
        else:
            inputs = {**shared, "input_ids": input_ids, "inputs_embeds": inputs_embeds, "use_cache": False}
            if token_type_ids is not None:
                inputs["token_type_ids"] = token_type_ids
            if past_key_values is not None:
                inputs |= {"past_key_values": past_key_values.backbone, "use_cache": True}
            parts, last = self._tap(inputs)
        if past_key_values is not None:
            shared["past_key_values"] = past_key_values.side
        state = self.side(parts, **shared)
        if self.side.up is not None:
            state = self.side.up(state)
        if self.merge is not None and last is not None:
            gate = torch.sigmoid(self.merge / self.ladder_config.temperature)
            state = gate * state + (1 - gate) * last
        out = self._finish(state, attention_mask, labels, logits_to_keep, num_items_in_batch)
        if past_key_values is not None:
            out.past_key_values = past_key_values
        return out.to_tuple() if return_dict is False else out

    def _tap(self, inputs: dict[str, Any]) -> tuple[list[Tensor], Tensor | None]:
        """D of every tapped state, each made while the state is at hand, and the last state where it is merged."""
        embeds = inputs["inputs_embeds"]
        if embeds is not None and embeds.requires_grad:
            raise ValueError("inputs_embeds must not require gradients: a frozen backbone passes none on; detach them")
        if self.training and any(p.requires_grad for p in self.backbone.parameters()):
            raise ValueError("the backbone of a ladder must be frozen: call backbone.requires_grad_(False)")
        if any(module.training for module in self.backbone.modules()):
            self.backbone.eval()
        parts: list[Tensor] = []

        def take(position: int, state: Tensor) -> None:
            parts.append(self._down(position, state))

        last = ladder_side.run_backbone(self._stack, self.layers, inputs, take, to_end=self.merge is not None)
        return parts, last

    def _down(self, position: int, state: Tensor) -> Tensor:
        weight = self.side.down[position].weight
        if state.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
            raise TypeError(
                f"the backbone's states are {state.dtype} and the side is {weight.dtype}: convert one of them with "
                f".to(), or train under torch.autocast"
            )
        out: Tensor = self.side.down[position](state.to(weight.device))
        return out

    def _read(self, features: Tensor) -> tuple[list[Tensor], Tensor | None]:
        links = len(self.layers) + 1
        if features.ndim != 4 or features.shape[1] != links + (self.merge is not None):
            raise ValueError(
                f"features must be (batch, {links + (self.merge is not None)}, length, {self.config.hidden_size}), "
                f"got {tuple(features.shape)}"
            )
        states = [state.to(self.side.down[0].weight.dtype) for state in features.unbind(1)]
        parts = [self._down(position, state) for position, state in enumerate(states[:links])]
        return parts, states[links] if self.merge is not None else None

    def _finish(self, state: Tensor, mask: Tensor | None, labels: Tensor | None, keep: int | Tensor, count: Any) -> Any:
        loss: Tensor | None
        if self.head is None:
            masked = ladder_head.is_masked(self.backbone)
            targets = labels if labels is None or masked else ladder_head.shifted(labels)
            if targets is not None and self.training:
                loss = ladder_head.head_loss(
                    lambda part: ladder_head.host_logits(self.backbone, part), state, targets, count
                )
                return CausalLMOutputWithPast(loss=loss)
            extra = {"logits_to_keep": keep} if isinstance(keep, Tensor) or keep else {}
            logits = ladder_head.host_logits(self.backbone, state, **extra)
            loss = None if targets is None else ladder_head.token_loss(logits, targets, count)
            return CausalLMOutputWithPast(loss=loss, logits=logits)
        if self.ladder_config.head == "tokens":
            logits = self.head(state)
            loss = None if labels is None else ladder_head.token_loss(logits, labels, count)
            return TokenClassifierOutput(loss=loss, logits=logits)
        logits = self.head(ladder_head.pooled(state, mask, last=self.is_causal))
        loss = None if labels is None else ladder_head.token_loss(logits, labels)
        return SequenceClassifierOutputWithPast(loss=loss, logits=logits)

    # --- generation -------------------------------------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The host's ``generate`` with a cache of both parts.

        Raises:
            ValueError: a new head, a backbone that does not generate, or another cache than the ladder's own.
        """
        if self.head is not None or not self.backbone.can_generate() or not self.is_causal:
            raise ValueError(
                f"generate needs head='lm' over a causal model, got head={self.ladder_config.head!r} over "
                f"{type(self.backbone).__name__}"
            )
        settings = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("cache_implementation") or settings.cache_implementation:
            raise ValueError("cache_implementation must be left out: a ladder brings its own pair of growing caches")
        wanted = kwargs.get("use_cache", settings.use_cache)
        if wanted is not False and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = LadderCache.empty(self.config, self.side_config)
        return super().generate(*args, **kwargs)

    # --- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self, save_directory: str | Path, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Write the side and its configuration; the backbone is not saved.

        Args:
            save_directory: a folder, made if missing.
            state_dict: weights in place of the model's own, as the host's Trainer passes them.
            kwargs: ``is_main_process=False`` writes nothing; the host's other options do not apply to so small a file.
        """
        if kwargs.get("is_main_process", True):
            weights = self.state_dict() if state_dict is None else state_dict
            backbone = ladder_files.identity(self._stack.base, self.config)
            ladder_files.write_ladder(Path(save_directory), self.ladder_config, backbone, weights)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights; a state without any of the backbone's is complete, and leaves the backbone untouched."""
        if any(name.startswith(ladder_files.FROZEN) for name in state_dict):
            return super().load_state_dict(state_dict, strict, assign)
        backbone = self._modules.pop("backbone")  # a quantised one cannot be passed over by its own loader
        try:
            return super().load_state_dict(state_dict, strict, assign)
        finally:
            self._modules["backbone"] = backbone

    @classmethod
    def from_pretrained(cls, path: str | Path, backbone: Any) -> LadderModel:
        """Put a saved side on its backbone.

        Args:
            path: folder written by :meth:`save_pretrained`.
            backbone: the model that the side was trained on; a quantised copy of it will do.

        Returns:
            The ladder in evaluation mode.

        Raises:
            FileNotFoundError: no ladder there.
            ValueError: a damaged file, or a backbone of another shape. Other weights of the same shape are reported in
                the log.
        """
        config, saved, weights = ladder_files.read_ladder(Path(path), backbone)
        model = cls(backbone, replace(config, init="random", links="random"))
        model.ladder_config = config
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{path} holds other weights than its configuration says: {error}") from error
        if ladder_files.identity(model._stack.base, model.config) != saved:
            logger.warning("the backbone's weights are not those that the ladder in %s was trained on", path)
        return model.eval()
