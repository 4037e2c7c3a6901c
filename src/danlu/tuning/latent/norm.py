"""Getting past the norm of a latent: DeepSeek's block has an RMSNorm there, and a converted model has no use for it.

RMSNorm(c) = gain * c / sqrt(mean(c^2) + eps) divides by the length of the latent, which differs by token, and no linear
map of fewer channels than the inputs have can make that length constant. What can be done exactly is to make mean(c^2)
vanish against eps: the map into the latent is scaled down by a power of two and the gain scaled up. Floating point
loses nothing by a power of two, and with mean(c^2) below 2^-54 eps the sum *is* eps in double precision.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

#: A gain beyond this is that of a silent norm: no trained norm comes near.
_SILENT_GAIN = 1e6
_VANISHES = 2.0**-54
#: The gains have to fit, and squares may underflow but latents may not.
_SMALLEST = 2.0**-100


def silent_scale(down: Tensor, gain: Tensor, eps: float) -> float:
    """A power of two that makes a latent vanish against eps, for every input there can be.

    Attention reads x = gain * n with mean(n^2) <= 1, so that the latent W x + b is at most
    ``|W diag(gain)|_F sqrt(hidden) + |b|`` long.

    Args:
        down: (rank, hidden + 1) map from [x, 1] to the latent.
        gain: (hidden,) of the norm before attention.
        eps: of the norm behind the latent, > 0.

    Returns:
        The scale of the map; the gain of the norm is ``sqrt(eps) / scale``.

    Raises:
        ValueError: there is no such scale that float32 can hold.
    """
    weight = down[:, :-1] * gain.to(down)
    longest = weight.norm().item() * math.sqrt(len(gain)) + down[:, -1].norm().item()
    mean_square = max(longest**2 / len(down), torch.finfo(torch.float32).tiny)
    scale = 2.0 ** math.floor(math.log2(math.sqrt(_VANISHES * eps / mean_square)))
    if not _SMALLEST < scale < 1 / _SMALLEST:
        raise ValueError(f"norm='silent' needs a scale in float32's range, got {scale:.1e}: use norm='calibrated'")
    return scale


def freeze_silent(model: nn.Module) -> list[str]:
    """Take the projections in front of silent norms out of training, and the gains of the norms.

    They are scaled to about 1e-14, so one step of an optimiser that does not know would destroy them. Everything else
    can be trained. Call it after loading a converted model and before making the optimiser.

    Args:
        model: a model from :func:`to_mla`, with its norms silent; another model is left as it is.

    Returns:
        Names of the parameters that were frozen.
    """
    frozen = []
    for name, module in model.named_modules():
        for norm, projection in (("kv_a_layernorm", "kv_a_proj_with_mqa"), ("q_a_layernorm", "q_a_proj")):
            found: Any = getattr(module, norm, None)
            if found is None or float(found.weight.detach().abs().max()) < _SILENT_GAIN:
                continue
            for local in (norm, projection):
                for part, parameter in getattr(module, local).named_parameters():
                    parameter.requires_grad_(False)
                    frozen.append(f"{name}.{local}.{part}")
    return frozen
