"""One step for 2, 4 and 8 tasks: ours against TorchJD's PCD and PCGrad, time and peak memory.

All losses come from one batch through one Llama with a small head per task, so that every task shares the trunk.
TorchJD runs in three settings: its default (Jacobians of all losses, joined), its saving option (Gram matrix without
joining them), and its engine that forms the Gram matrix inside the backward pass, followed by one pass of the weighted
loss. Memory is what the allocator holds at its peak above the model, from the profiler's memory events; the graph of
the forward pass is in it, and is the same for all.

    python benchmarks/multitask.py [--repeats 15] [--layers 4] [--width 256]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchjd.aggregation import PCD, Aggregator, PCDWeighting, PCGrad, PCGradWeighting, Weighting
from torchjd.autogram import Engine
from torchjd.autojac import backward, jac_to_grad
from transformers import LlamaConfig, LlamaModel

from danlu.optim.multitask import MultiTaskBackward

TASKS = (2, 4, 8)
BASE = "plain backward of the sum"
Step = Callable[[list[Tensor], Tensor], None]


class Tasks(nn.Module):
    """A trunk and a linear head per task."""

    def __init__(self, tasks: int, layers: int, width: int, device: str, engine: bool = False):
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            attn_implementation="eager",  # the fused kernel has no batched backward pass
        )
        self.trunk = LlamaModel(config)
        self.heads = nn.ModuleList(nn.Linear(width, 8) for _ in range(tasks))
        self.to(device).train()
        self.engine = Engine(self.trunk, batch_dim=None) if engine else None  # its hooks stay in the model

    def losses(self, ids: Tensor) -> tuple[list[Tensor], Tensor]:
        """The loss of every task, and the features that they share."""
        features = self.trunk(input_ids=ids, use_cache=False).last_hidden_state
        targets = [(ids * (3 + task) + task) % 8 for task in range(len(self.heads))]
        pairs = zip(self.heads, targets, strict=True)
        return [nn.functional.cross_entropy(h(features).flatten(0, 1), t.flatten()) for h, t in pairs], features


def steps(model: Tasks) -> dict[str, Step]:
    shared, heads = list(model.trunk.parameters()), list(model.heads.parameters())

    def ours(**options: str) -> Step:
        mt = MultiTaskBackward(shared, heads=heads, **options)
        if options.get("via") == "features":
            return lambda losses, features: mt.backward(losses, features=features)
        return lambda losses, features: mt.backward(losses)

    def plain(losses: list[Tensor], features: Tensor) -> None:
        sum(losses).backward()

    def peer(aggregator: Aggregator, lean: bool) -> Step:
        def step(losses: list[Tensor], features: Tensor) -> None:
            backward(losses, inputs=shared, retain_graph=True)
            torch.autograd.backward(losses, inputs=heads)
            jac_to_grad(shared, aggregator, optimize_gramian_computation=lean)

        return step

    def engine(weighting: Weighting) -> Step:
        def step(losses: list[Tensor], features: Tensor) -> None:
            stacked = torch.stack(losses)
            weights = weighting(model.engine.compute_gramian(stacked))
            torch.autograd.backward(stacked, weights, inputs=shared, retain_graph=True)
            torch.autograd.backward(losses, inputs=heads)

        return step

    if model.engine is not None:
        return {"TorchJD PCD, engine": engine(PCDWeighting()), "TorchJD PCGrad, engine": engine(PCGradWeighting())}

    return {
        BASE: plain,
        "danlu, kept": ours(),
        "danlu, layerwise": ours(gradients="layerwise"),
        "danlu, via features": ours(via="features"),
        "TorchJD PCD": peer(PCD(), lean=False),
        "TorchJD PCD, lean": peer(PCD(), lean=True),
        "TorchJD PCGrad": peer(PCGrad(), lean=False),
        "TorchJD PCGrad, lean": peer(PCGrad(), lean=True),
    }


def run(model: Tasks, step: Step, ids: Tensor) -> float:
    """Seconds of what comes after the forward pass."""
    model.zero_grad()
    losses, features = model.losses(ids)
    begin = _now(ids)
    step(losses, features)
    return _now(ids) - begin


def _now(ids: Tensor) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(model: Tasks, step: Step, ids: Tensor) -> int:
    """Most bytes held at once during one step and its forward pass, above those before it."""
    model.zero_grad()
    gc.collect()
    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(model, step, ids)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run(model, step, ids)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="There is a performance drop")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for tasks in TASKS:
        models = [Tasks(tasks, options.layers, options.width, device, engine) for engine in (False, True)]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1024, (options.batch, options.length), generator=generator).to(device)
        kinds = {name: (model, step) for model in models for name, step in steps(model).items()}
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for model, step in kinds.values():
            run(model, step, ids)
        for _ in range(options.repeats):
            for name, (model, step) in kinds.items():
                times[name].append(run(model, step, ids))
        for name, (model, step) in kinds.items():
            ratio = statistics.median(a / b for a, b in zip(times[name], times[BASE], strict=True))
            peak = peak_bytes(model, step, ids) / 2**20
            rows.append(f"| {tasks} | {name} | {1e3 * statistics.median(times[name]):.1f} | {ratio:.2f} | {peak:.1f} |")
    size = sum(p.numel() * p.element_size() for p in model.trunk.parameters()) / 2**20
    lines = [
        "# Several losses: one step against TorchJD",
        "",
        f"Llama trunk of {options.layers} layers, width {options.width} ({size:.1f} MiB of shared parameters), "
        f"{options.batch} x {options.length} tokens, a head per task; {device}, {torch.get_num_threads()} threads; "
        f"{options.repeats} interleaved steps. Time is that after the forward pass; memory is the peak of the whole "
        "step above the model.",
        "",
        "| tasks | step | ms (median) | ratio to one backward pass | peak, MiB |",
        "| ---: | --- | ---: | ---: | ---: |",
        *rows,
    ]
    table = "\n".join(lines) + "\n"
    print(table)
    if vars(options) == vars(parser.parse_args([])):
        Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
