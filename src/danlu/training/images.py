"""Images to learn from: the bundled digits, or a folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from danlu.progress import watched
from danlu.training.image_tables import DIGITS, SUFFIXES, Images

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("danlu.training.images")


@dataclass(frozen=True)
class ImageData:
    """Images in memory.

    Args:
        pixels: uint8 (images, channels, side, side).
        labels: int64 (images,), or None without classes.
        classes: names of the classes.
    """

    pixels: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]

    def batch(self, places: Tensor) -> Tensor:
        """Images by their places, float32 in -1..1."""
        return self.pixels[places].float() / 127.5 - 1


def read_images(data: Images) -> ImageData:
    """Read what a recipe learns from.

    Args:
        data: the recipe's table.

    Raises:
        ValueError: no folder, no images in it, images of several sizes without ``resize`` (both are named), an image
            that is not square, a file that cannot be read, or classes without subfolders.
        ImportError: Pillow is missing.
    """
    if data.source == DIGITS:
        return _digits(data)
    folder = Path(data.source)
    if not folder.is_dir():
        raise ValueError(f"data.source must be {DIGITS!r} or a folder of images, got {data.source!r}")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise ValueError(f"no images in {folder}: files must end in {', '.join(SUFFIXES)}")
    classes, labels = _classes(folder, files) if data.classes else ((), None)
    pictures = [_open(path, data) for path in watched(files, "reading images")]
    _check_sizes(files, pictures)
    gray = data.colour == "gray" or (data.colour == "auto" and all(picture.mode == "L" for picture in pictures))
    pixels = torch.stack([_pixels(picture.convert("L" if gray else "RGB")) for picture in pictures])
    return ImageData(pixels, labels, classes)


def _digits(data: Images) -> ImageData:
    from danlu.assets import digits

    if data.size not in (None, 8):
        raise ValueError(f"data.size must be 8 for the bundled digits, got {data.size}")
    if data.colour == "rgb":
        raise ValueError("data.colour must be gray or auto for the bundled digits, got 'rgb'")
    images, labels = digits()
    pixels = (images[:, None] * 255).round().to(torch.uint8)
    names = tuple(str(digit) for digit in range(10))
    return ImageData(pixels, labels, names) if data.classes else ImageData(pixels, None, ())


def _classes(folder: Path, files: Sequence[Path]) -> tuple[tuple[str, ...], Tensor]:
    """Names of the subfolders directly below the folder, and the one of every file."""
    loose = next((path for path in files if path.parent == folder), None)
    if loose is not None:
        raise ValueError(
            f"with data.classes every image lies in a subfolder of its class, but {loose} does not: move it, or set "
            "data.classes=false"
        )
    names = [path.relative_to(folder).parts[0] for path in files]
    classes = tuple(sorted(set(names)))
    return classes, torch.tensor([classes.index(name) for name in names])


def _open(path: Path, data: Images) -> Image:
    """One image as ``L`` or ``RGB``, on white where it is transparent, turned as its camera says."""
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ImportError('reading images needs Pillow: pip install "danlu[diffusion]"') from error
    try:
        with Image.open(path) as opened:
            opened.load()
            picture: Any = ImageOps.exif_transpose(opened)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    if picture.mode not in ("L", "RGB", "1"):
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    picture = picture.convert("L") if picture.mode == "1" else picture
    if data.resize:
        picture = ImageOps.fit(picture, (data.size, data.size), Image.Resampling.LANCZOS)
    elif data.size is not None and picture.size != (data.size, data.size):
        raise ValueError(
            f"{path} is {_shown(picture)}, but data.size is {data.size} x {data.size}: set data.resize=true (--resize)"
        )
    return picture


def _check_sizes(files: Sequence[Path], pictures: Sequence[Image]) -> None:
    first = pictures[0]
    for path, picture in zip(files, pictures, strict=True):
        if picture.size != first.size:
            raise ValueError(
                f"images must have one size, but {path} is {_shown(picture)} and {files[0]} is {_shown(first)}: choose "
                "one with --size N --resize (in a recipe data.size and data.resize)"
            )
    if first.width != first.height:
        raise ValueError(
            f"images must be square, but {files[0]} is {_shown(first)}: --size N --resize keeps their middles"
        )


def _shown(picture: Image) -> str:
    return f"{picture.width} x {picture.height}"


def _pixels(picture: Image) -> Tensor:
    import numpy

    values = torch.from_numpy(numpy.array(picture))
    return values[None] if values.dim() == 2 else values.permute(2, 0, 1)


def grid_image(samples: Tensor, columns: int, scale: int = 1) -> Image:
    """Samples side by side, with a line of one pixel between them.

    Args:
        samples: (images, channels, side, side) in -1..1; one or three channels.
        columns: images in a row.
        scale: side of the square that shows one pixel, at least 1: no value is made up.

    Returns:
        An ``L`` or ``RGB`` image of Pillow.
    """
    from PIL import Image

    count, channels, height, width = samples.shape
    rows = -(-count // columns)
    values = ((samples.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    values = values.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    height, width = height * scale + 1, width * scale + 1
    sheet = torch.full((channels, rows * height + 1, columns * width + 1), 128, dtype=torch.uint8)
    for place, value in enumerate(values):
        top, left = (place // columns) * height + 1, (place % columns) * width + 1
        sheet[:, top : top + height - 1, left : left + width - 1] = value
    array = sheet.permute(1, 2, 0).numpy() if channels == 3 else sheet[0].numpy()
    return Image.fromarray(array)
