"""The mask of Mode I: noisy copies of patches beside the clean ones in one sequence, none seeing another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["JointLayout", "joint_noise_mask"]


@dataclass(frozen=True)
class JointLayout:
    """Order of a Mode I sequence: text, clean patches, noisy copies (patch by patch), later text.

    Args:
        patches: clean patches P, >= 1.
        levels: noisy copies K of each patch, >= 0.
        text: tokens before the patches, >= 0.
        later_text: tokens after the patches, >= 0.

    Raises:
        ValueError: a number out of range.

    Source: Scientific Spaces archive 10197
    """

    patches: int
    levels: int
    text: int = 0
    later_text: int = 0

    def __post_init__(self) -> None:
        for name, least in (("patches", 1), ("levels", 0), ("text", 0), ("later_text", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def noisy(self) -> int:
        """Index of the first noisy copy."""
        return self.text + self.patches

    @property
    def later(self) -> int:
        """Index of the first token of the later text."""
        return self.noisy + self.patches * self.levels

    @property
    def length(self) -> int:
        """Tokens in all."""
        return self.later + self.later_text

    @property
    def pairs(self) -> int:
        """Pairs of query and key that see each other: what an attention of blocks pays for."""
        text, count = self.text, self.patches
        among_patches = count * (count + 1) // 2
        in_text = text * (text + 1) // 2
        after = self.later_text * (text + count) + self.later_text * (self.later_text + 1) // 2
        return in_text + (1 + self.levels) * (text * count + among_patches) + after

    def position_ids(self, device: torch.device | str | None = None) -> Tensor:
        """int64 (length,): a noisy copy has the position of its clean patch, as if it stood there instead."""
        clean = torch.arange(self.noisy, device=device)
        copies = clean[self.text :].repeat_interleave(self.levels)
        return torch.cat([clean, copies, torch.arange(self.later_text, device=device) + self.noisy])

    def mask_mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The mask as a function of (batch, head, query, key) indices, for FlexAttention's ``create_block_mask``."""
        text, noisy, later, levels = self.text, self.noisy, self.later, max(self.levels, 1)

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            copy = (query >= noisy) & (query < later)
            # the clean patch whose place a copy takes
            own = text + (query - noisy) // levels
            last = torch.where(copy, own - 1, query)
            return ((key <= last) & ((key < noisy) | (key >= later))) | (key == query)

        return sees


def joint_noise_mask(layout: JointLayout, device: torch.device | str | None = None) -> Tensor:
    """Who sees whom in a Mode I sequence, as a dense mask.

    Text is causal. A clean patch sees the text and the clean patches up to itself. A noisy copy sees the text, the
    clean patches *before* its own, and itself. Later text sees text and clean patches and is causal in itself. Nothing
    sees a noisy copy but that copy, so adding or dropping copies changes no other output.

    Args:
        layout: the parts of the sequence.
        device: where the mask lives.

    Returns:
        bool (length, length), True where the row's token sees the column's.

    Source: Scientific Spaces archive 10197
    """
    index = torch.arange(layout.length, device=device)
    none = torch.zeros((), dtype=torch.long, device=device)
    return layout.mask_mod()(none, none, index[:, None], index[None])
