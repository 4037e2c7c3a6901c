"""QB-Heat: self-supervised training of an image encoder that sees one quarter of the image and predicts the rest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from danlu.vision.backbone import Reader, rebuild, record
from danlu.vision.extrapolation import LinearExtrapolator
from danlu.vision.interpolation import Interpolator1d
from danlu.vision.qb_heat_config import QBHeatConfig
from danlu.vision.quarter_block import QuarterBlockMasker, Visible
from danlu.vision.second_order import QuadraticExtrapolator
from danlu.vision.small_decoder import SmallDecoder

__all__ = ["QBHeatConfig", "QBHeatForPreTraining", "QBHeatOutput", "SmallDecoder"]


@dataclass
class QBHeatOutput(ModelOutput):
    """What a step gives.

    Args:
        loss: scalar, float32.
        reconstruction: (batch, channels, height, width) in pixels; normalised by patches if the targets are.
        mask: (batch, height, width) in pixels, True where the encoder has not looked.
    """

    loss: Tensor | None = None
    reconstruction: Tensor | None = None
    mask: Tensor | None = None


class QBHeatForPreTraining(PreTrainedModel):
    """Train an encoder to see a quarter of the image and predict the rest by shared linear steps in its map.

        block -> backbone -> its cells of the map -> fill -> + positions -> decoder -> image;   mean squared error

    The backbone runs on the visible block alone, a quarter of the cost of an image, which a convolutional network can
    do as well as a transformer. Gradients reach it through the fill. In training one position is drawn for each batch,
    by ``config.seed`` and the number of the step, which is saved with the weights; in evaluation image i has position
    ``i mod positions``.

    Args:
        backbone: encoder of images (batch, channels, height, width): a ``transformers`` model or backbone, or any
            module. It returns a map (batch, C, rows, columns), tokens (batch, tokens, C) in rows after any special
            ones, a list of maps of which the last counts, or an output with ``feature_maps`` or
            ``last_hidden_state``. Two forward passes of an empty image at construction find C, the stride and the
            number of special tokens.
        decoder: from the filled map (batch, C, rows, columns) to the image; default :class:`SmallDecoder`.
        config: all options; default ``QBHeatConfig()`` for images of 224 x 224.

    Raises:
        ValueError: a backbone that pools, whose map of a block is not half its map of the image, or whose stride is not
            that of the configuration; images that cannot be halved; a decoder that does not give the image's shape.

    Departures: the source gives no hyper-parameters, so all defaults are ours. Normalisation by batch statistics sees
    blocks in training and whole images later: prefer group or layer normalisation, or call
    ``torch.optim.swa_utils.update_bn(loader, encoder)`` on whole images.

    Source: Scientific Spaces archive 9359; arXiv:2211.13228
    """

    config_class = QBHeatConfig
    main_input_name = "pixel_values"
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    draws: Tensor

    def __init__(
        self, backbone: nn.Module, decoder: nn.Module | None = None, config: QBHeatConfig | None = None
    ) -> None:
        config = config or QBHeatConfig()
        reader = Reader(backbone, config.size, config.stride, config.image_channels)
        channels, stride = reader.channels, reader.stride
        masker = QuarterBlockMasker(config.size, stride, config.positions)
        config.backbone_record = record(backbone)
        super().__init__(config)
        self.backbone, self.masker, self._reader = backbone, masker, reader
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.decoder = decoder or SmallDecoder(channels, config.image_channels, stride, config.decoder_width)
            self.mask_token = nn.Parameter(0.02 * torch.randn(channels)) if config.fill == "mask" else None
        self.positions = nn.Parameter(torch.zeros(channels, masker.height, masker.width))
        self.fill: nn.Module | None = None
        if config.fill == "linear":
            self.fill = LinearExtrapolator(channels, config.mode, config.steps, config.order, config.max_norm)
        elif config.fill == "quadratic":
            self.fill = QuadraticExtrapolator(channels, config.isotropic, config.steps, config.order)
        elif config.fill == "interpolate":
            self.fill = Interpolator1d(config.ends)
        device, dtype = reader.device, reader.dtype
        for part in (self.decoder, self.fill) if decoder is None else (self.fill,):
            if part is not None:
                part.to(device, dtype)
        for parameter in (self.positions, self.mask_token):
            if parameter is not None:
                parameter.data = parameter.data.to(device, dtype)
        # A Python number, since reading a tensor on an accelerator would stop it; the buffer is for the checkpoint.
        self._draws = 0
        self.register_buffer("draws", torch.zeros((), dtype=torch.long, device=device))
        self.register_state_dict_pre_hook(_write_draws)
        self.register_load_state_dict_post_hook(_read_draws)
        self._check_decoder(device, dtype)

    def _check_decoder(self, device: torch.device, dtype: torch.dtype) -> None:
        cells = torch.zeros(1, *self.positions.shape, device=device, dtype=dtype)
        was = {module: module.training for module in self.decoder.modules()}
        with torch.no_grad():
            image = self.decoder.eval()(cells)
        for module, training in was.items():
            module.training = training
        wanted = (1, self.config.image_channels, *self.masker.size)
        if not isinstance(image, Tensor) or tuple(image.shape) != wanted:
            found = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"decoder must turn {tuple(cells.shape)} into an image {wanted}, got {found}")

    # --- the parts of a step ----------------------------------------------------------------------------------------

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Map of whole images or of blocks, (batch, C, rows, columns); for probes and for features."""
        s = self.masker.stride
        return self._reader.read(self.backbone, pixel_values, pixel_values.shape[2] // s, pixel_values.shape[3] // s)

    def filled(self, pixel_values: Tensor, position: int | Tensor) -> Tensor:
        """Encode the visible blocks and fill the map.

        Args:
            pixel_values: (batch, channels, height, width).
            position: number of the position, or a tensor of one for each image, (batch,).

        Returns:
            Maps (batch, C, rows, columns).
        """
        if not isinstance(position, Tensor):
            cells = self.masker.join(self.encode(self.masker.crop(pixel_values, position)), position)
            return self._fill(cells, self.masker.visible[position])
        groups = [(k, torch.nonzero(position == k)[:, 0]) for k in position.unique().tolist()]
        crops = [self.masker.crop(pixel_values[rows.to(pixel_values.device)], k) for k, rows in groups]
        blocks = self.encode(torch.cat(crops)).split([len(crop) for crop in crops])
        maps = [
            self._fill(self.masker.join(block, k), self.masker.visible[k])
            for (k, _), block in zip(groups, blocks, strict=True)
        ]
        back = torch.cat([rows for _, rows in groups]).argsort().to(pixel_values.device)
        return torch.cat(maps)[back]

    def _fill(self, cells: Tensor, seen: Visible) -> Tensor:
        height, width = self.masker.height, self.masker.width
        rows = torch.tensor(seen.rows, device=cells.device)
        columns = torch.tensor(seen.columns, device=cells.device)
        if self.mask_token is not None:
            token = self.mask_token.to(cells.dtype)[:, None, None]
            full = token.expand(len(cells), -1, height, width).clone()
            full[:, :, rows[:, None], columns] = cells
            return full
        if self.fill is None:
            return cells[:, :, _nearest(seen.rows, height)][..., _nearest(seen.columns, width)]
        if isinstance(self.fill, Interpolator1d):
            lines = self.fill(cells.permute(0, 2, 3, 1).flatten(0, 1), columns, width)
            lines = lines.unflatten(0, (len(cells), len(rows))).transpose(1, 2).flatten(0, 1)
            full = self.fill(lines, rows, height).unflatten(0, (len(cells), width))
            return full.permute(0, 3, 2, 1)
        full = self.fill(cells, *seen.corner, height, width)
        return full

    def forward(
        self,
        pixel_values: Tensor,
        position: str | tuple[int, int] | Tensor | None = None,
        return_loss: bool = True,
        return_dict: bool | None = None,
    ) -> Any:
        """One step.

        Args:
            pixel_values: (batch, channels, height, width) of the configured size.
            position: of the visible block, a name or (top, left) as in the configuration, or numbers (batch,);
                default as described above.
            return_loss: compute the loss; the host's Trainer asks for it by this name in evaluation.
            return_dict: False gives a tuple.

        Returns:
            A :class:`QBHeatOutput`.

        Raises:
            ValueError: images of another or of mixed size, or an unknown position.
        """
        self.masker.check(pixel_values)
        chosen = self._choose(position, len(pixel_values))
        cells = self.filled(pixel_values, chosen)
        image = self.decoder(cells + self.positions.to(cells.dtype))
        number = chosen if isinstance(chosen, Tensor) else torch.tensor([chosen]).expand(len(pixel_values))
        hidden = torch.stack([self.masker.hidden(k) for k in range(len(self.masker.positions))])[number.cpu()]
        hidden = hidden.to(image.device)
        s = self.masker.stride
        mask = hidden.repeat_interleave(s, 1).repeat_interleave(s, 2)
        loss = self._loss(image, pixel_values, mask, cells, hidden) if return_loss else None
        out = QBHeatOutput(loss=loss, reconstruction=image, mask=mask)
        return out.to_tuple() if return_dict is False else out

    def _choose(self, position: Any, batch: int) -> int | Tensor:
        count = len(self.masker.positions)
        if isinstance(position, Tensor):
            if position.shape != (batch,) or not ((position >= 0) & (position < count)).all():
                raise ValueError(f"position must be numbers in 0..{count - 1} for each of {batch} images")
            return position.cpu()
        if position is not None:
            return self.masker.index(position)
        if not self.training:
            return torch.arange(batch) % count
        self._draws += 1
        return self.masker.draw(f"{self.config.seed}/{self._draws}", batch if self.config.per_sample else None)

    def _loss(self, image: Tensor, pixels: Tensor, mask: Tensor, cells: Tensor, hidden: Tensor) -> Tensor:
        config, target = self.config, pixels.float()
        if config.normalise_targets:
            patches = F.pixel_unshuffle(target, self.masker.stride)
            variance, mean = torch.var_mean(patches, dim=1, keepdim=True)
            target = F.pixel_shuffle((patches - mean) / (variance + 1e-6).sqrt(), self.masker.stride)
        error = (image.float() - target).square().mean(1)
        loss = error.mean() if config.loss_on == "all" else error[mask].mean()
        if config.commutator and isinstance(self.fill, LinearExtrapolator | QuadraticExtrapolator):
            loss = loss + config.commutator * self.fill.commutator_penalty().float()
        if config.feature:
            with torch.no_grad():
                whole = self.encode(pixels)
            loss = loss + config.feature * (cells - whole).float().square().mean(1)[hidden].mean()
        return loss

    # --- after training ---------------------------------------------------------------------------------------------

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for an optimiser: no decay on the fill, the mask vector, positions, biases and gains.

        A decay on A and B would pull every step towards repeating the edge.

        Args:
            weight_decay: of everything else.
        """
        free = {id(p) for p in self.fill.parameters()} if self.fill is not None else set()
        free |= {id(self.positions)}
        kept = [p for p in self.parameters() if p.requires_grad and p.ndim > 1 and id(p) not in free]
        names = {id(p) for p in kept}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in names]
        return [{"params": kept, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]

    def export_encoder(self) -> nn.Module:
        """The backbone itself, in evaluation mode, to probe or fine-tune on whole images; fill and decoder are left."""
        return self.backbone.eval()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write weights and configuration.

        Args:
            save_directory: a folder, made if missing.
            kwargs: as in the host.
        """
        # The host would rename weights to the names of the backbone's oldest release, and the decoder's with them.
        kwargs |= {"save_original_format": False, "max_shard_size": "100TB"}
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, backbone: nn.Module | None = None, decoder: nn.Module | None = None
    ) -> QBHeatForPreTraining:
        """Read what ``save_pretrained`` wrote.

        Args:
            path: the folder.
            backbone: of the same shape as the saved one, whose weights are overwritten; may be left out for a
                ``transformers`` model, which is rebuilt from its configuration.
            decoder: of the same shape as the saved one; left out for :class:`SmallDecoder`.

        Returns:
            The model in evaluation mode.

        Raises:
            FileNotFoundError: no such model there.
            ValueError: a backbone that must be given, or weights that do not fit.
        """
        from safetensors.torch import load_model

        folder = Path(path)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} must hold {name} of a saved QBHeatForPreTraining")
        config = QBHeatConfig.from_pretrained(folder)
        model = cls(rebuild(config.backbone_record) if backbone is None else backbone, decoder, config)
        try:
            load_model(model, folder / "model.safetensors")
        except RuntimeError as error:
            raise ValueError(f"{folder} holds weights of another backbone or decoder: {error}") from error
        return model.eval()


def _nearest(seen: tuple[int, ...], length: int) -> list[int]:
    """For each place the number of the visible one nearest to it, the first of two."""
    return [min(range(len(seen)), key=lambda k: abs(seen[k] - place)) for place in range(length)]


def _write_draws(module: Any, prefix: str, keep_vars: bool) -> None:
    module.draws.fill_(module._draws)


def _read_draws(module: Any, keys: Any) -> None:
    module._draws = int(module.draws)
