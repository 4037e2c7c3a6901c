"""What every quantizer is: vectors in, the nearest of a finite set of vectors and its index out."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

#: Where the class of each kind lives; a configuration names its kind.
KINDS = {
    "fsq": ("danlu.vision.fsq", "FSQ"),
    "lfq": ("danlu.vision.vq", "LFQ"),
    "vq": ("danlu.vision.vq", "VectorQuantizer"),
    "residual": ("danlu.vision.composed", "ResidualQuantizer"),
    "grouped": ("danlu.vision.composed", "GroupedQuantizer"),
}


@dataclass
class QuantizerOutput:
    """What a quantizer makes of its input ``z``, whose channels it keeps where they were.

    Attributes:
        quantized: the vectors to decode from, shape and dtype of ``z``; gradients pass to ``z``.
        indices: int64, the shape of ``z`` without its channels; with several codebooks a last axis of that size.
        codes: the codes themselves, before a projection; the same as ``quantized`` where there is none.
        loss: what has to be added to the training loss, a float32 scalar; mean over vectors, 0 for FSQ.
    """

    quantized: Tensor
    indices: Tensor
    codes: Tensor
    loss: Tensor


class Quantizer(nn.Module, ABC):
    """Base of all quantizers. A new kind fills in three methods on vectors in the last axis, and its configuration.

    Args:
        dim: length of a vector.
        codebook_sizes: number of codes of each codebook, which is the number of indices per vector.
        channel_dim: axis of ``z`` that holds the vector: -1 for tokens (..., dim), 1 for images (batch, dim, ...).

    Attributes:
        dim: see above.
        codebook_sizes: see above.
        channel_dim: see above.
        num_codebooks: their number.

    Raises:
        TypeError: channel_dim is no int.
        ValueError: dim below 1.
    """

    def __init__(self, dim: int, codebook_sizes: tuple[int, ...], channel_dim: int = -1) -> None:
        super().__init__()
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim must be an int >= 1, got {dim!r}")
        if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
            raise TypeError(f"channel_dim must be an int, got {channel_dim!r}; -1 for tokens, 1 for images")
        self.dim = dim
        self.codebook_sizes = codebook_sizes
        self.num_codebooks = len(codebook_sizes)
        self.channel_dim = channel_dim

    @property
    def codebook_size(self) -> int:
        """Number of codes of one codebook, a Python int of any size.

        Raises:
            ValueError: the codebooks differ in size; see ``codebook_sizes``.
        """
        if len(set(self.codebook_sizes)) > 1:
            raise ValueError(f"codebooks have different sizes {self.codebook_sizes}; read codebook_sizes")
        return self.codebook_sizes[0]

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What :func:`build_quantizer` needs to make the same quantizer, as plain values with its ``kind``."""

    @abstractmethod
    def _quantise(self, z: Tensor) -> QuantizerOutput:
        """Of vectors (..., dim); indices with a last axis of ``num_codebooks``."""

    @abstractmethod
    def _find(self, z: Tensor) -> Tensor:
        """Indices (..., num_codebooks) of vectors (..., dim), without gradient and without learning from them."""

    @abstractmethod
    def _look_up(self, indices: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Vectors (..., dim) of valid indices (..., num_codebooks)."""

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize vectors, with gradients.

        Args:
            z: ``dim`` channels at ``channel_dim``, any floating dtype; computed in float32 or better, autocast or not.

        Returns:
            The vectors, indices, codes and loss.

        Raises:
            TypeError: ``z`` is not floating.
            ValueError: another number of channels, or NaN (infinite values too where there is no bound).
        """
        out = self._quantise(self._channels_last(z))
        out.indices = out.indices[..., 0] if self.num_codebooks == 1 else out.indices
        if self.channel_dim != -1:
            same = out.codes is out.quantized
            out.quantized = out.quantized.movedim(-1, self.channel_dim)
            out.codes = out.quantized if same else out.codes.movedim(-1, self.channel_dim)
        return out

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """The indices alone: the same as of ``forward``, for less.

        Args:
            z: as for ``forward``.

        Returns:
            int64 tensor, as ``QuantizerOutput.indices``.

        Raises:
            TypeError: as ``forward``.
            ValueError: as ``forward``.
        """
        indices = self._find(self._channels_last(z))
        return indices[..., 0] if self.num_codebooks == 1 else indices

    def decode(self, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The vectors that belong to indices: bit for bit the ``quantized`` of a forward in the same dtype.

        Args:
            indices: any integer dtype, shaped as ``QuantizerOutput.indices``.
            dtype: of the result; None: that of the parameters, float32 where there are none.

        Returns:
            Vectors with their channels at ``channel_dim``.

        Raises:
            TypeError: indices are not integers.
            ValueError: an index is out of range, or the last axis is not one per codebook.
        """
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise TypeError(f"indices must be integers, got {indices.dtype}")
        if self.num_codebooks == 1:
            indices = indices[..., None]
        elif indices.ndim == 0 or indices.shape[-1] != self.num_codebooks:
            raise ValueError(
                f"indices must have a last axis of {self.num_codebooks}, one per codebook, got {tuple(indices.shape)}"
            )
        self._check_range(indices)
        return self._look_up(indices.long(), dtype).movedim(-1, self.channel_dim)

    def _check_range(self, indices: Tensor) -> None:
        if not indices.numel():
            return
        sizes = self.codebook_sizes
        columns = [indices] if len(set(sizes)) == 1 else list(indices.unbind(-1))
        for column, size in zip(columns, sizes, strict=False):
            least, most = column.aminmax()
            # compared with the largest index: a size of 2 ** 63 is no int64
            require(
                (least >= 0) & (most <= min(size - 1, torch.iinfo(column.dtype).max)),
                f"indices must be in 0..{size - 1}; look for another tokenizer's indices or special tokens among them",
            )

    def _channels_last(self, z: Tensor) -> Tensor:
        if not z.is_floating_point():
            raise TypeError(f"z must be a floating-point tensor, got {z.dtype}; convert it first")
        if not -z.ndim <= self.channel_dim < z.ndim or z.shape[self.channel_dim] != self.dim:
            raise ValueError(
                f"z must have dim = {self.dim} channels at axis {self.channel_dim}, got shape {tuple(z.shape)}; "
                "channel_dim says where they are"
            )
        return z.movedim(self.channel_dim, -1)


def build_quantizer(config: Mapping[str, Any]) -> Quantizer:
    """Make a quantizer from its configuration: swapping one for another is a change of this one argument.

    Args:
        config: ``kind`` (``fsq``, ``lfq``, ``vq``, ``residual`` or ``grouped``) and the options of its class, such as
            ``{"kind": "fsq", "levels": [8, 5, 5, 5]}``; what ``Quantizer.config`` gives.

    Returns:
        The quantizer, with fresh parameters.

    Raises:
        TypeError: an option that the class does not have.
        ValueError: an unknown kind, or a bad option.
    """
    options = dict(config)
    kind = options.pop("kind", None)
    if kind not in KINDS:
        near = get_close_matches(str(kind), KINDS, n=1, cutoff=0.0)[0]
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}; the nearest is {near!r}")
    module, name = KINDS[kind]
    made: Quantizer = getattr(importlib.import_module(module), name)(**options)
    return made


def require(condition: Tensor, message: str) -> None:
    """Raise unless a boolean scalar is true; inside a compiled graph the same check runs on the device.

    Raises:
        ValueError: it is false (``RuntimeError`` from a compiled graph).
    """
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def working(z: Tensor) -> Tensor:
    """``z`` in the precision that quantizers compute in: float32, or float64 where it is that already."""
    return z if z.dtype == torch.float64 else z.float()
