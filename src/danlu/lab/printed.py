"""Printed digits: a small classification task, drawn on the spot from the fonts that Matplotlib brings along."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 8
_FONTS = ("DejaVu Sans", "DejaVu Serif", "DejaVu Sans Mono", "STIXGeneral", "cmr10", "cmss10", "cmtt10")
_DRAWN = 48  # pixels of a glyph before it is turned and shrunk


@functools.cache
def glyphs() -> Tensor:
    """Each digit in each font, ink 1 on paper 0: (fonts, 10, side, side), float32."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    pages = []
    for font in _FONTS:
        for digit in range(10):
            figure = Figure(figsize=(1, 1), dpi=_DRAWN)
            canvas = FigureCanvasAgg(figure)
            words = FontProperties(family=font, size=36)
            figure.text(0.5, 0.5, str(digit), ha="center", va="center_baseline", fontproperties=words)
            canvas.draw()
            pages.append(1 - np.asarray(canvas.buffer_rgba())[..., 0] / 255.0)
    return torch.from_numpy(np.stack(pages)).float().view(len(_FONTS), 10, _DRAWN, _DRAWN)


def printed_digits(count: int, seed: int, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """Digits in random fonts, turned, moved, resized and noisy.

    Args:
        count: how many.
        seed: of what is drawn.
        noise: standard deviation of what is added to each pixel; ink is 1.

    Returns:
        Pixels (count, 64), float32, and digits (count,), int64.
    """
    drawn = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=drawn)
    images = glyphs()[torch.randint(len(_FONTS), (count,), generator=drawn), labels]
    uniform = torch.rand(count, 4, generator=drawn) * 2 - 1
    angle, size = uniform[:, 0] * math.radians(15), 0.8 + 0.2 * uniform[:, 1]
    turn = torch.stack([torch.cos(angle), -torch.sin(angle), torch.sin(angle), torch.cos(angle)], 1).view(-1, 2, 2)
    map_ = torch.cat([turn * size[:, None, None], 0.06 * uniform[:, 2:, None]], 2)
    grid = F.affine_grid(map_, [count, 1, _DRAWN, _DRAWN], align_corners=False)
    turned = F.grid_sample(images[:, None], grid, align_corners=False)
    pixels = F.adaptive_avg_pool2d(turned, SIDE).flatten(1)
    # A stroke fills about half of a pixel: the factor makes ink about 1.
    return 2 * pixels + noise * torch.randn(pixels.shape, generator=drawn), labels
