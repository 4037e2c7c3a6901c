"""Quantizers made of quantizers, and any quantizer inside diffusers' VQModel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from danlu.vision.quantizer import Quantizer, QuantizerOutput, build_quantizer


class _Composed(Quantizer):
    """Parts that each keep their channels last, and their indices side by side."""

    def __init__(self, dim: int, parts: Sequence[Quantizer | Mapping[str, Any]], channel_dim: int) -> None:
        built = _built(parts)
        for part in built:
            if part.channel_dim != -1:
                raise ValueError(
                    f"parts must have channel_dim=-1, got {part.channel_dim}; give it to the whole instead"
                )
        super().__init__(
            dim or sum(part.dim for part in built),
            tuple(size for part in built for size in part.codebook_sizes),
            channel_dim,
        )
        self.parts = nn.ModuleList(built)

    @property
    def quantizers(self) -> list[Quantizer]:
        """The parts in their order."""
        return cast("list[Quantizer]", list(self.parts))

    @property
    def config(self) -> dict[str, Any]:
        """See the base class."""
        return {"parts": [part.config for part in self.quantizers], "channel_dim": self.channel_dim}

    def _shares(self, indices: Tensor) -> list[Tensor]:
        shares = indices.split([part.num_codebooks for part in self.quantizers], -1)
        return [share[..., 0] if share.shape[-1] == 1 else share for share in shares]


class ResidualQuantizer(_Composed):
    """Each part quantizes what the parts before left over; the sum of all is the result, the sum of losses the loss.

    Gradients follow the chain of parts: with straight-through parts they reach ``z`` once, through the first one. Parts
    with a bound (FSQ) reach only so far: ``scales`` magnifies what is left over, or a part with a ``dim`` learns to.

    Args:
        parts: quantizers or their configurations, all of one ``dim`` and with ``channel_dim=-1``.
        scales: one positive number per part: its input is divided by it, its output multiplied; None: all 1.
        channel_dim: axis of the vectors, see :class:`danlu.vision.quantizer.Quantizer`.

    Raises:
        ValueError: no parts, parts that do not fit together, or bad scales.

    Source: arXiv:2107.03312
    """

    def __init__(
        self,
        parts: Sequence[Quantizer | Mapping[str, Any]],
        scales: Sequence[float] | None = None,
        channel_dim: int = -1,
    ) -> None:
        parts = _built(parts)
        dims = {part.dim for part in parts}
        if len(dims) > 1:
            raise ValueError(f"parts must have one dim, got {sorted(dims)}; give each part dim={max(dims)}")
        if scales is not None and (len(scales) != len(parts) or not all(scale > 0 for scale in scales)):
            raise ValueError(f"scales must be {len(parts)} positive numbers, one per part, got {list(scales)}")
        super().__init__(parts[0].dim, parts, channel_dim)
        self.scales = [1.0] * len(parts) if scales is None else [float(scale) for scale in scales]

    @property
    def config(self) -> dict[str, Any]:
        """See the base class."""
        return {"kind": "residual", "scales": self.scales} | super().config

    def _quantise(self, z: Tensor) -> QuantizerOutput:
        rest, outputs, found = z, [], []
        for part, scale in zip(self.quantizers, self.scales, strict=True):
            outputs.append(part(rest / scale))
            found.append(outputs[-1].quantized * scale)
            rest = rest - found[-1]
        total = sum(found[1:], found[0])
        return _together(outputs, total, total)

    def _find(self, z: Tensor) -> Tensor:
        indices = []
        for part, scale in zip(self.quantizers, self.scales, strict=True):
            found = part.encode(z / scale)
            z = z - part.decode(found, z.dtype) * scale
            indices.append(_column(found, part))
        return torch.cat(indices, -1)

    def _look_up(self, indices: Tensor, dtype: torch.dtype | None) -> Tensor:
        stages = zip(self.quantizers, self.scales, self._shares(indices), strict=True)
        # summed in the order of the forward pass: the same bits
        first, *others = [part.decode(share, dtype) * scale for part, scale, share in stages]
        return sum(others, first)


class GroupedQuantizer(_Composed):
    """The channels are cut into groups, and each part quantizes one.

    Args:
        parts: quantizers or their configurations with ``channel_dim=-1``; group j has ``parts[j].dim`` channels.
        channel_dim: axis of the vectors, see :class:`danlu.vision.quantizer.Quantizer`.

    Raises:
        ValueError: no parts, or one that moves channels itself.

    Source: arXiv:2305.02765
    """

    def __init__(self, parts: Sequence[Quantizer | Mapping[str, Any]], channel_dim: int = -1) -> None:
        super().__init__(0, parts, channel_dim)

    @property
    def config(self) -> dict[str, Any]:
        """See the base class."""
        return {"kind": "grouped"} | super().config

    def _groups(self, z: Tensor) -> list[tuple[Quantizer, Tensor]]:
        return list(zip(self.quantizers, z.split([part.dim for part in self.quantizers], -1), strict=True))

    def _quantise(self, z: Tensor) -> QuantizerOutput:
        outputs = [part(group) for part, group in self._groups(z)]
        quantized = torch.cat([out.quantized for out in outputs], -1)
        return _together(outputs, quantized, torch.cat([out.codes for out in outputs], -1))

    def _find(self, z: Tensor) -> Tensor:
        return torch.cat([_column(part.encode(group), part) for part, group in self._groups(z)], -1)

    def _look_up(self, indices: Tensor, dtype: torch.dtype | None) -> Tensor:
        vectors = [
            part.decode(share, dtype) for part, share in zip(self.quantizers, self._shares(indices), strict=True)
        ]
        return torch.cat(vectors, -1)


class VQModelQuantizer(nn.Module):
    """Any quantizer in the place of ``quantize`` in diffusers' ``VQModel``: ``model.quantize = VQModelQuantizer(fsq)``.

    Make the model with ``vq_embed_dim=quantizer.dim``. The model's own configuration does not know of it: after
    ``from_pretrained``, set ``quantize`` again, with its state where it has parameters.

    Args:
        quantizer: with ``channel_dim=1``.

    Raises:
        ValueError: another ``channel_dim``.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        if quantizer.channel_dim != 1:
            raise ValueError(f"quantizer must have channel_dim=1, got {quantizer.channel_dim}: VQModel works on images")
        self.quantizer = quantizer

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """The result in VQModel's form.

        Args:
            z: (batch, dim, height, width).

        Returns:
            The quantized map, the loss, and a tuple whose last entry holds the indices.
        """
        out = self.quantizer(z)
        return out.quantized, out.loss, (None, None, out.indices)

    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int]) -> Tensor:
        """The map of indices, for ``VQModel.decode(indices, force_not_quantize=True, shape=...)``.

        Args:
            indices: any shape with ``batch * height * width`` entries (times the number of codebooks).
            shape: (batch, height, width, dim).

        Returns:
            The quantized map (batch, dim, height, width).
        """
        several = (self.quantizer.num_codebooks,) if self.quantizer.num_codebooks > 1 else ()
        return self.quantizer.decode(indices.reshape(*shape[:3], *several))


def _built(parts: Sequence[Quantizer | Mapping[str, Any]]) -> list[Quantizer]:
    built = [part if isinstance(part, Quantizer) else build_quantizer(part) for part in parts]
    if not built:
        raise ValueError("parts must hold at least one quantizer, got none")
    return built


def _column(indices: Tensor, part: Quantizer) -> Tensor:
    return indices[..., None] if part.num_codebooks == 1 else indices


def _together(outputs: list[QuantizerOutput], quantized: Tensor, codes: Tensor) -> QuantizerOutput:
    columns = [out.indices if out.indices.ndim == quantized.ndim else out.indices[..., None] for out in outputs]
    losses = torch.stack([out.loss for out in outputs])
    return QuantizerOutput(quantized, torch.cat(columns, -1), codes, losses.sum())
