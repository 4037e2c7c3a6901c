"""Sampling of patches one after the other, on the backbone's own cache."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.diffusion.solvers import Solver
from danlu.models.continuous.slots import Slots
from danlu.progress import watched


class PatchGeneration(Slots):
    """The sampling side of a model of continuous tokens."""

    diffusion_head: Any

    @torch.no_grad()
    def generate_patches(
        self,
        count: int,
        classes: Tensor | None = None,
        *,
        num_samples: int | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        patches: Tensor | None = None,
        null_input_ids: Tensor | None = None,
        null_attention_mask: Tensor | None = None,
        order: Tensor | None = None,
        steps: int = 20,
        solver: str | Solver = "euler",
        temperature: float = 1.0,
        guidance: float = 1.0,
        guidance_ramp: Literal["constant", "linear"] = "constant",
        generator: torch.Generator | int = 0,
    ) -> Tensor:
        """Sample patches after a class or a text.

        One cached step of the backbone for each patch, and ``steps`` of the solver in the head. With guidance every
        sequence has a second row without its class or text; both rows read the same patches and denoise the same noise.

        Args:
            count: patches of a sequence, >= 1.
            classes: (batch,) classes, -1 for none; not with ``input_ids``.
            num_samples: sequences, where neither classes nor text say how many.
            input_ids: (batch, length) text before the patches; padding on the left.
            attention_mask: (batch, length), 1 for real tokens.
            patches: those in ``input_ids``, as in the forward pass.
            null_input_ids: (batch or 1, any length) text for guidance, such as an empty prompt that training has seen.
            null_attention_mask: of its shape.
            order: (count,) or (batch, count) place in the image of each patch, for models with ``num_places``.
            steps: of the head's solver for each patch, >= 1.
            solver: see :meth:`DiffusionHead.sample`.
            temperature: factor of each patch's first noise.
            guidance: w of ``u + w (c - u)``, 1 for none.
            guidance_ramp: ``constant``, or ``linear``: from ``1 + (w - 1) / count`` at the first patch to w at the
                last.
            generator: source of the noise, on the CPU, or a seed.

        Returns:
            Patches ``(batch, count, token_dim)`` in their own scale and in float32 or better.

        Raises:
            ValueError: inputs that do not fit together, or guidance without a null condition.
        """
        guided = guidance != 1
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if guidance_ramp not in ("constant", "linear"):
            raise ValueError(f"guidance_ramp must be constant or linear, got {guidance_ramp!r}")
        if input_ids is None:
            step, mask = self._class_prompt(classes, num_samples, guided), None
        elif classes is not None or num_samples is not None:
            raise ValueError("give either input_ids or classes and num_samples: text has its own batch")
        else:
            step, mask = self._text_prompt(
                (input_ids, attention_mask), patches, (null_input_ids, null_attention_mask), guided
            )
        rows = len(step) // 2 if guided else len(step)
        if isinstance(generator, int):
            generator = torch.Generator().manual_seed(generator)
        places = self._order(order, (rows, count), step.device)
        if places is not None:
            target = self._twice(self.target_embedding(places).to(step.dtype), guided)
            step = torch.cat([step[:, :-1], step[:, -1:] + target[:, :1]], 1)
        cache, tokens = None, []
        for i in watched(range(count), "patches"):
            outputs = self._decode(step, mask, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            if cache is None:
                raise ValueError(
                    "the backbone must return past_key_values, which patch by patch sampling continues from"
                )
            z = outputs.last_hidden_state[:, -1]
            conditional, null = z.chunk(2) if guided else (z, None)
            w = guidance if guidance_ramp == "constant" else 1 + (guidance - 1) * (i + 1) / count
            token = self.diffusion_head.sample(conditional, steps, solver, temperature, w, generator, null=null)
            tokens.append(token)
            step = self._twice(self._embed(token[:, None], None if places is None else places[:, i : i + 1]), guided)
            if places is not None and i + 1 < count:
                step = step + target[:, i + 1 : i + 2]
            mask = None if mask is None else F.pad(mask, (0, 1), value=1)
        return self.denormalise(torch.stack(tokens, 1))

    def _twice(self, rows: Tensor, guided: bool) -> Tensor:
        return torch.cat([rows, rows]) if guided else rows

    def _class_prompt(self, classes: Tensor | None, num_samples: int | None, guided: bool) -> Tensor:
        if (classes is None) == (num_samples is None):
            raise ValueError("give classes, or num_samples where there are no classes")
        if guided and (classes is None or not self.config.num_classes or not self.config.condition_dropout):
            raise ValueError(
                "guidance other than 1 needs classes, and a null condition that training has seen (condition_dropout "
                f"above 0), got classes {None if classes is None else 'given'}, num_classes {self.config.num_classes} "
                f"and condition_dropout {self.config.condition_dropout}"
            )
        batch = len(classes) if classes is not None else int(num_samples or 0)
        if batch < 1:
            raise ValueError(f"num_samples must be at least 1, got {batch}")
        start = self._start(classes, batch, 0.0, None)
        return torch.cat([start, self._start(None, batch, 0.0, None)]) if guided else start

    def _text_prompt(
        self, prompt: tuple[Tensor, Tensor | None], patches: Tensor | None, null: tuple[Any, Any], guided: bool
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (rows, length, hidden) and mask; with guidance the null rows come after the others."""
        if guided and null[0] is None:
            raise ValueError(
                "guidance other than 1 needs null_input_ids: a prompt without content, which training has seen"
            )
        sides: list[tuple[Any, Any, Any]] = [(*prompt, patches)]
        if guided:
            ids, mask = (None if part is None else part.expand(len(prompt[0]), -1) for part in null)
            sides.append((ids, mask, None))
        embeds, masks = [], []
        for ids, mask, own in sides:
            mask = torch.ones_like(ids) if mask is None else mask.long()
            if not bool(mask[:, -1].all()):
                raise ValueError("the last token of every row must be real: pad prompts on the left")
            embeds.append(self._mixed_slots(ids, own, None, False, None)[0])
            masks.append(mask)
        length = max(mask.shape[1] for mask in masks)
        rows = [F.pad(x, (0, 0, length - x.shape[1], 0)) for x in embeds]
        return torch.cat(rows), torch.cat([F.pad(mask, (length - mask.shape[1], 0)) for mask in masks])
