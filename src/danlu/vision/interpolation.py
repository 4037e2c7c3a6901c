"""Fill the hidden places of a sequence by straight lines between the visible ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from danlu.vision.extrapolation import check_choice

__all__ = ["Interpolator1d"]

ENDS = ("copy", "extrapolate")


class Interpolator1d(nn.Module):
    """Hidden places of a sequence from the visible ones: the straight line between the nearest on each side.

        z_p = ((r - p) z_l + (p - l) z_r) / (r - l),   l < p < r the nearest visible

    Without parameters; what a decoder reads in place of one vector for all hidden places.

    Args:
        ends: before the first and after the last visible place: ``"copy"`` repeats it, ``"extrapolate"`` goes on with
            the line through the two nearest.

    Raises:
        ValueError: an unknown option.

    Source: Scientific Spaces archive 9359
    """

    def __init__(self, ends: str = "copy") -> None:
        super().__init__()
        check_choice("ends", ends, ENDS)
        self.ends = ends

    def forward(self, values: Tensor, positions: Tensor, length: int) -> Tensor:
        """Fill a sequence.

        Args:
            values: visible vectors, (batch, visible, channels), any floating dtype.
            positions: their places, integers rising in 0..length-1: (visible,), or (batch, visible).
            length: of the whole sequence.

        Returns:
            (batch, length, channels) in the dtype of ``values``, equal to them at ``positions``.

        Raises:
            ValueError: shapes that do not agree, positions that do not rise or lie outside, or a single visible place
                with ``ends="extrapolate"``.
        """
        if values.ndim != 3 or positions.shape[-1] != values.shape[1] or positions.ndim > 2:
            raise ValueError(
                f"values must be (batch, visible, channels) with positions (visible,) or (batch, visible), got "
                f"{tuple(values.shape)} and {tuple(positions.shape)}"
            )
        batch, visible, channels = values.shape
        if positions.ndim == 2 and len(positions) != batch:
            raise ValueError(f"positions must have a row for each of {batch} sequences, got {len(positions)}")
        if visible < (2 if self.ends == "extrapolate" else 1):
            raise ValueError(f"values must hold 1 visible place, 2 with ends='extrapolate', got {visible}")
        places = positions.expand(batch, visible).contiguous()
        if not (places[:, 0].min() >= 0 and places[:, -1].max() < length and (places.diff(dim=1) > 0).all()):
            raise ValueError(f"positions must rise strictly in 0..{length - 1}, got {positions.tolist()}")
        if visible == 1:
            return values.expand(batch, length, channels)
        wide = torch.promote_types(values.dtype, torch.float32)
        asked = torch.arange(length, device=values.device).expand(batch, length).contiguous()
        right = torch.searchsorted(places, asked).clamp(1, visible - 1)
        before, after = places.gather(1, right - 1), places.gather(1, right)
        share = ((asked - before).to(wide) / (after - before))[..., None]
        if self.ends == "copy":
            share = share.clamp(0, 1)
        low = values.gather(1, (right - 1)[..., None].expand(-1, -1, channels)).to(wide)
        high = values.gather(1, right[..., None].expand(-1, -1, channels)).to(wide)
        return torch.lerp(low, high, share.expand_as(low)).to(values.dtype)
