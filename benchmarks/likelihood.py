"""Log-likelihoods of a batch: danlu against a SciPy loop over the flattened batch, and against flow_matching's default.

The loop is the one that research code has: RK45 of SciPy over samples and log densities of the whole batch in one
vector, with one call for the velocity and one for the divergence. ``one call`` is the same loop with both from a single
call.

    python benchmarks/likelihood.py [--batch 256] [--repeats 7]
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from scipy import integrate
from torch import Tensor, nn

from danlu.diffusion.likelihood import log_likelihood
from danlu.diffusion.mixtures import GaussianMixture
from danlu.diffusion.processes import VP, RectifiedFlow
from danlu.diffusion.targets import Denoiser

TOLERANCES = (1e-4, 1e-5, 1e-6, 1e-7)
FIRST = 1e-5


class Mlp(nn.Module):
    """Predicts the noise in the plane."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Noise in x at t."""
        return self.layers(torch.cat([x, t[:, None]], dim=1))


def plane() -> GaussianMixture:
    return GaussianMixture(
        torch.tensor([0.3, 0.3, 0.4]),
        torch.tensor([[2.0, 0.0], [-1.0, 1.0], [0.0, -2.0]]),
        torch.tensor([[0.3, 0.2], [0.1, 0.4], [0.2, 0.1]]),
    )


def trained(steps: int = 600) -> Mlp:
    torch.manual_seed(0)
    model, data, process = Mlp(), plane(), VP()
    generator = torch.Generator().manual_seed(0)
    descent = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        x0 = data.draw(256, generator).float()
        t = FIRST + (1 - FIRST) * torch.rand(256, generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        loss = (model(process.add_noise(x0, noise, t), t) - noise).square().mean()
        descent.zero_grad()
        loss.backward()
        descent.step()
    return model.eval().requires_grad_(False)


def drift(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """Right side of the ODE of a VP process as research code writes it."""
    beta = 0.1 + 19.9 * t[:, None]
    sigma = (-torch.expm1(-t * (0.1 + 9.95 * t))).sqrt()[:, None]
    return -0.5 * beta * (x - model(x, t) / sigma)


def loop(model: nn.Module, x: Tensor, signs: Tensor, tolerance: float, calls: list[int], single: bool) -> Tensor:
    """SciPy's RK45 over the flattened batch."""
    size = x.numel()

    def slope(t: float, state: numpy.ndarray) -> numpy.ndarray:
        point = torch.from_numpy(state[:size]).float().reshape(x.shape)
        times = torch.full((len(x),), t)
        if not single:
            with torch.no_grad():
                velocity = drift(model, point, times)
            calls[0] += 1
        with torch.enable_grad():
            point.requires_grad_()
            moved = drift(model, point, times)
            calls[0] += 1
            product = torch.autograd.grad(moved, point, signs)[0]
        velocity = moved.detach() if single else velocity
        return numpy.concatenate([velocity.reshape(-1).numpy(), (product * signs).sum(1).numpy()])

    state = numpy.concatenate([x.reshape(-1).numpy(), numpy.zeros(len(x))]).astype(numpy.float64)
    end = integrate.solve_ivp(slope, (FIRST, 1.0), state, rtol=tolerance, atol=tolerance, method="RK45").y[:, -1]
    latents, change = torch.from_numpy(end[:size]).reshape(x.shape), torch.from_numpy(end[size:])
    scale = float(VP().sigma(1.0))
    return -0.5 * (latents / scale).square().sum(1) - 2 * math.log(scale * math.sqrt(2 * math.pi)) + change


def speed(batch: int, repeats: int) -> list[str]:
    model = trained()
    x = plane().draw(batch, 5).float()
    signs = 2.0 * torch.randint(0, 2, (1, *x.shape), generator=torch.Generator().manual_seed(7)) - 1
    denoiser = Denoiser(model, VP(), "epsilon")
    wide = Denoiser(copy.deepcopy(model).double(), VP(), "epsilon")
    tight = {"rtol": 1e-9, "atol": 1e-9, "progress": None}
    exact = log_likelihood(wide, x.double(), **tight).log_prob
    probed = log_likelihood(wide, x.double(), divergence="hutchinson", seed=7, **tight).log_prob
    lines = [
        "| tolerance | method | seconds (median) | calls | solver error, nats | total error, nats | time / ours |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for tolerance in TOLERANCES:
        calls = [0]

        def ours(tolerance: float = tolerance, calls: list[int] = calls, **options: object) -> Tensor:
            out = log_likelihood(denoiser, x, rtol=tolerance, atol=tolerance, progress=None, **options)
            calls[0] = out.evaluations
            return out.log_prob

        def peer(single: bool, tolerance: float = tolerance, calls: list[int] = calls) -> Tensor:
            calls[0] = 0
            return loop(model, x, signs[0], tolerance, calls, single)

        methods: dict[str, Callable[[], Tensor]] = {
            "danlu, one probe": lambda ours=ours: ours(divergence="hutchinson", seed=7),
            "danlu, exact divergence (default)": ours,
            "SciPy loop, one probe": lambda peer=peer: peer(False),
            "SciPy loop, one probe, one call": lambda peer=peer: peer(True),
        }
        first = next(iter(methods))
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        cells: dict[str, str] = {}
        for repeat in range(repeats + 1):
            for name, method in methods.items():
                begin = time.perf_counter()
                result = method()
                if repeat:
                    seconds[name].append(time.perf_counter() - begin)
                solver = float((result - (exact if "default" in name else probed)).abs().max())
                cells[name] = f"{calls[0]} | {solver:.1e} | {float((result - exact).abs().mean()):.1e}"
        for name, cell in cells.items():
            ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[first], strict=True))
            lines.append(f"| {tolerance:g} | {name} | {statistics.median(seconds[name]):.3f} | {cell} | {ratio:.2f} |")
    return lines


def accuracy() -> list[str]:
    """A 4-D Gaussian with its exact velocity, under the straight path: default settings of both libraries."""
    from flow_matching.solver import ODESolver

    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    covariance = root @ root.T / 4 + 0.1 * torch.eye(4, dtype=torch.float64)
    data = GaussianMixture(torch.ones(1), torch.zeros(1, 4), covariance[None])
    x, process = data.draw(64, 1), RectifiedFlow()
    truth = data.log_prob(x, 0.0, process)

    def error(values: Tensor) -> float:
        return float((values - truth).abs().mean())

    class Wrapped(nn.Module):
        def forward(self, x: Tensor, t: Tensor, **extras: object) -> Tensor:
            """Velocity in flow_matching's time, which runs from noise to data; float32, as it supposes."""
            return -data.velocity(x, (1 - t).clamp(1e-6, 1), process).float()

    def normal(end: Tensor) -> Tensor:
        return -0.5 * end.square().sum(1) - 2 * math.log(2 * math.pi)

    solver = ODESolver(Wrapped())
    single = x.float()
    torch.manual_seed(0)
    theirs = solver.compute_likelihood(single, normal, step_size=None)[1]
    exact = solver.compute_likelihood(single, normal, step_size=None, exact_divergence=True)[1]
    adaptive = solver.compute_likelihood(single, normal, step_size=None, exact_divergence=True, method="dopri5")[1]
    ours = log_likelihood(data.denoiser(process), x, progress=None)
    return [
        "| method | mean error, nats |",
        "| --- | ---: |",
        f"| danlu, defaults ({ours.evaluations} calls) | {error(ours.log_prob):.1e} |",
        f"| flow_matching, defaults (Euler, no step size, one probe) | {error(theirs):.1e} |",
        f"| flow_matching, exact divergence | {error(exact):.1e} |",
        f"| flow_matching, exact divergence, dopri5 | {error(adaptive):.1e} |",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    lines = [
        "# Log-likelihoods by the probability-flow ODE",
        "",
        f"Trained MLP in the plane (VP, width 128), batch {options.batch}, one probe, float32, "
        f"{torch.get_num_threads()} threads; {options.repeats} interleaved runs at equal tolerances. Solver error: "
        "largest, against float64 at tolerance 1e-9 with the same probe; total error: mean, against exact divergences.",
        "",
        *speed(options.batch, options.repeats),
        "",
        "danlu's error norm is the largest over samples, the loop's is the root mean square over the batch: at equal "
        "tolerance danlu is more exact. With exact divergences nothing is left of the probe's noise.",
        "",
        "Gaussian in four dimensions, exact velocity of the straight path, 64 samples:",
        "",
        *accuracy(),
    ]
    table = "\n".join(lines) + "\n"
    print(table)
    if vars(options) == {name: parser.get_default(name) for name in vars(options)}:
        Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
