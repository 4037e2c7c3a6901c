"""Solvers with a memory: iPNDM, and the multistep schedulers of diffusers on any process and any times.

Source: arXiv:2202.09778 (PNDM), arXiv:2204.13902 (its improved form); arXiv:2211.01095 (DPM-Solver++) and
arXiv:2302.04867 (UniPC) as diffusers has them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from danlu.diffusion.processes import per_sample
from danlu.diffusion.steps import Solver, Walk, along, straight

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
#: sigma of a flow from which on diffusers keeps it: at 1 the log signal-to-noise ratio is infinite.
_LARGEST_SIGMA = 1 - 1e-6


@dataclass(frozen=True)
class IPNDM(Solver):
    """iPNDM: Adams-Bashforth on the predicted noise in ``x / alpha`` and ``sigma / alpha``; ``order = 1`` is `DDIM`.

    The coefficients are those of equal steps whatever the times are, as published. The first steps are of lower order;
    the first may start from alpha = 0.

    Args:
        order: how many predictions a step uses, 1..4.

    Source: arXiv:2202.09778, arXiv:2204.13902.
    """

    order: int = 4

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3, 4):
            raise ValueError(f"order must be in 1..4, got {self.order}")

    def integrate(self, walk: Walk, x: Tensor) -> Iterator[Tensor]:
        """One call in each interval."""
        latest: list[Tensor] = []
        for t, u in walk.intervals:
            data, noise = walk.components(x, t)
            latest = [noise, *latest][: self.order]
            if len(latest) == 1:
                x = straight(walk.process, data, noise, u)
            else:
                weights = ADAMS_BASHFORTH[len(latest) - 1]
                mean = sum((weight * each for weight, each in zip(weights, latest, strict=True)), torch.zeros_like(x))
                x = along(walk.process, x, mean, t, u)
            yield x


@dataclass(frozen=True)
class HostScheduler(Solver):
    """A multistep scheduler of diffusers, run on any process and any times.

    Samples are handed over as those of the flow with the same signal-to-noise ratio, ``x / (alpha + sigma)`` at noise
    ``sigma / (alpha + sigma)``, which exists at both ends of every process. Where alpha is 0, diffusers' own rule keeps
    that noise at 1 - 1e-6. DPM-Solver++ computes its steps in float32 whatever the dtype.

    Args:
        scheduler: name of a class of diffusers that has ``use_flow_sigmas`` and predictions of the data:
            ``DPMSolverMultistepScheduler`` or ``UniPCMultistepScheduler``.
        options: of its constructor, such as ``solver_order`` (2 unless given) or ``lower_order_final``.

    Raises:
        ValueError: another scheduler, or an option that it does not have or that is decided here.

    Source: arXiv:2211.01095, arXiv:2302.04867.
    """

    scheduler: str = "DPMSolverMultistepScheduler"
    options: Mapping[str, Any] = field(default_factory=dict)

    #: Options that follow from the process and the times.
    _OWN = ("prediction_type", "use_flow_sigmas", "final_sigmas_type")
    _KNOWN = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")

    def __post_init__(self) -> None:
        if self.scheduler not in self._KNOWN:
            raise ValueError(f"scheduler must be one of {', '.join(self._KNOWN)}, got {self.scheduler!r}")
        for name in self.options:
            if name in self._OWN:
                raise ValueError(f"options must not hold {name!r}: it follows from the process and the times")

    def integrate(self, walk: Walk, x: Tensor) -> Iterator[Tensor]:
        """One call in each interval."""
        alphas, sigmas = walk.process.alpha(walk.times), walk.process.sigma(walk.times)
        totals = alphas + sigmas
        levels = (sigmas / totals).clamp_max(_LARGEST_SIGMA)
        host = self._host(len(walk.times) - 1, "zero" if levels[-1] == 0 else "sigma_min")
        host.sigmas = levels.to(torch.float32) if x.device.type == "mps" else levels
        takes_generator = "generator" in inspect.signature(host.step).parameters
        options = {"generator": walk.generator} if takes_generator else {}
        for place, (t, _) in enumerate(walk.intervals):
            data, _ = walk.components(x, t)
            moved = host.step(
                data, host.timesteps[place], x / per_sample(totals[place], x), return_dict=False, **options
            )
            x = per_sample(totals[place + 1], x) * moved[0].to(x.dtype)
            yield x

    def _host(self, steps: int, final: str) -> Any:
        try:
            import diffusers
        except ImportError as error:
            raise ImportError(
                f'{self.scheduler} is diffusers\' and diffusers is not installed: pip install "danlu[diffusion]"'
            ) from error
        kind = getattr(diffusers, self.scheduler)
        known = inspect.signature(kind.__init__).parameters
        if unknown := sorted(set(self.options) - set(known)):
            raise ValueError(f"options must be options of {self.scheduler}, got {', '.join(unknown)}")
        host = kind(prediction_type="sample", use_flow_sigmas=True, final_sigmas_type=final, **self.options)
        host.set_timesteps(steps)
        host.set_begin_index(0)
        return host
