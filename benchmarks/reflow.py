"""What a training step and a pair of a reflow cost beside the network alone.

The peer is the bare loop: the same forward and backward passes of the same network with nothing around them, and for
pairs the same number of forward passes. Pairs are written to a folder, as in use.

    python benchmarks/reflow.py [--width 64] [--batch 32] [--repeats 15]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from danlu.diffusion.couplings import Pairs
from danlu.diffusion.flow_export import FlowNetwork
from danlu.diffusion.pair_cache import generate_pairs
from danlu.diffusion.reflow import distill, reflow

SIZE, STEPS = 16, 4


def build(width: int, device: str) -> FlowNetwork:
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(width, width),
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    return FlowNetwork(network).to(device)


def seconds(work: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(works: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    """Times of each work, one after the other, so that what else the machine does falls on all."""
    for work in works.values():
        seconds(work, device)
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    return times


def training(options: argparse.Namespace, device: str) -> dict[str, list[float]]:
    """One step of the optimiser: reflow, distillation, and the bare loop."""
    x0, x1 = (torch.randn(options.batch, 3, SIZE, SIZE, device=device) for _ in range(2))
    batches = itertools.cycle([(x0, x1)])
    t = torch.rand(options.batch, device=device)
    works: dict[str, Callable[[], object]] = {}
    bare_model = build(options.width, device)
    bare_optimiser = torch.optim.AdamW(bare_model.parameters(), 1e-4)

    def bare() -> None:
        bare_optimiser.zero_grad(set_to_none=True)
        (bare_model(x0, t) - x1).square().mean().backward()
        bare_optimiser.step()

    works["bare loop"] = bare
    for method in (reflow, distill):
        model = build(options.width, device)
        optimiser = torch.optim.AdamW(model.parameters(), 1e-4)
        losses = method(model, batches, optimiser, seed=0)
        works[method.__name__] = lambda losses=losses: next(losses)
    return interleaved(works, options.repeats, device)


def pairs(options: argparse.Namespace, device: str) -> dict[str, list[float]]:
    """One shard of pairs, Runge-Kutta and files included, beside the same number of forward passes."""
    model = build(options.width, device).eval()
    count, batch = 2 * options.batch, options.batch
    x1 = torch.randn(batch, 3, SIZE, SIZE, device=device)
    t = torch.rand(batch, device=device)

    @torch.no_grad()
    def bare() -> None:
        for _ in range(4 * STEPS * count // batch):
            model(x1, t)

    def cached() -> None:
        with tempfile.TemporaryDirectory() as folder:
            generate_pairs(model, folder, count, (3, SIZE, SIZE), seed=0, steps=STEPS, batch_size=batch)

    return interleaved({"bare loop": bare, "generate_pairs": cached}, max(3, options.repeats // 3), device)


class Nothing(nn.Module):
    """A network that costs nothing, so that only what is around it is left."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The input, times a weight."""
        return self.factor * x


def around(options: argparse.Namespace) -> tuple[float, float]:
    """Processor seconds of one reflow step, and of each call in making pairs, without any network."""
    model = Nothing()
    x0, x1 = (torch.randn(options.batch, 3, SIZE, SIZE) for _ in range(2))
    losses = reflow(model, itertools.repeat((x0, x1)), torch.optim.SGD(model.parameters(), 0.0), seed=0)
    steps, calls = [], []
    for _ in range(50):
        start = time.process_time()
        next(losses)
        steps.append(time.process_time() - start)
    for _ in range(5):
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            generate_pairs(
                model, folder, 2 * options.batch, (3, SIZE, SIZE), seed=0, steps=STEPS, batch_size=options.batch
            )
        calls.append((time.process_time() - start) / (8 * STEPS))
    return statistics.median(steps), statistics.median(calls)


def reading(options: argparse.Namespace) -> float:
    """Seconds for a batch from a loader over pairs in memory, shuffled."""
    data = Pairs(*torch.randn(2, 4096, 3, SIZE, SIZE))
    loader = DataLoader(data, batch_size=options.batch, shuffle=True, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    batches = sum(1 for _ in loader)
    return (time.perf_counter() - start) / batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps, shards = training(options, device), pairs(options, device)
    weights = sum(parameter.numel() for parameter in build(options.width, device).parameters())
    lines = [
        "# Reflow beside the bare loop",
        "",
        f"UNet of {weights / 1e6:.1f}M weights on 3 x {SIZE} x {SIZE}, batch {options.batch}, {device}, "
        f"{torch.get_num_threads()} threads; medians of {options.repeats} interleaved steps. "
        f"A pair takes {4 * STEPS} calls.",
        "",
        "| work | ms | ratio of time to the bare loop (median of pairs) | must be |",
        "| --- | ---: | ---: | --- |",
    ]
    for times, limit in ((steps, "at most 1.03"), (shards, "at most 1.11: 90 % of its throughput")):
        for name, values in times.items():
            ratio = statistics.median(a / b for a, b in zip(values, times["bare loop"], strict=True))
            bound = "" if name == "bare loop" else limit
            lines.append(f"| {name} | {1e3 * statistics.median(values):.1f} | {ratio:.3f} | {bound} |")
    step, call = around(options)
    lines += [
        "",
        f"With a network that costs nothing, a step of reflow takes {1e3 * step:.2f} ms of one processor, and a call "
        f"in making pairs {1e3 * call:.2f} ms, files included.",
    ]
    lines += ["", f"A shuffled batch of pairs in memory takes a loader {1e3 * reading(options):.2f} ms."]
    table = "\n".join(lines) + "\n"
    print(table)
    if all(getattr(options, name) == parser.get_default(name) for name in vars(options)):
        Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
