"""AMED-Plugin against training-free solvers at 3 to 9 model calls, on mixtures with their exact models.

Errors are mean distances from where 400 Heun steps lead 1,000 noises that no training saw. Each rival has its best of
three spacings, with and without an analytical first step. Then the cost of a run beside iPNDM with as many calls.

    python benchmarks/amed.py [--iterations 300] [--trajectories 1024] [--dimensions 2 16 64] [--published]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from danlu.diffusion.amed_training import AMEDRecipe, train_amed
from danlu.diffusion.multistep import IPNDM
from danlu.diffusion.processes import EDM
from danlu.diffusion.solvers import sample
from danlu.lab.amed import LIMITS, distance, held_out, mixture, rivals, trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--trajectories", type=int, default=1024)
    parser.add_argument("--dimensions", type=int, nargs="+", default=[2, 16, 64])
    parser.add_argument("--published", action="store_true", help="also train by the recipe of the paper")
    options = parser.parse_args()
    recipe = AMEDRecipe(endpoint_iterations=options.iterations, trajectories=options.trajectories)
    recipes = {"AMED-Plugin": recipe}
    if options.published:
        recipes["AMED-Solver as published"] = AMEDRecipe.published(extra=9)
        recipes["AMED-Plugin as published"] = AMEDRecipe.published("ipndm", extra=9)
    lines = [
        "# AMED against training-free solvers",
        "",
        f"Mean distance from the exact end, exact models of Gaussian mixtures; {options.iterations} training steps on "
        f"{options.trajectories} trajectories, {torch.get_num_threads()} threads. `ratio` is AMED-Plugin by the best "
        "rival.",
    ]
    for dimensions in options.dimensions:
        lines += table(dimensions, recipes)
    lines += overhead()
    text = "\n".join(lines) + "\n"
    print(text)
    if vars(options) == vars(parser.parse_args([])):
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


def table(dimensions: int, recipes: dict[str, AMEDRecipe]) -> list[str]:
    denoiser = mixture(dimensions).denoiser(EDM())
    noise, reference = held_out(denoiser, dimensions)
    rows: dict[str, list[str]] = {}
    for calls in LIMITS:
        others = rivals(denoiser, calls, noise, reference)
        best = min(error for error, _ in others.values())
        for name, (error, setting) in others.items():
            rows.setdefault(name, []).append(f"{error:.4f} ({setting})")
        for name, recipe in recipes.items():
            began = time.perf_counter()
            solver = trained(denoiser, dimensions, calls, recipe, 0)
            seconds = time.perf_counter() - began
            error, counted = distance(denoiser, solver, solver.times, noise, reference)
            average, _ = distance(denoiser, solver.static(), solver.times, noise, reference)
            if counted != calls:
                raise RuntimeError(f"{name} took {counted} calls instead of {calls}")
            rows.setdefault(f"**{name}**", []).append(f"{error:.4f}")
            rows.setdefault(f"{name}, averages for all samples", []).append(f"{average:.4f}")
            rows.setdefault(f"{name}, training in seconds", []).append(f"{seconds:.1f}")
            if name == "AMED-Plugin":
                rows.setdefault("ratio (at most)", []).append(f"**{error / best:.2f}** ({LIMITS[calls]:g})")
    head = ["", f"## Mixture in {dimensions} dimensions", ""]
    head.append("| solver | " + " | ".join(f"{calls} calls" for calls in LIMITS) + " |")
    head.append("| --- |" + " ---: |" * len(LIMITS))
    return head + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]


def overhead() -> list[str]:
    """A convolutional model of some milliseconds a call: a run of 5 calls by AMED, by its averages, and by iPNDM."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 64, 3, padding=1), *(torch.nn.Conv2d(64, 64, 3, padding=1) for _ in range(6))]
    net = torch.nn.Sequential(*layers, torch.nn.Conv2d(64, 3, 3, padding=1)).requires_grad_(False)

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return net(x) * t.reshape(-1, 1, 1, 1).cos()

    quick = AMEDRecipe(trajectories=4, batch=4, extra=0, endpoint_iterations=1)
    amed = train_amed(model, (3, 32, 32), 3, EDM(), recipe=quick, held_out=4, progress=None)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    grid = torch.logspace(1.9, -2.6, 6, dtype=torch.float64)
    runs = {
        "iPNDM-4": (IPNDM(), grid),
        "AMED-Plugin": (amed, amed.times),
        "AMED-Plugin, averages": (amed.static(), amed.times),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(15):
        for name, (solver, times) in runs.items():
            began = time.perf_counter()
            sample(model, EDM(), solver=solver, times=times, noise=x, progress=None)
            seconds[name].append(time.perf_counter() - began)
    lines = ["", "## Cost of a run of 5 calls", "", "Convolutional model, 4 pictures of 3 x 32 x 32.", ""]
    lines += ["| solver | ms (median) | ratio to iPNDM-4 (median of pairs) |", "| --- | ---: | ---: |"]
    for name, taken in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(taken, seconds["iPNDM-4"], strict=True))
        lines.append(f"| {name} | {1e3 * statistics.median(taken):.1f} | {ratio:.3f} |")
    return lines


if __name__ == "__main__":
    main()
