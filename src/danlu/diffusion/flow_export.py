"""Networks of diffusers as velocities, and flows as pipelines of diffusers.

Three conventions are about. Here, and in diffusers' flow-matching schedulers, t = 1 is noise and a velocity is noise
minus data; diffusers tells its networks 1000 t. In the published code of rectified flows t = 1 is data, a velocity
is data minus noise, and the network is told 999 t.

Source: Scientific Spaces archive 9497; arXiv:2209.03003.
"""

from __future__ import annotations

import inspect
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from danlu.diffusion.reflow import distilled_steps
from danlu.files import replacing_folder

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler


class FlowNetwork(nn.Module):
    """A network called as ``network(x, timestep)`` that serves as ``model(x, t)`` with t in 0..1.

    Args:
        network: such as ``UNet2DModel`` or a transformer of diffusers; its first argument is the sample, and its
            time is an argument called ``timestep`` or else the second.
        time_scale: what the network is told is this times t: 1000 for networks of diffusers, except for those whose
            pipeline divides by 1000 first (Flux: 1).
        data_at_one: the network comes from code where t = 1 is data and velocities point to the data, such as the
            published rectified flows (with ``time_scale=999``): time and sign are turned round.

    Raises:
        ValueError: a scale that is not positive.

    Source: arXiv:2209.03003.
    """

    def __init__(self, network: nn.Module, time_scale: float = 1000.0, data_at_one: bool = False) -> None:
        super().__init__()
        if not 0 < time_scale < math.inf:
            raise ValueError(f"time_scale must be above 0 and finite, got {time_scale}")
        self.network = network
        self.time_scale, self.data_at_one = time_scale, data_at_one
        self._named = "timestep" in inspect.signature(network.forward).parameters

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """Velocity at x (batch, ...) and t (batch,); conditions go to the network by name."""
        timestep = self.time_scale * (1 - t if self.data_at_one else t)
        output = (
            self.network(x, timestep=timestep, **condition) if self._named else self.network(x, timestep, **condition)
        )
        if not isinstance(output, Tensor):
            output = output[0]
        return -output if self.data_at_one else output


def flow_scheduler(steps: int) -> FlowMatchEulerDiscreteScheduler:
    """A scheduler of diffusers whose Euler steps are ours: at ``1, (steps - 1) / steps, ..., 1 / steps``.

    By default the scheduler of diffusers spreads its steps from 1 to 1/1000 and then jumps to 0, which is another
    grid and wastes a call: two steps would be one of length 0.999 and one of 0.001. The grid is set for this number
    of steps: call pipelines with ``num_inference_steps=steps``.

    Args:
        steps: of sampling, at least 1.

    Returns:
        A ``FlowMatchEulerDiscreteScheduler`` for networks that are told 1000 t.

    Raises:
        ImportError: diffusers is missing.
        ValueError: steps below 1 or above 1000.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= 1000:
        raise ValueError(f"steps must be an integer in 1..1000, got {steps!r}")
    try:
        from diffusers import FlowMatchEulerDiscreteScheduler
    except ImportError as error:
        raise ImportError('schedulers of diffusers need it: pip install "danlu[diffusion]"') from error
    return FlowMatchEulerDiscreteScheduler(shift_terminal=1 / steps if steps > 1 else None)


def export_flow(model: FlowNetwork, folder: str | os.PathLike[str], steps: int | None = None) -> Path:
    """Write a flow as a pipeline that diffusers loads and runs by itself.

    ``DiffusionPipeline.from_pretrained(folder)(batch_size, num_inference_steps=steps)`` then gives the samples of
    ``sample(model, RectifiedFlow(), "velocity", solver="euler", steps=steps)``, scaled from -1..1 to images. For a
    network that belongs to another pipeline, put it and `flow_scheduler` there instead.

    Args:
        model: around a ``UNet2DModel``, with diffusers' own time and sign.
        folder: to write; replaced as a whole.
        steps: of sampling; a distilled model knows its own.

    Returns:
        The folder.

    Raises:
        TypeError: the network is not a ``UNet2DModel``.
        ValueError: no steps, other steps than those the model was distilled for, or a time scale or sign that the
            scheduler does not have.
        ImportError: diffusers is missing.

    Source: Scientific Spaces archive 9497.
    """
    try:
        from diffusers import DDPMPipeline, UNet2DModel
    except ImportError as error:
        raise ImportError('pipelines of diffusers need it: pip install "danlu[diffusion]"') from error
    network = model.network if isinstance(model, FlowNetwork) else model
    if not isinstance(model, FlowNetwork) or not isinstance(network, UNet2DModel):
        raise TypeError(
            f"model must be a FlowNetwork around a UNet2DModel, got {type(network).__name__}: for another network use "
            "its own pipeline with scheduler=flow_scheduler(steps)"
        )
    if model.data_at_one or model.time_scale != 1000:
        raise ValueError(
            "the scheduler tells its network 1000 t and takes noise minus data, but this one has "
            f"time_scale={model.time_scale:g} and data_at_one={model.data_at_one}: distil or reflow into one with the "
            "defaults"
        )
    known = distilled_steps(model)
    if steps is None and known is None:
        raise ValueError("steps must be given for a model that was not distilled")
    if steps is not None and known is not None and steps != known:
        raise ValueError(f"steps must be {known}, which the model was distilled for, got {steps}")
    chosen = known if steps is None else steps
    pipeline = DDPMPipeline(unet=network, scheduler=flow_scheduler(chosen))  # type: ignore[arg-type]
    with replacing_folder(Path(folder)) as new, torch.no_grad():
        pipeline.save_pretrained(str(new))
    return Path(folder)
