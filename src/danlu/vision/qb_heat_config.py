"""Options of QB-Heat as a configuration of the host library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from danlu.vision.extrapolation import MODES, ORDERS, STEPS, check_choice
from danlu.vision.interpolation import ENDS
from danlu.vision.quarter_block import NAMES, SPLIT

__all__ = ["QBHeatConfig"]

FILLS = ("mask", "copy", "linear", "quadratic", "interpolate")


class QBHeatConfig(PreTrainedConfig):
    """What is shown, how the rest of the map is filled, and what is asked of the image.

    Args:
        size: side of the images in pixels, or (height, width).
        stride: pixels for each cell of the backbone's map; None finds it out, a number is checked against it.
        image_channels: of the images.
        positions: see :class:`~danlu.vision.quarter_block.QuarterBlockMasker`; None is the four corners and the
            centre, and ``("split",)`` with ``fill="interpolate"``.
        per_sample: draw a position for each image and not for each batch.
        fill: of hidden cells: ``"mask"`` one learned vector; ``"copy"`` the nearest visible cell; ``"linear"``
            :class:`~danlu.vision.extrapolation.LinearExtrapolator`; ``"quadratic"``
            :class:`~danlu.vision.second_order.QuadraticExtrapolator`; ``"interpolate"`` straight lines, for
            ``("split",)``, where hidden cells lie between visible ones. Everything else stays equal.
        mode: of ``"linear"``.
        steps: of ``"linear"`` and ``"quadratic"``.
        order: of both.
        max_norm: of ``"linear"``.
        isotropic: of ``"quadratic"``.
        ends: of ``"interpolate"``.
        loss_on: ``"masked"`` or ``"all"`` pixels.
        normalise_targets: targets less their mean, divided by their deviation, in each patch of one cell.
        commutator: weight of :meth:`commutator_penalty`, at least 0.
        feature: weight of the squared distance of filled cells to those of the whole image, without a gradient to the
            latter, at least 0; costs a forward pass of whole images.
        decoder_width: hidden channels of the default decoder.
        seed: of positions and of the default decoder.
        kwargs: of the host's own configuration; ``backbone_record`` is written by the model.

    Raises:
        ValueError: an unknown or contradicting option.
    """

    model_type = "danlu-qb-heat"

    def __init__(
        self,
        size: int | Sequence[int] = 224,
        stride: int | None = None,
        image_channels: int = 3,
        positions: Sequence[str | tuple[int, int]] | None = None,
        per_sample: bool = False,
        fill: str = "linear",
        mode: str = "untied",
        steps: str = "recursive",
        order: str = "xy",
        max_norm: float | None = None,
        isotropic: bool = False,
        ends: str = "copy",
        loss_on: str = "masked",
        normalise_targets: bool = False,
        commutator: float = 0.0,
        feature: float = 0.0,
        decoder_width: int = 64,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        choices = (("fill", fill, FILLS), ("mode", mode, MODES), ("steps", steps, STEPS), ("order", order, ORDERS))
        for name, value, known in (*choices, ("ends", ends, ENDS), ("loss_on", loss_on, ("masked", "all"))):
            check_choice(name, value, known)
        if positions is None:
            positions = (SPLIT,) if fill == "interpolate" else NAMES
        # JSON knows no tuples.
        positions = tuple(p if isinstance(p, str) else (int(p[0]), int(p[1])) for p in positions)
        if (fill == "interpolate") != (positions == (SPLIT,)) and fill not in ("mask", "copy"):
            raise ValueError(
                f"positions must be ('split',) with fill='interpolate', and blocks with fill='linear' or 'quadratic', "
                f"got {positions} with fill={fill!r}"
            )
        for name, number in (("commutator", commutator), ("feature", feature)):
            if not number >= 0:
                raise ValueError(f"{name} must be at least 0, got {number}")
        if commutator and fill not in ("linear", "quadratic"):
            raise ValueError(f"commutator needs fill='linear' or 'quadratic', which have matrices, got fill={fill!r}")
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.stride, self.image_channels, self.positions, self.per_sample = (
            stride,
            image_channels,
            positions,
            per_sample,
        )
        self.fill, self.mode, self.steps, self.order, self.max_norm = fill, mode, steps, order, max_norm
        self.isotropic, self.ends, self.loss_on, self.normalise_targets = isotropic, ends, loss_on, normalise_targets
        self.commutator, self.feature, self.decoder_width, self.seed = commutator, feature, decoder_width, seed
        self.backbone_record: dict[str, Any] | None = kwargs.pop("backbone_record", None)
        super().__init__(**kwargs)
