"""What a backbone reads: embeddings of classes, text and patches, and where each patch belongs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.diffusion.process import widened
from danlu.models.continuous.objective import draw_noise


class Slots:
    """The input side of a model of continuous tokens."""

    config: Any
    backbone: Any
    patch_embedding: Any
    start_embedding: Any
    place_embedding: Any
    target_embedding: Any
    training: bool

    def normalise(self, patches: Tensor) -> Tensor:
        """Patches in the model's scale, mean 0 and variance about 1, in float32 or better."""
        mean, std = self._scale(patches)
        return (widened(patches) - mean) / std

    def denormalise(self, tokens: Tensor) -> Tensor:
        """The inverse of :meth:`normalise`."""
        mean, std = self._scale(tokens)
        return widened(tokens) * std + mean

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if like.shape[-1] != self.config.token_dim:
            raise ValueError(f"patches must have {self.config.token_dim} dimensions, got shape {tuple(like.shape)}")
        wide = widened(like)
        return wide.new_tensor(self.config.token_mean), wide.new_tensor(self.config.token_std)

    def _slots(
        self, x: Tensor, classes: Tensor | None, order: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """(batch, patches, hidden): the class, then every patch but the last; slot i asks for patch i."""
        places = self._order(order, x.shape[:2], x.device)
        withheld = self.config.condition_dropout if self.training else 0.0
        start = self._start(classes, len(x), withheld, generator)
        embeds = torch.cat([start, self._embed(x, places, generator)[:, :-1]], 1)
        return embeds if places is None else embeds + self.target_embedding(places).to(embeds.dtype)

    def _mixed_slots(
        self,
        input_ids: Tensor,
        patches: Tensor | None,
        order: Tensor | None,
        continued: bool,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """(batch, length, hidden), and where the patches are (batch, length)."""
        if not self.config.text:
            raise ValueError("input_ids need a backbone with an output head: build from AutoModelForCausalLM")
        places = input_ids == self.config.patch_token_id
        count, given = int(places.sum()), 0 if patches is None else patches[..., 0].numel()
        if count != given:
            raise ValueError(
                f"input_ids must hold patch_token_id {self.config.patch_token_id} once for each patch, got {count} "
                f"places and {given} patches"
            )
        if not continued and bool(places[:, 0].any()):
            raise ValueError(
                "a sequence must not begin with a patch, which nothing could predict: put a token before it"
            )
        embeds: Tensor = self.backbone.get_input_embeddings()(input_ids.masked_fill(places, 0))
        if patches is None:
            return embeds, places
        where = None
        if self.target_embedding is not None:
            if order is None:
                where = _run_index(places)[places]
            else:
                if order.ndim < patches.ndim - 1:
                    order = order.expand(patches.shape[:-1])
                where = order.reshape(-1)
        where = self._order(where if where is not None else order, (count,), embeds.device)
        x = self.normalise(patches).reshape(-1, self.config.token_dim)
        embeds = embeds.masked_scatter(places[..., None], self._embed(x, where, generator))
        if where is not None:
            asked = F.pad(places[:, 1:], (0, 1))
            target = self.target_embedding(where).to(embeds.dtype)
            embeds = embeds + torch.zeros_like(embeds).masked_scatter(asked[..., None], target)
        return embeds, places

    def _start(self, classes: Tensor | None, batch: int, withheld: float, generator: torch.Generator | None) -> Tensor:
        """(batch, 1, hidden): the class, or the last row of the table for none."""
        if self.start_embedding is None:
            raise ValueError("this model has text and no classes: give input_ids, with a token before the patches")
        none, device = self.config.num_classes, self.start_embedding.weight.device
        if classes is None:
            rows = torch.full((batch,), none, device=device)
        else:
            rows = torch.as_tensor(classes, device=device).long()
            if rows.shape != (batch,) or bool(((rows < -1) | (rows >= none)).any()):
                raise ValueError(
                    f"classes must be ({batch},) integers in 0..{none - 1}, or -1 for none, got "
                    f"{rows.tolist() if rows.numel() <= 8 else tuple(rows.shape)}"
                )
            rows = torch.where(rows < 0, none, rows)
            if withheld > 0:
                drawn = torch.rand(batch, generator=generator).to(device)
                rows = torch.where(drawn < withheld, none, rows)
        return self.start_embedding(rows)[:, None].to(self._dtype)

    def _embed(self, x: Tensor, places: Tensor | None, generator: torch.Generator | None = None) -> Tensor:
        """Normalised patches (..., token_dim) as inputs (..., hidden)."""
        if self.training and self.config.input_noise:
            x = x + self.config.input_noise * draw_noise(x.shape, x, generator)
        embeds = self.patch_embedding(x.to(self.patch_embedding.weight.dtype))
        embeds = embeds if places is None else embeds + self.place_embedding(places)
        return embeds.to(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.backbone.get_input_embeddings().weight.dtype
        return dtype

    def _order(self, order: Tensor | None, shape: tuple[int, ...], device: Any) -> Tensor | None:
        """Places in the image, of this shape; None for a model without embeddings of places."""
        if self.target_embedding is None:
            if order is not None:
                raise ValueError(
                    "order needs target positions, without which the model cannot know which patch is next: set "
                    "num_places of the configuration to the patches of an image, or leave a fixed order out"
                )
            return None
        places = torch.arange(shape[-1], device=device) if order is None else torch.as_tensor(order, device=device)
        if places.shape not in (shape, shape[-1:]) or places.is_floating_point():
            raise ValueError(f"order must be integers of shape {tuple(shape)}, got {tuple(places.shape)}")
        if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < self.config.num_places:
            raise ValueError(
                f"places of patches must be in 0..{self.config.num_places - 1} (num_places of the configuration), got "
                f"{int(places.min())}..{int(places.max())}"
            )
        return places.expand(shape)

    def _decode(self, embeds: Tensor, attention_mask: Tensor | None, *, text: bool = False, **options: Any) -> Any:
        """Run the backbone: with its output head for text, without it for patches."""
        module = self.backbone if text or not self.config.text else self.backbone.get_decoder()
        if text:
            options["output_hidden_states"] = True
        if attention_mask is not None and options.get("position_ids") is None and _takes_positions(module):
            options["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -embeds.shape[1] :]
        options = {name: value for name, value in options.items() if value is not None}
        return module(inputs_embeds=embeds, attention_mask=attention_mask, return_dict=True, **options)


def _takes_positions(module: Any) -> bool:
    return "position_ids" in inspect.signature(module.forward).parameters


def _run_index(places: Tensor) -> Tensor:
    """How many patches stand right before each place: 0, 1, 2, ... in every run of patches."""
    index = torch.arange(places.shape[1], device=places.device).expand(places.shape)
    before = torch.where(places, -1, index).cummax(1).values
    return index - before - 1
