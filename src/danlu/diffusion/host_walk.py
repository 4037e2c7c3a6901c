"""AMED in the coordinates of a host: samples that its network can be given as they are.

Source: arXiv:2312.00094.
"""

from __future__ import annotations

import torch
from torch import Tensor

from danlu.diffusion.amed import time_of_ratio
from danlu.diffusion.amed_steps import AMEDStepper, Base
from danlu.diffusion.amed_table import Lookup
from danlu.diffusion.hosts import Host
from danlu.diffusion.process import as_time, per_sample
from danlu.diffusion.targets import convert


class HostWalk:
    """One run from noise to data over the samples of a pipeline.

    A sample is ``alpha z`` with the alpha of the time that the network is told next, which is ``a m`` and not m inside
    an interval. z is kept in float64 (float32 on mps) as long as the pipeline hands back what it was given.

    Args:
        host: the process, and how the network is spoken to.
        ratios: noise ratios at the ends of the intervals.
        lookup: gives the coefficients of an interval.
        base: see `AMEDStepper`.
        order: likewise.
        afs: likewise.
    """

    def __init__(self, host: Host, ratios: Tensor, lookup: Lookup, base: Base, order: int | None, afs: bool) -> None:
        self.host = host
        self._made = (ratios, lookup, base, order, afs)
        self._stepper = AMEDStepper(*self._made)
        self._end = ratios[-1]
        self._z: Tensor | None = None
        self._handed: Tensor | None = None
        self._scaled = False
        self._arrive(time_of_ratio(host.process, ratios[0]))

    def _arrive(self, time: Tensor) -> None:
        #: Time of the process that the next sample is at, 0-d or (batch,).
        self.time = time
        #: Time that the network is told next: another one only before the first call with an analytical step.
        self.told = time
        self._alpha = self.host.process.alpha(time)

    @property
    def calls(self) -> int:
        """Network calls so far."""
        return self._stepper.calls

    @property
    def misses_scaling(self) -> bool:
        """Whether the network had to be given `input` of the sample and was not."""
        return (self.host.scales_input or self._enters) and not self._scaled

    @property
    def _enters(self) -> bool:
        return self._stepper.afs and not self._stepper.calls

    def input(self, sample: Tensor) -> Tensor:
        """What the network is given for a sample (batch, ...), or for several copies of the batch."""
        self._scaled = True
        if not self._enters and not self.host.scales_input:
            return sample
        x = as_time(sample)
        if self._enters:
            _, self.told, x = self._entered(x)
        return self.host.input(x, repeated(self.told, len(x))).to(sample.dtype)

    def advance(self, output: Tensor, sample: Tensor) -> Tensor:
        """Use one network call: the next sample, in the type of this one.

        Args:
            output: of the network (batch, ...).
            sample: that it was called for.
        """
        x, process = as_time(sample), self.host.process
        if self._enters:
            self._stepper, time, x = self._entered(x)
            self._arrive(time)
            z = x / per_sample(self._alpha, x)
        elif self._z is not None and self._handed is not None and torch.equal(sample, self._handed):
            z = self._z
            x = per_sample(self._alpha, z) * z
        else:
            z = x / per_sample(self._alpha, x)
        prediction = self.host.output(as_time(output), x, self.time)
        z = self._z = self._stepper.advance(
            z, convert(prediction, x, self.time, process, self.host.prediction, "epsilon")
        )
        self._arrive(time_of_ratio(process, self._end if self._stepper.done else self._stepper.time))
        self._scaled = False
        moved = (per_sample(self._alpha, z) * z).to(sample.dtype)
        self._handed = moved.clone()
        return moved

    def _entered(self, x: Tensor) -> tuple[AMEDStepper, Tensor, Tensor]:
        """The analytical first step from the sample x: a stepper after it, its time, and the sample there."""
        process, stepper = self.host.process, AMEDStepper(*self._made)
        z = stepper.begin(x / per_sample(self._alpha, x))
        time = time_of_ratio(process, stepper.time)
        return stepper, time, per_sample(process.alpha(time), z) * z


def repeated(times: Tensor, rows: int) -> Tensor:
    """Times of each sample for several copies of the batch; one time as it is."""
    return times if times.dim() == 0 else times.repeat(rows // len(times))
