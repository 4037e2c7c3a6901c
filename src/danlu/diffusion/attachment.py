"""Times of each sample in pipelines of diffusers that have none: hooks on the network of an `AMEDScheduler`.

Source: Scientific Spaces archive 9881; arXiv:2312.00094.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from danlu.diffusion.amed import AMED, predicted
from danlu.diffusion.amed_predictor import AMEDPredictor, Features
from danlu.diffusion.amed_table import Coefficients
from danlu.diffusion.networks import PassFeatures, inner_module, network_of, time_place

if TYPE_CHECKING:
    from danlu.diffusion.schedulers import AMEDScheduler


class Attachment:
    """A predictor at work in a pipeline, until `detach` (or the end of a ``with`` block). See `attach`."""

    def __init__(self, scheduler: AMEDScheduler, network: nn.Module, solver: AMED, features: str | Features) -> None:
        self.scheduler, self.solver, self.features = scheduler, solver, features
        self._place, self._name = time_place(network)
        self._hook = network.register_forward_pre_hook(self._tell, with_kwargs=True)
        scheduler.follow(self)

    def detach(self) -> None:
        """Take all hooks off: network and scheduler are as before."""
        self._hook.remove()
        if isinstance(self.features, PassFeatures):
            self.features.remove()
        if self.scheduler.attachment is self:
            self.scheduler.follow(None)

    def lookup(self, interval: int, z: Tensor, epsilon: Tensor | None) -> Coefficients:
        """Coefficients for the samples z at the start of an interval."""
        solver = self.solver
        assert isinstance(solver.coefficients, AMEDPredictor)
        if solver.shape is not None and tuple(z.shape[1:]) != tuple(solver.shape):
            raise ValueError(
                f"samples must have the shape that the predictor was trained for, {tuple(solver.shape)}, got "
                f"{tuple(z.shape[1:])}: train again, or store its averages (scheduler.store) and detach it"
            )
        predictor = solver.coefficients.to(z.device)
        return predicted(predictor, self.features, solver.ratios, interval, z, epsilon)

    def __enter__(self) -> Attachment:
        """Use as a context that detaches at its end."""
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Detach."""
        self.detach()

    def _tell(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace the one time of a pipeline by the times of the samples."""
        inside = len(args) > self._place
        given = args[self._place] if inside else kwargs.get(self._name)
        sample = args[0] if args else next((value for value in kwargs.values() if isinstance(value, Tensor)), None)
        if given is None or sample is None:
            return None
        times = self.scheduler.times_to_tell(given, len(sample))
        if times is None:
            return None
        dtype = given.dtype if isinstance(given, Tensor) and given.is_floating_point() else torch.float32
        times = times.to(device=sample.device, dtype=dtype)
        if inside:
            return (*args[: self._place], times, *args[self._place + 1 :]), kwargs
        return args, {**kwargs, self._name: times}


def attach(
    scheduler: AMEDScheduler,
    model: Any,
    solver: AMED,
    feature: str | Features | None = None,
    passes: int | None = None,
) -> Attachment:
    """Let a predictor choose the times of every sample in an unchanged pipeline.

    A hook reads 64 features of each sample inside the network (their gradient is cut), and another replaces the time
    that the pipeline tells the network by the times of the samples. ``scheduler.timesteps`` then holds averages, and
    each entry still stands for one call of the network.

    Args:
        scheduler: of the pipeline; made with the solver's base, order and first step.
        model: the pipeline, or its network.
        solver: trained by `train_amed` for the scheduler's process.
        feature: ``sample`` (the data that the network predicts), ``mid_block`` (of a U-Net, pooled to 8 x 8; the middle
            block of a transformer, pooled over tokens), the name of a submodule, or a callable that gets the predicted
            data after each call and returns (batch, ...). It must be what the solver was trained with: by default that
            itself.
        passes: passes of guidance in one call for pipelines whose samples repeat them too (2 for DiT's with guidance);
            for the others the passes follow from the batch. Their features are averaged.

    Returns:
        An `Attachment`: ``.detach()``, or a context manager.

    Raises:
        ValueError: a static solver, one for another process, base, order or first step, a network without such a
            module, or a scheduler with a predictor attached.

    Source: Scientific Spaces archive 9881; arXiv:2312.00094.
    """
    if not isinstance(solver.coefficients, AMEDPredictor):
        raise ValueError(
            "solver must have a predictor, got a table of coefficients: scheduler.store(solver) runs it anywhere"
        )
    if scheduler.attachment is not None:
        raise ValueError("the scheduler has a predictor attached: detach it first")
    if passes is not None and (isinstance(passes, bool) or passes < 1):
        raise ValueError(f"passes must be at least 1, got {passes}")
    scheduler.check_solver(solver)
    network = network_of(model)
    time_place(network)
    chosen = solver.features if feature is None else feature
    if isinstance(chosen, str) and chosen != "sample":
        chosen = PassFeatures(inner_module(network, chosen), passes)
    return Attachment(scheduler, network, solver, chosen)
