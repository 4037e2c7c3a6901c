"""One step of AMEDScheduler beside one forward of a small U-Net, and beside the steps of DDIM and DPM-Solver++.

python benchmarks/scheduler.py [--repeats 31]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DModel

from danlu.diffusion.amed import AMED
from danlu.diffusion.amed_predictor import AMEDPredictor
from danlu.diffusion.attachment import attach
from danlu.diffusion.schedulers import AMEDScheduler

STEPS = 3


def build(device: str) -> UNet2DModel:
    torch.manual_seed(0)
    return (
        UNet2DModel(
            sample_size=32,
            block_out_channels=(64, 128, 192),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=32,
        )
        .eval()
        .to(device)
    )


def seconds(call: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def runs(scheduler: object, x: torch.Tensor, output: torch.Tensor, calls: int) -> Callable[[], None]:
    """All steps of a run (set_timesteps excluded), with the same output at every call."""

    def whole() -> None:
        sample = x
        for t in scheduler.timesteps:
            if getattr(scheduler, "attachment", None) is not None:
                scheduler.times_to_tell(t, len(x))  # what the hook on the network does
            sample = scheduler.step(output, t, scheduler.scale_model_input(sample, t), return_dict=False)[0]

    assert len(scheduler.timesteps) == calls
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=31)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(device)
    weights = sum(weight.numel() for weight in model.parameters())
    source, calls = DDIMScheduler(), 2 * STEPS
    lines = [
        "# Scheduler: one step beside one forward of a U-Net",
        "",
        f"UNet2DModel of {weights / 1e6:.1f} million weights, 32 x 32, {device}, float32, {torch.get_num_threads()} "
        f"threads; {options.repeats} interleaved repeats of runs of {calls} network calls. A step is all that a "
        "scheduler does for one call of the network. Attached: times of each sample, with "
        "the work of the hooks.",
        "",
        "| batch | scheduler | step, ms (median) | share of a forward (median of pairs) | steps of DDIM |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    with torch.no_grad():
        for batch in (1, 4):
            x = torch.randn(batch, 3, 32, 32, device=device)
            output = model(x, 500).sample
            schedulers = {
                "DDIM": DDIMScheduler.from_config(source.config),
                "DPM-Solver++(2M)": DPMSolverMultistepScheduler.from_config(source.config),
                "AMED": AMEDScheduler.from_config(source, base="amed", untrained="midpoint"),
                "AMED on iPNDM": AMEDScheduler.from_config(source, base="ipndm", untrained="midpoint"),
            }
            dynamic = AMEDScheduler.from_config(source, base="ipndm", untrained="midpoint")
            predictor = AMEDPredictor([0.5] * STEPS).to(device).requires_grad_(False)
            solver = AMED(dynamic.host.process, dynamic.grid(STEPS), predictor, "ipndm", afs=False)
            with attach(dynamic, model, solver, feature="mid_block"):
                model(x, 500)  # the hook has seen the features of this batch
                schedulers["AMED on iPNDM, attached"] = dynamic
                names = [*schedulers, "forward"]
                times: dict[str, list[float]] = {name: [] for name in names}
                for repeat in range(options.repeats + 2):
                    for name in names:
                        if name == "forward":
                            taken = seconds(partial(model.forward, x, 500), device)
                        else:
                            scheduler = schedulers[name]
                            scheduler.set_timesteps(
                                calls if name in ("DDIM", "DPM-Solver++(2M)") else STEPS, device=device
                            )
                            taken = seconds(runs(scheduler, x, output, calls), device) / calls
                        if repeat >= 2:
                            times[name].append(taken)
            for name in schedulers:
                share = statistics.median(a / b for a, b in zip(times[name], times["forward"], strict=True))
                beside = statistics.median(a / b for a, b in zip(times[name], times["DDIM"], strict=True))
                milliseconds = 1e3 * statistics.median(times[name])
                lines.append(f"| {batch} | {name} | {milliseconds:.3f} | {share:.2%} | {beside:.1f} |")
            lines.append(f"| {batch} | forward of the U-Net | {1e3 * statistics.median(times['forward']):.1f} | | |")
    table = "\n".join(lines) + "\n"
    print(table)
    if options.repeats == parser.get_default("repeats"):
        Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
