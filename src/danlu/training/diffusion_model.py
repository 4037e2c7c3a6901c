"""A small image model: network, scheduler and names of classes, as a folder that diffusers loads as a pipeline."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danlu.diffusion.hosts import Host, process_from_scheduler
from danlu.diffusion.targets import Denoiser
from danlu.files import replacing_folder, write_whole
from danlu.training.image_tables import Network, Noise

#: Where the names of the classes lie beside the pipeline's files.
CLASSES = "classes.json"


@dataclass(frozen=True)
class ImageModel:
    """A trained image model.

    Args:
        unet: diffusers' ``UNet2DModel``.
        scheduler: of diffusers; says process and prediction.
        classes: names, empty without classes. The network has one more, which stands for none.
    """

    unet: Any
    scheduler: Any
    classes: tuple[str, ...]

    @property
    def host(self) -> Host:
        """The process, and how the network is spoken to."""
        return process_from_scheduler(self.scheduler)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image: channels, height, width."""
        side = self.unet.config.sample_size
        return self.unet.config.in_channels, side, side

    def labels(self, names: Sequence[str], count: int) -> Tensor | None:
        """One class for each of ``count`` images, the named ones in turn; None without classes.

        Raises:
            ValueError: a name that the model does not know.
        """
        if not self.classes:
            if names:
                raise ValueError(
                    f"the model was trained without classes, so that none can be asked for, got {names[0]!r}"
                )
            return None
        for name in names:
            if name not in self.classes:
                raise ValueError(f"class must be one of {', '.join(self.classes)}, got {name!r}")
        places = torch.tensor([self.classes.index(name) for name in names or self.classes])
        return places.repeat(-(-count // len(places)))[:count].to(self.unet.device)

    def no_label(self, count: int) -> Tensor | None:
        """The class that stands for none, for ``count`` images."""
        return torch.full((count,), len(self.classes), device=self.unet.device) if self.classes else None

    def denoiser(self, labels: Tensor | None = None, guidance: float = 1.0) -> Denoiser:
        """The network as a `Denoiser` in the time of its process.

        Args:
            labels: classes (batch,) of the samples it will be given; None: of no class, whatever the batch.
            guidance: 1 is none.
        """
        from danlu.diffusion.class_pipeline import guided

        def network(x: Tensor, t: Tensor) -> Tensor:
            return guided(self.unet, x, t, self.no_label(len(x)) if labels is None else labels, guidance)

        return self.host.denoiser(network)

    def save(self, folder: str | Path) -> None:
        """Write the pipeline, whole or not at all."""
        from diffusers import DDPMPipeline

        with replacing_folder(folder) as new:
            DDPMPipeline(self.unet, self.scheduler).save_pretrained(new)
            write_whole(new / CLASSES, json.dumps(list(self.classes)) + "\n")

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> ImageModel:
        """Read what `save` wrote, or another unconditional pipeline with a ``UNet2DModel``.

        Raises:
            ValueError: a pipeline of another kind, or names that do not fit the network.
            ImportError: diffusers is missing.
        """
        try:
            from diffusers import UNet2DModel
        except ImportError as error:
            raise ImportError('image models need diffusers: pip install "danlu[diffusion]"') from error
        from danlu.diffusion.hosts import load_scheduler

        folder = Path(folder)
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        if index.get("unet", ["", ""])[1] != "UNet2DModel" or "scheduler" not in index:
            raise ValueError(
                f"{folder} must hold a pipeline of a UNet2DModel and a scheduler, got {index.get('_class_name')}"
            )
        unet = UNet2DModel.from_pretrained(folder / "unet").to(device).eval()
        names = folder / CLASSES
        classes = tuple(json.loads(names.read_text(encoding="utf-8"))) if names.is_file() else ()
        if unet.config.num_class_embeds != (len(classes) + 1 if classes else None):
            raise ValueError(
                f"{names} must name the {unet.config.num_class_embeds or 0} classes of the network less one, "
                f"got {len(classes)}"
            )
        return cls(unet, load_scheduler(folder / "scheduler"), classes)


def build_unet(network: Network, side: int, channels: int, classes: int, seed: int) -> Any:
    """A new U-Net.

    Args:
        network: sizes.
        side: of the images.
        channels: of the images.
        classes: number of classes, 0 for none.
        seed: of the weights.

    Raises:
        ValueError: more levels than the side can be halved for.
    """
    from diffusers import UNet2DModel

    levels = len(network.channels)
    if side % 2 ** (levels - 1):
        raise ValueError(
            f"images must have a side that can be halved {levels - 1} times for {levels} levels, got {side}: choose "
            "another --size, or fewer network.channels"
        )
    attended = {"none": range(0), "last": range(levels - 1, levels), "all": range(levels)}[network.attention]
    downs = tuple("AttnDownBlock2D" if level in attended else "DownBlock2D" for level in range(levels))
    ups = tuple("AttnUpBlock2D" if level in attended else "UpBlock2D" for level in reversed(range(levels)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=side,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=network.channels,
            layers_per_block=network.layers,
            down_block_types=downs,
            up_block_types=ups,
            add_attention=network.attention != "none",
            attention_head_dim=8,
            # Groups of four channels or more: a channel normalised by itself loses the shift that says time and class.
            norm_num_groups=math.gcd(*network.channels) // 4,
            num_class_embeds=classes + 1 if classes else None,
        )


def build_scheduler(noise: Noise) -> Any:
    """The scheduler of diffusers that stands for a recipe's process and prediction."""
    try:
        from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
    except ImportError as error:
        raise ImportError('image models need diffusers: pip install "danlu[diffusion]"') from error
    if noise.kind == "flow":
        return FlowMatchEulerDiscreteScheduler()
    return DDIMScheduler(
        beta_schedule="linear" if noise.kind == "linear" else "squaredcos_cap_v2",
        prediction_type="v_prediction" if noise.prediction == "v" else noise.prediction,
        clip_sample=False,
        timestep_spacing="trailing",
        set_alpha_to_one=False,
    )
