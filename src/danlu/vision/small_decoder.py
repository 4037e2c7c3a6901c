"""A decoder from a feature map to an image that is too small to do without what it is given."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["SmallDecoder"]


class SmallDecoder(nn.Module):
    """Image from a filled map: a 3 x 3 convolution, a 1 x 1 one, and one patch of pixels for each cell.

    Small on purpose: a decoder that looks far can do without the fill, and then the encoder learns nothing from it.

    Args:
        channels: of the map.
        image_channels: of the image.
        stride: pixels for each cell.
        width: hidden channels.
    """

    def __init__(self, channels: int, image_channels: int, stride: int, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 1),
            nn.GELU(),
            nn.ConvTranspose2d(width, image_channels, stride, stride),
        )

    def forward(self, cells: Tensor) -> Tensor:
        """(batch, channels, rows, columns) to (batch, image channels, stride * rows, stride * columns)."""
        image: Tensor = self.layers(cells)
        return image
