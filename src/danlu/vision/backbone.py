"""Reads the feature map of any image encoder, whatever form its output has."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["Reader", "rebuild", "record"]


class Reader:
    """Calls a backbone and returns its map; finds out its channels, stride and special tokens by two empty images.

    Args:
        backbone: the encoder.
        size: height and width of whole images in pixels.
        stride: pixels for each cell that the caller expects, or None.
        image_channels: of the images.

    Raises:
        TypeError: an output in which no map can be found.
        ValueError: a backbone that pools, whose map of half an image is not half the map, or of another stride.
    """

    def __init__(self, backbone: nn.Module, size: tuple[int, int], stride: int | None, image_channels: int) -> None:
        parameter = next((p for p in backbone.parameters() if p.is_floating_point()), torch.zeros(()))
        self.device, self.dtype = parameter.device, parameter.dtype
        self._name = type(backbone).__name__
        self._host = isinstance(backbone, PreTrainedModel)
        takes = inspect.signature(backbone.forward).parameters
        # A table of positions for whole images is resized to a block by the host, if it is asked to.
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
        height, width = size
        if height % 2 or width % 2:
            raise ValueError(f"size must be even in both directions, to be halved, got {size}")
        was = {module: module.training for module in backbone.modules()}
        backbone.eval()
        try:
            with torch.no_grad():
                whole, half = (
                    self._call(backbone, torch.zeros(1, image_channels, h, w, device=self.device, dtype=self.dtype))
                    for h, w in ((height, width), (height // 2, width // 2))
                )
        finally:
            for module, training in was.items():
                module.training = training
        if whole.ndim != half.ndim:
            raise ValueError(f"{self._name} gives outputs of different kinds for whole images and for blocks")
        self.channels = whole.shape[1] if whole.ndim == 4 else whole.shape[2]
        self.stride, self.special = self._measure_map(whole, half, size, stride)

    def _measure_map(self, whole: Tensor, half: Tensor, size: tuple[int, int], stride: int | None) -> tuple[int, int]:
        height, width = size
        if whole.ndim == 4:
            rows, columns = whole.shape[2:]
            if rows == columns == 1:
                raise ValueError(f"{self._name} pools its map to one cell: give a backbone without its pooling")
            halved, special = tuple(half.shape[2:]) == (rows / 2, columns / 2), 0
            found = (height / rows, width / columns)
            said = f"{tuple(whole.shape[2:])} cells of {size} pixels and {tuple(half.shape[2:])} of half the side"
        else:
            # Special tokens are as many for a block as for the image, cells a quarter: the difference tells them apart.
            cells = (whole.shape[1] - half.shape[1]) * 4 / 3
            special = int(whole.shape[1] - cells)
            found = (math.sqrt(height * width / cells),) * 2 if cells > 0 else (0.0, 0.0)
            halved = cells > 0 and cells % 4 == 0 and special >= 0
            said = f"{whole.shape[1]} tokens of {size} pixels and {half.shape[1]} of half the side"
        if stride is not None and found != (stride, stride):
            raise ValueError(
                f"stride must be that of {self._name}, which gives {said}: a stride of {found[0]:g} x {found[1]:g}, "
                f"got {stride}"
            )
        if not halved or found[0] != found[1] or found[0] != int(found[0]) or height % found[0] or width % found[0]:
            raise ValueError(
                f"the map of half an image must be half the map, got from {self._name} {said}; choose a size that is a "
                "multiple of twice the stride, and a backbone that pads its borders"
            )
        return int(found[0]), special

    def read(self, backbone: nn.Module, pixels: Tensor, rows: int, columns: int) -> Tensor:
        """Map (batch, channels, rows, columns) of images (batch, image channels, height, width)."""
        found = self._call(backbone, pixels)
        if found.ndim == 3:
            found = found[:, self.special :].mT.unflatten(2, (rows, columns))
        return found

    def _call(self, backbone: nn.Module, pixels: Tensor) -> Tensor:
        output = backbone(pixel_values=pixels, **self._options) if self._host else backbone(pixels, **self._options)
        found: Any = output
        if not isinstance(output, Tensor):
            maps = getattr(output, "feature_maps", None)
            states = getattr(output, "last_hidden_state", None)
            found = maps[-1] if maps else states if states is not None else output
        if isinstance(found, list) and found:
            found = found[-1]
        if not isinstance(found, Tensor):
            raise TypeError(
                f"{self._name} must return a tensor, a list of maps, or an output with feature_maps or "
                f"last_hidden_state, got {type(output).__name__}"
            )
        if found.ndim not in (3, 4):
            raise ValueError(
                f"{self._name} must return a map (batch, C, rows, columns) or tokens (batch, tokens, C), got "
                f"{tuple(found.shape)}: give a backbone without its pooling"
            )
        return found


def record(backbone: nn.Module) -> dict[str, Any] | None:
    """What rebuilds a model of the host library: its class, configuration and options. None for others."""
    if not isinstance(backbone, PreTrainedModel) or not type(backbone).__module__.startswith("transformers."):
        return None
    takes = inspect.signature(type(backbone).__init__).parameters
    no_pooler = "add_pooling_layer" in takes and getattr(backbone, "pooler", None) is None
    options = {"add_pooling_layer": False} if no_pooler else {}
    return {"class": type(backbone).__name__, "config": backbone.config.to_dict(), "options": options}


def rebuild(recorded: dict[str, Any] | None) -> nn.Module:
    """The untrained backbone of a record.

    Raises:
        ValueError: there is no record, or the host library does not know the class.
    """
    import transformers

    if recorded is None:
        raise ValueError("backbone must be given: the saved one is not a model of transformers, which could be rebuilt")
    made: Any = getattr(transformers, recorded["class"], None)
    known = inspect.isclass(made) and issubclass(made, PreTrainedModel)
    if not known:
        raise ValueError(f"backbone must be given: transformers has no model class {recorded['class']!r}")
    built: nn.Module = made(made.config_class.from_dict(recorded["config"]), **recorded["options"])
    return built
