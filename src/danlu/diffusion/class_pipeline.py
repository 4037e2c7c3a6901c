"""A pipeline of diffusers for image models that know classes, with any scheduler.

Source: arXiv:2207.12598 (guidance).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    from diffusers import DDPMPipeline, ImagePipelineOutput
except ImportError as error:
    raise ImportError('ClassPipeline needs diffusers: pip install "danlu[diffusion]"') from error


class ClassPipeline(DDPMPipeline):
    """Images of given classes: ``ClassPipeline.from_pretrained(folder)(class_labels=[3, 7], guidance_scale=2.0)``.

    The last class of the network's table stands for none, as in classifier-free training.

    Args:
        unet: a ``UNet2DModel``, with ``num_class_embeds`` of one more than the classes, or without classes.
        scheduler: of diffusers, or an `AMEDScheduler`.
    """

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | Tensor | None = None,
        batch_size: int | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        latents: Tensor | None = None,
    ) -> Any:
        """Sample.

        Args:
            class_labels: one class for each image; none means images of any class.
            batch_size: number of images without classes, 1 unless given.
            guidance_scale: 1 samples the model; more is more typical of the class.
            num_inference_steps: of the scheduler.
            generator: source of the noise.
            output_type: ``pil``, ``np`` or ``pt`` ((images, channels, side, side) in 0..1).
            return_dict: an ``ImagePipelineOutput`` or a tuple.
            latents: standard normal noise to start from instead of drawn noise.

        Returns:
            The images.

        Raises:
            ValueError: classes that the network does not have, or guidance without classes.
        """
        labels = self._labels(class_labels, batch_size, guidance_scale)
        count = len(labels) if labels is not None else batch_size or 1
        side = self.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        shape = (count, self.unet.config.in_channels, height, width)
        if latents is None:
            place = "cpu" if generator is None else generator.device
            latents = torch.randn(shape, generator=generator, device=place)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents must be {shape}, got {tuple(latents.shape)}")
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        x = latents.to(self.device, torch.float32) * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            given = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
            output = guided(self.unet, given.to(self.unet.dtype), t, labels, guidance_scale).float()
            x = self.scheduler.step(output, t, x, return_dict=False)[0]
        images = (x / 2 + 0.5).clamp(0, 1).cpu()
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).float().numpy()
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _labels(self, given: Sequence[int] | Tensor | None, count: int | None, guidance: float) -> Tensor | None:
        known = self.unet.config.num_class_embeds
        if known is None:
            if given is not None or guidance != 1:
                raise ValueError("class_labels and guidance_scale need a model with classes, which this one is not")
            return None
        if given is None:
            if guidance != 1:
                raise ValueError(f"guidance_scale {guidance} needs class_labels")
            return torch.full((count or 1,), known - 1, device=self.device)
        labels = torch.as_tensor(given, device=self.device)
        if count not in (None, len(labels)):
            raise ValueError(f"batch_size must be the number of class_labels {len(labels)}, got {count}")
        if bool(((labels < 0) | (labels >= known)).any()):
            raise ValueError(f"class_labels must be in 0..{known - 2} ({known - 1} is no class), got {labels.tolist()}")
        return labels


def guided(unet: Any, x: Tensor, t: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
    """The network's output, with classifier-free guidance ``none + w (class - none)`` where ``w`` is not 1.

    Args:
        unet: a ``UNet2DModel``.
        x: samples (batch, channels, height, width).
        t: timestep, or one for each.
        labels: classes (batch,), or None for a network without.
        guidance: w. Both outputs come from one call on twice the batch.
    """
    if labels is None or guidance == 1:
        return unet(x, t, class_labels=labels, return_dict=False)[0]
    none = torch.full_like(labels, unet.config.num_class_embeds - 1)
    t = torch.cat([t, t]) if t.dim() else t
    output = unet(torch.cat([x, x]), t, class_labels=torch.cat([labels, none]), return_dict=False)[0]
    of_class, of_none = output.chunk(2)
    return of_none + guidance * (of_class - of_none)
