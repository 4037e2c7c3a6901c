"""The claim on rectified flows: straightened by their own pairs, one step is enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from danlu.diffusion.couplings import Pairs
from danlu.diffusion.flow import RK4, VelocityModel
from danlu.diffusion.flow_metrics import energy_distance, nfe_curve, straightness, transport_cost
from danlu.diffusion.mixtures import GaussianMixture
from danlu.diffusion.pair_cache import generate_pairs
from danlu.diffusion.processes import RectifiedFlow
from danlu.diffusion.reflow import distill, reflow
from danlu.diffusion.solvers import sample
from danlu.diffusion.targets import Denoiser
from danlu.lab.claim import Check, Context, Evidence, Plot, Table
from danlu.lab.runner import claim
from danlu.lab.training import seeded

_RADIUS, _SPREAD = 3.0, 0.3
_PAIRS, _SOLVER_STEPS, _TRAINING, _BATCH, _RATE = 20_000, 50, 3000, 512, 2e-3
_HELD_OUT, _NFE = 4000, (1, 2, 4, 8)
FIRST, SECOND, DISTILLED = "1-RF, exact", "2-RF, learned", "distilled, 1 step"


class TimeNet(nn.Module):
    """Three hidden layers over the point and sines and cosines of the time.

    Args:
        width: of the hidden layers.
    """

    turns: Tensor

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.register_buffer("turns", math.pi * torch.tensor([0.5, 1.0, 2.0, 4.0]), persistent=False)
        sizes = (2 + 8, width, width, width)
        hidden = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity at x (batch, 2) and t (batch,)."""
        angles = t[:, None] * self.turns
        return self.layers(torch.cat([x, angles.sin(), angles.cos()], 1))


def ring() -> GaussianMixture:
    """Eight Gaussians on a circle."""
    angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
    means = _RADIUS * torch.stack([angles.cos(), angles.sin()], 1)
    return GaussianMixture(torch.ones(8), means, torch.full((8,), _SPREAD**2))


def exact_flow(mixture: GaussianMixture) -> VelocityModel:
    """The best velocity of straight lines between a mixture and noise that are not coupled."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return mixture.velocity(x.double(), t.double(), RectifiedFlow()).to(x.dtype)

    return velocity


def near(samples: Tensor, mixture: GaussianMixture) -> float:
    """Share of samples within three standard deviations of a mode."""
    distances = torch.cdist(samples.double(), mixture.means).amin(1)
    return float((distances < 3 * mixture.variances[0, 0].sqrt()).double().mean())


def batches(pairs: Pairs, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches of whole pairs."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(pairs), (_BATCH,), generator=generator)
        yield pairs.x0[rows], pairs.x1[rows]


def fit(pairs: Pairs, method: Callable[..., Iterator[Tensor]], steps: int, seed: int, context: Context) -> TimeNet:
    """A new network trained by `reflow` or `distill`, at a rate that falls to 0 as a cosine."""
    with seeded(seed):
        net = TimeNet()
    optimiser = torch.optim.Adam(net.parameters(), _RATE)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    losses = method(net, batches(pairs, steps, seed), optimiser, seed=seed)
    for _ in context.track(losses, description=method.__name__, total=steps):
        rates.step()
    return net.eval()


@claim(
    name="reflow",
    title="A flow trained again on its own pairs needs one step",
    source="archive 9497; arXiv:2209.03003",
    statement="A rectified flow that is trained again on the starts and ends of its own trajectories is nearly "
    "straight: one Euler step gives what the first flow needs many for, and distilling that step fits the pairs "
    "better still.",
    measurement="Eight Gaussians on a circle; the exact first flow makes 20,000 pairs, on which two networks of three "
    "layers of 128 are trained for 3,000 steps, one by reflow and one by distillation of a single step. Energy "
    "distance of 4,000 samples from new noise to new data, squared distance to where the exact flow ends, and "
    "straightness.",
    budget=60,
)
def reflow_claim(context: Context) -> Evidence:
    """Make the pairs, train both networks, and measure all three from the same new noise."""
    seed = context.seeds[0]
    mixture = ring()
    first = exact_flow(mixture)
    folder = context.cache / f"reflow-pairs-{seed}"
    pairs = generate_pairs(
        first, folder, _PAIRS, (2,), seed=seed, steps=_SOLVER_STEPS, batch_size=4096, identity="exact flow to ring()"
    ).load()
    flows: dict[str, VelocityModel] = {
        FIRST: first,
        SECOND: fit(pairs, reflow, _TRAINING, seed, context),
        DISTILLED: fit(pairs, distill, _TRAINING, seed, context),
    }
    data, fresh = (mixture.draw(_HELD_OUT, seed + place).float() for place in (101, 102))
    x1 = torch.randn(_HELD_OUT, 2, generator=torch.Generator().manual_seed(seed + 103))
    truth = sample(Denoiser(first, RectifiedFlow(), "velocity"), solver=RK4(), steps=_SOLVER_STEPS, noise=x1).samples
    measures: dict[str, Callable[[Tensor], float]] = {
        "energy distance": lambda samples: float(energy_distance(samples, data)),
        "near a mode": lambda samples: near(samples, mixture),
        "squared error": lambda samples: float((samples - truth).square().sum(1).mean()),
    }
    found = {
        name: {what: nfe_curve(flow, x1, measure, _NFE) for what, measure in measures.items()}
        for name, flow in flows.items()
    }
    bend = {name: float(straightness(flow, x1[:1000]).mean()) for name, flow in flows.items()}
    floor = float(energy_distance(fresh, data))
    distance = {name: found[name]["energy distance"] for name in flows}
    errors = {name: found[name]["squared error"] for name in flows}
    apart = data[torch.randperm(_HELD_OUT, generator=torch.Generator().manual_seed(seed + 104))]
    costs = float(transport_cost(apart, x1)), float(transport_cost(truth, x1))
    return Evidence(
        summary=f"Energy distance in one step: {distance[FIRST][1]:.2f} for the first flow, {distance[SECOND][1]:.4f} "
        f"after reflow, {distance[DISTILLED][1]:.4f} distilled ({floor:.4f} between two draws of the data); the first "
        f"flow has {distance[FIRST][4]:.3f} in four steps. Straightness {bend[FIRST]:.2f} before, "
        f"{bend[SECOND]:.3f} after.",
        checks=(
            Check(
                "one step after reflow is 100 times nearer to the data than one step before",
                distance[SECOND][1] <= distance[FIRST][1] / 100,
                f"{distance[SECOND][1]:.4f} against {distance[FIRST][1]:.3f}",
            ),
            Check(
                "one step after reflow is at least as near as four steps before",
                distance[SECOND][1] <= distance[FIRST][4],
                f"{distance[SECOND][1]:.4f} against {distance[FIRST][4]:.4f}",
            ),
            Check(
                "distilling the one step has a smaller error to the ends of the flow than reflow",
                errors[DISTILLED][1] < errors[SECOND][1],
                f"{errors[DISTILLED][1]:.4f} against {errors[SECOND][1]:.4f}",
            ),
        ),
        tables=(
            Table(
                "By Euler steps",
                ("flow", "steps", *measures),
                tuple((name, n, *(found[name][what][n] for what in measures)) for name in flows for n in _NFE),
            ),
            Table("Straightness", ("flow", "S"), tuple(bend.items())),
            Table("Transport cost", ("coupling", "E|x1 - x0|^2"), (("independent", costs[0]), ("pairs", costs[1]))),
        ),
        plots=(
            Plot(
                "Distance to the data",
                "Euler steps",
                "energy distance, log10",
                tuple(float(n) for n in _NFE),
                {name: tuple(math.log10(distance[name][n]) for n in _NFE) for name in flows},
                log_x=True,
            ),
            Plot(
                "How far trajectories stray from a line",
                "",
                "S",
                tuple(float(place) for place in range(len(flows))),
                {"straightness": tuple(bend.values())},
                x_names=tuple(bend),
            ),
        ),
        notes=(
            "The first flow is the exact one, so that its pairs have no error of training.",
            "Both networks start from random weights and see the same batches; the source starts each from the "
            "flow before.",
        ),
    )
