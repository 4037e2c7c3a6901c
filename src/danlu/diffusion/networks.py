"""The networks of diffusers' pipelines as AMED sees them: one call with guidance, and features from inside.

Source: arXiv:2312.00094; arXiv:2207.12598 (guidance).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from danlu.diffusion.amed_predictor import Captured


def network_of(model: Any) -> nn.Module:
    """The denoising network of a pipeline, or the network itself.

    Raises:
        TypeError: neither a module nor a pipeline with a ``unet`` or a ``transformer``.
    """
    for candidate in (model, getattr(model, "unet", None), getattr(model, "transformer", None)):
        if isinstance(candidate, nn.Module):
            return candidate
    raise TypeError(f"model must be a network or a pipeline with a unet or a transformer, got {type(model).__name__}")


def sample_shape(network: nn.Module) -> tuple[int, ...]:
    """Shape of one sample by the network's config.

    Raises:
        ValueError: its config does not say.
    """
    config: Mapping[str, Any] = getattr(network, "config", {})
    channels, size = config.get("in_channels"), config.get("sample_size")
    if channels is None or size is None:
        raise ValueError(
            f"shape must be given: the config of {type(network).__name__} has no in_channels and sample_size"
        )
    return (channels, *(size if isinstance(size, list | tuple) else (size, size)))


def guided(
    network: nn.Module,
    conditions: Mapping[str, Any] | None = None,
    unconditional: Mapping[str, Any] | None = None,
    guidance_scale: float = 1.0,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A network with its conditions as a function of samples and timesteps.

    Args:
        network: called as ``network(x, timestep, **conditions)``; returns a tensor, a tuple or an output of diffusers.
        conditions: keyword arguments; tensors of one row serve all samples.
        unconditional: those of the other pass of classifier-free guidance, needed for a scale other than 1.
        guidance_scale: w in ``u + w (c - u)``. Both passes are one call on a batch of twice the size.

    Returns:
        ``model(x, timesteps)`` with timesteps (batch,); a second half of channels (a variance) is left out.

    Raises:
        ValueError: guidance without ``unconditional``, or other names in it.
    """
    with_condition, without = dict(conditions or {}), dict(unconditional or {})
    if guidance_scale != 1.0 and (not without or set(without) != set(with_condition)):
        raise ValueError(
            f"guidance_scale {guidance_scale} needs unconditional with the names of conditions, "
            f"{sorted(with_condition)}, got {sorted(without)}"
        )
    dtype = next((parameter.dtype for parameter in network.parameters() if parameter.is_floating_point()), None)

    def call(x: Tensor, timesteps: Tensor) -> Tensor:
        given = x if dtype is None else x.to(dtype)
        rows = len(x)
        if guidance_scale == 1.0:
            return _called(network, given, timesteps, _for_rows(with_condition, rows))
        first, second = _for_rows(without, rows), _for_rows(with_condition, rows)
        both = {name: _joined(first[name], second[name]) for name in second}
        out = _called(network, torch.cat([given, given]), torch.cat([timesteps, timesteps]), both).to(x.dtype)
        nothing, something = out.chunk(2)
        return nothing + guidance_scale * (something - nothing)

    return call


class PassFeatures(Captured):
    """Features from inside a network that sees several passes of the batch at once: their mean, for every pass alike.

    Args:
        module: whose output is captured.
        passes: passes in one call of the network, for pipelines whose samples repeat them too (DiT's); else they follow
            from the number of rows.
    """

    def __init__(self, module: nn.Module, passes: int | None = None) -> None:
        super().__init__(module)
        self.passes = passes

    def __call__(self, data: Tensor) -> Tensor:
        """Features for the samples, (batch, ...)."""
        seen = self._seen
        if seen is None or len(seen) % len(data):
            found = "no call" if seen is None else f"{len(seen)} rows"
            raise ValueError(
                f"each model call must pass whole copies of the {len(data)} samples, but {found} went through"
            )
        passes = len(seen) // len(data)
        if passes > 1:
            return torch.stack(seen.chunk(passes)).mean(0)
        if self.passes is None or self.passes == 1:
            return seen
        if len(seen) % self.passes:
            raise ValueError(f"a batch of {len(seen)} is not {self.passes} passes")
        mean = torch.stack(seen.chunk(self.passes)).mean(0)
        return torch.cat([mean] * self.passes)


def inner_module(network: nn.Module, feature: str) -> nn.Module:
    """The module of a network whose output are the features.

    Args:
        network: a U-Net or a transformer of diffusers, or any module.
        feature: ``mid_block``, which is the middle block of a transformer, or the name of a submodule.

    Raises:
        ValueError: there is none.
    """
    blocks = getattr(network, "transformer_blocks", None)
    if feature == "mid_block" and getattr(network, "mid_block", None) is None and blocks is not None and len(blocks):
        return blocks[len(blocks) // 2]
    try:
        module = network.get_submodule(feature)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Module) or not feature:
        names = ", ".join(name for name, _ in network.named_children())
        raise ValueError(
            f"{type(network).__name__} has no module {feature!r}: name one (it has {names}), or give a callable"
        )
    return module


def time_place(network: nn.Module) -> tuple[int, str]:
    """Position and name of the argument by which a network is told the time.

    Raises:
        ValueError: there is none.
    """
    names = list(inspect.signature(network.forward).parameters)
    for name in ("timestep", "timesteps", "t"):
        if name in names:
            return names.index(name), name
    raise ValueError(f"{type(network).__name__} must take a timestep, but it takes {', '.join(names)}")


@contextmanager
def home(network: nn.Module) -> Iterator[torch.device]:
    """The device of a network, which is in evaluation mode and without gradients of its weights inside the block."""
    weights = list(network.parameters())
    modes = [(module, module.training) for module in network.modules()]
    needs = [weight.requires_grad for weight in weights]
    try:
        network.eval().requires_grad_(False)
        yield weights[0].device if weights else torch.device("cpu")
    finally:
        for module, training in modes:
            module.training = training
        for weight, need in zip(weights, needs, strict=True):
            weight.requires_grad_(need)


def _called(network: nn.Module, x: Tensor, timesteps: Tensor, conditions: Mapping[str, Any]) -> Tensor:
    place, name = time_place(network)
    out = network(x, timesteps, **conditions) if place == 1 else network(x, **{name: timesteps}, **conditions)
    out = out if isinstance(out, Tensor) else out[0]
    return out.chunk(2, 1)[0] if out.shape[1] == 2 * x.shape[1] else out


def _for_rows(conditions: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Conditions of one row repeated for all samples."""
    return {
        name: value.expand(rows, *value.shape[1:])
        if isinstance(value, Tensor) and value.dim() and len(value) == 1
        else value
        for name, value in conditions.items()
    }


def _joined(first: Any, second: Any) -> Any:
    return torch.cat([first, second]) if isinstance(first, Tensor) and first.dim() else second
