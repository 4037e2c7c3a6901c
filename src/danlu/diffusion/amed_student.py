"""A solver of AMED while it is trained: the trainable parts, and the walk that gradients flow through."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from danlu.diffusion.amed import predicted, time_of_ratio
from danlu.diffusion.amed_predictor import AMEDPredictor, Features
from danlu.diffusion.amed_steps import AMEDStepper, Base
from danlu.diffusion.amed_table import Coefficients
from danlu.diffusion.process import per_sample
from danlu.diffusion.steps import Walk
from danlu.diffusion.targets import Denoiser

#: Bases whose step uses the directions of earlier intervals.
MULTISTEP = ("ipndm", "dpm++")
#: Places that the search for the first middles tries: the best one of a long interval is close to its start.
_CANDIDATES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Student(nn.Module):
    """Predictor and times of a solver in training.

    Args:
        denoiser: the frozen model.
        ratios: noise ratios at the ends of the intervals.
        predictor: of the coefficients.
        base: see `AMEDStepper`.
        order: likewise.
        afs: likewise.
        features: of the predictor.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        ratios: Tensor,
        predictor: AMEDPredictor,
        base: Base,
        order: int | None,
        afs: bool,
        features: str | Features,
    ) -> None:
        super().__init__()
        self.walk = Walk(denoiser, ratios)
        self.base, self.order, self.afs, self.features = base, order, afs, features
        self.predictor = predictor
        logs = ratios.log()
        self.ends = (float(ratios[0]), float(ratios[-1]))
        #: Log shares that the intervals have of the way in log(sigma / alpha).
        self.shares = nn.Parameter((logs[:-1] - logs[1:]).log())

    def ratios(self) -> Tensor:
        """Noise ratios at the ends of the intervals; first and last never move."""
        first, last = self.ends
        within = self.shares.softmax(0).cumsum(0)[:-1] * torch.tensor(first / last, dtype=torch.float64).log()
        ends = torch.tensor([first, last], dtype=torch.float64)
        return torch.cat([ends[:1], first * (-within).exp(), ends[1:]])

    def stepper(self, ratios: Tensor) -> AMEDStepper:
        """A new walk by the predictor, differentiable by the ratios too."""

        def lookup(interval: int, z: Tensor, epsilon: Tensor | None) -> Coefficients:
            return predicted(self.predictor, self.features, ratios, interval, z, epsilon)

        return AMEDStepper(ratios, lookup, self.base, self.order, self.afs)

    def epsilon(self, z: Tensor, ratio: Tensor) -> Tensor:
        """Noise that the model predicts in z when it is told a ratio."""
        process = self.walk.process
        time = time_of_ratio(process, ratio)
        return self.walk.components(per_sample(process.alpha(time), z) * z, time)[1].to(z.dtype)

    def cross(self, stepper: AMEDStepper, z: Tensor) -> Tensor:
        """Z at the end of the interval that the stepper is in."""
        interval = stepper.interval
        if stepper.afs and not stepper.calls:
            z = stepper.begin(z)
        while not stepper.done and stepper.interval == interval:
            z = stepper.advance(z, self.epsilon(z, stepper.time))
        return z

    def forward(self, z: Tensor) -> Tensor:
        """Z at the last ratio."""
        stepper = self.stepper(self.ratios())
        while not stepper.done:
            z = self.cross(stepper, z)
        return z

    def by_interval(self, states: Tensor) -> Iterator[Tensor]:
        """Distances to the teacher at the end of one interval after the other, squared and summed: (batch,).

        Args:
            states: of the teacher at all ratios (intervals + 1, batch, ...). A base without a memory starts every
                interval from there; the others go on from where they came out themselves.
        """
        stepper = self.stepper(self.ratios().detach())
        z = states[0]
        for start, target in zip(states[:-1], states[1:], strict=True):
            z = self.cross(stepper, z if self.base in MULTISTEP else start)
            yield (z - target).flatten(1).square().sum(1)
            z = z.detach()
            stepper.detach()

    @torch.no_grad()
    def search(self, states: Tensor) -> list[float]:
        """First places of the middles, with c = a = 1.

        One interval after the other takes the place that comes closest to the teacher. With a memory the choice of one
        interval spoils a later one sometimes: the result is kept only if it ends closer than 1/2 everywhere does.
        """
        chosen: list[float] = []
        stepper, z = self._walk_by(0.5), states[0]
        for start, target in zip(states[:-1], states[1:], strict=True):
            tried = []
            for place in _CANDIDATES:
                trial = copy.copy(stepper)
                trial.lookup = self._walk_by(place).lookup
                reached = self.cross(trial, z if self.base in MULTISTEP else start)
                tried.append(((reached - target).flatten(1).norm(dim=1).mean().item(), place, reached, trial))
            _, best, z, stepper = min(tried, key=lambda entry: entry[:2])
            chosen.append(best)
        halves = [0.5] * len(chosen)
        return min(chosen, halves, key=lambda places: self._distance(places, states))

    def _walk_by(self, *places: float) -> AMEDStepper:
        """A walk with given places of the middles, one for each interval or one for all."""

        def lookup(interval: int, z: Tensor, epsilon: Tensor | None) -> Coefficients:
            one = torch.ones((), dtype=torch.float64)
            return Coefficients(places[interval % len(places)] * one, one, one)

        return AMEDStepper(self.ratios().detach(), lookup, self.base, self.order, self.afs)

    def _distance(self, places: list[float], states: Tensor) -> float:
        stepper, z = self._walk_by(*places), states[0]
        while not stepper.done:
            z = self.cross(stepper, z)
        return float((z - states[-1]).flatten(1).norm(dim=1).mean())

    @torch.no_grad()
    def averages(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """r, c and a of every interval averaged over samples: each (intervals,)."""
        seen: list[Coefficients] = []
        ratios = self.ratios()

        def lookup(interval: int, z: Tensor, epsilon: Tensor | None) -> Coefficients:
            seen.append(predicted(self.predictor, self.features, ratios, interval, z, epsilon))
            return seen[-1]

        stepper = AMEDStepper(ratios, lookup, self.base, self.order, self.afs)
        while not stepper.done:
            z = self.cross(stepper, z)
        r, c, a = (torch.stack([getattr(one, name).double().mean() for one in seen]) for name in ("r", "c", "a"))
        return r, c, a
