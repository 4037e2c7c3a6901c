"""A small autoencoder around any quantizer: images in, a few indices each, images out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from danlu.files import replacing, write_whole
from danlu.vision.quantizer import Quantizer, build_quantizer

FORMAT = 1
CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"


@dataclass
class AutoencoderOutput:
    """What the autoencoder makes of images.

    Attributes:
        images: the reconstruction, shape of the input.
        indices: int64 (batch, *grid), with a last axis of codebooks where there are several.
        loss: of the quantizer, mean over tokens.
    """

    images: Tensor
    indices: Tensor
    loss: Tensor


class QuantizedAutoencoder(nn.Module):
    """Encoder, quantizer, decoder.

    - ``conv``: residual blocks and strided convolutions; ``2**downsample`` pixels a side become one token, so that
      images of any size with that divisor work.
    - ``mlp``: two hidden layers over the whole image give ``tokens`` vectors, and the reverse; for small images of one
      size.

    Args:
        quantizer: any quantizer with ``channel_dim=-1``, or its configuration.
        image_shape: (channels, height, width).
        architecture: see above.
        hidden: channels of ``conv``, units of ``mlp``.
        downsample: of ``conv``: number of halvings, >= 1.
        tokens: of ``mlp``: vectors per image, >= 1.

    Raises:
        ValueError: an option out of range, or sides that ``2**downsample`` does not divide.

    Source: Scientific Spaces archive 9826; arXiv:1711.00937
    """

    def __init__(
        self,
        quantizer: Quantizer | Mapping[str, Any],
        image_shape: tuple[int, int, int],
        *,
        architecture: Literal["conv", "mlp"] = "conv",
        hidden: int = 64,
        downsample: int = 2,
        tokens: int = 4,
    ) -> None:
        super().__init__()
        made = quantizer if isinstance(quantizer, Quantizer) else build_quantizer(quantizer)
        if made.channel_dim != -1:
            raise ValueError(f"quantizer must have channel_dim=-1, got {made.channel_dim}")
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(f"image_shape must be (channels, height, width), each >= 1, got {tuple(image_shape)}")
        if min(hidden, downsample, tokens) < 1:
            raise ValueError(f"hidden, downsample and tokens must be at least 1, got {hidden}, {downsample}, {tokens}")
        self.image_shape: tuple[int, int, int] = (image_shape[0], image_shape[1], image_shape[2])
        self.architecture, self.hidden, self.downsample, self.tokens = architecture, hidden, downsample, tokens
        if architecture == "conv":
            self.check_sides(image_shape[1], image_shape[2])
            self.encoder, self.decoder = _convolutions(image_shape[0], hidden, downsample, made.dim)
        elif architecture == "mlp":
            pixels, width = math.prod(image_shape), tokens * made.dim
            self.encoder = _perceptron(pixels, hidden, width).append(nn.Unflatten(1, (tokens, made.dim)))
            self.encoder.insert(0, nn.Flatten())
            self.decoder = _perceptron(width, hidden, pixels).append(nn.Unflatten(1, self.image_shape))
            self.decoder.insert(0, nn.Flatten())
        else:
            raise ValueError(f"architecture must be 'conv' or 'mlp', got {architecture!r}")
        self.quantizer = made

    @property
    def config(self) -> dict[str, Any]:
        """Everything but the weights, as plain values."""
        names = ("architecture", "hidden", "downsample", "tokens")
        return {
            "quantizer": self.quantizer.config,
            "image_shape": list(self.image_shape),
            **{name: getattr(self, name) for name in names},
        }

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Of the quantizer."""
        return self.quantizer.codebook_sizes

    def check_sides(self, height: int, width: int) -> None:
        """Refuse sides that do not give whole tokens.

        Raises:
            ValueError: names the divisor.
        """
        step = 2**self.downsample
        if height % step or width % step:
            raise ValueError(f"height and width must be multiples of 2**downsample = {step}, got {height} and {width}")

    def latents(self, images: Tensor) -> Tensor:
        """The vectors before quantization.

        Args:
            images: (batch, channels, height, width).

        Returns:
            (batch, height / 2**downsample, width / 2**downsample, dim), or (batch, tokens, dim) of ``mlp``.

        Raises:
            ValueError: images of another shape.
        """
        channels, height, width = self.image_shape
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"images must be (batch, {channels}, height, width), got {tuple(images.shape)}")
        if self.architecture == "conv":
            self.check_sides(images.shape[2], images.shape[3])
        elif images.shape[2:] != (height, width):
            raise ValueError(f"images must be {height} x {width} for architecture 'mlp', got {tuple(images.shape[2:])}")
        z: Tensor = self.encoder(images)
        return z.movedim(1, -1) if self.architecture == "conv" else z

    def forward(self, images: Tensor) -> AutoencoderOutput:
        """Reconstruct images.

        Args:
            images: (batch, channels, height, width).

        Returns:
            Reconstruction, indices and the quantizer's loss.
        """
        out = self.quantizer(self.latents(images))
        return AutoencoderOutput(self._draw(out.quantized), out.indices, out.loss)

    def loss(self, images: Tensor, out: AutoencoderOutput | None = None) -> Tensor:
        """Training loss of an image: squared error summed over pixels, plus the quantizer's loss summed over tokens.

        Both are sums, so that their balance does not depend on the number of pixels or tokens.

        Args:
            images: as for ``forward``.
            out: of that forward, where there is one already.

        Returns:
            A float32 scalar, the mean over the batch.
        """
        out = self(images) if out is None else out
        tokens = out.indices.numel() // max(1, len(images) * self.quantizer.num_codebooks)
        error = (out.images.float() - images.float()).square().sum() / max(1, len(images))
        return error + tokens * out.loss

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Indices of images, as ``AutoencoderOutput.indices``."""
        return self.quantizer.encode(self.latents(images))

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Images of indices.

        Args:
            indices: as :meth:`encode` gives them.

        Returns:
            (batch, channels, height, width).
        """
        return self._draw(self.quantizer.decode(indices, next(self.decoder.parameters()).dtype))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, each whole or not at all.

        Args:
            folder: made if missing; other files in it stay.
        """
        from safetensors.torch import save_model

        folder = Path(folder)
        with replacing(folder / WEIGHTS_NAME) as new:
            save_model(self, str(new))
        document = {"format": FORMAT, **self.config}
        write_whole(folder / CONFIG_NAME, json.dumps(document, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> QuantizedAutoencoder:
        """Read what :meth:`save_pretrained` wrote.

        Args:
            folder: holds ``config.json`` and ``model.safetensors``.

        Returns:
            The model in evaluation mode, on the CPU, in the dtype it was saved in.

        Raises:
            ValueError: no such files, another format, or weights that do not fit the configuration.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
            state = load_file(folder / WEIGHTS_NAME)
        except (OSError, json.JSONDecodeError, SafetensorError) as error:
            raise ValueError(f"{folder} must hold {CONFIG_NAME} and {WEIGHTS_NAME}: {error}") from error
        version = config.pop("format", None)
        if version != FORMAT:
            raise ValueError(f"format of {folder / CONFIG_NAME} must be {FORMAT}, got {version}")
        try:
            model = cls(config.pop("quantizer"), tuple(config.pop("image_shape")), **config)
            model.to(next(tensor.dtype for name, tensor in state.items() if name.startswith("decoder.")))
            model.load_state_dict(state)
        except (KeyError, TypeError, RuntimeError, StopIteration) as error:
            raise ValueError(f"{WEIGHTS_NAME} and {CONFIG_NAME} in {folder} do not fit: {error}") from error
        return model.eval()

    def _draw(self, quantized: Tensor) -> Tensor:
        z = quantized.movedim(-1, 1) if self.architecture == "conv" else quantized
        images: Tensor = self.decoder(z)
        return images


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(1, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(1, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y


def _convolutions(channels: int, width: int, downsample: int, dim: int) -> tuple[nn.Sequential, nn.Sequential]:
    down: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
    up: list[nn.Module] = [nn.Conv2d(dim, width, 3, padding=1), _Block(width)]
    for _ in range(downsample):
        down += [_Block(width), nn.Conv2d(width, width, 4, stride=2, padding=1)]
        up += [nn.ConvTranspose2d(width, width, 4, stride=2, padding=1), _Block(width)]
    down += [_Block(width), nn.GroupNorm(1, width), nn.SiLU(), nn.Conv2d(width, dim, 1)]
    up += [nn.GroupNorm(1, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1)]
    return nn.Sequential(*down), nn.Sequential(*up)


def _perceptron(width_in: int, hidden: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width_in, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, width_out)
    )
