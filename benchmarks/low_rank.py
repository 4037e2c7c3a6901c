"""LoRA as an optimiser against PEFT's LoRA, GaLore and training of the full matrices: time, memory, checkpoints.

All train the linear maps of the same Llama with AdamW's rule. Times are medians of interleaved steps; ratios are
medians of the ratios of neighbouring steps. Peak memory is the allocator's, from the profiler's events: what one step
allocates above weights and state. State and gradients are counted tensor by tensor.

    python benchmarks/low_rank.py [--hidden 512] [--layers 4] [--batch 8] [--length 512] [--rank 8] [--quick]
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from pytorch_optimizer import GaLore
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from danlu.lab.measuring import peak_bytes
from danlu.optim.low_rank import LowRankOptimizer

#: Small, so that logits do not hide the layers.
VOCABULARY = 512


@dataclass
class Contender:
    """A model with its optimiser, and what it has measured."""

    name: str
    model: Any
    optimizer: Any
    state: Callable[[], int]
    steps: list[float]
    updates: list[float]
    gradients: int = 0

    def step(self, ids: Tensor) -> None:
        """One training step, timed as a whole and in its update."""
        start = time.perf_counter()
        self.model(input_ids=ids, labels=ids).loss.backward()
        middle = time.perf_counter()
        if not self.steps:
            self.gradients = sum(p.grad.nbytes for p in self.trained() if p.grad is not None)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        end = time.perf_counter()
        self.steps.append(1e3 * (end - start))
        self.updates.append(1e3 * (end - middle))

    def trained(self) -> list[Tensor]:
        """All parameters that may have gradients after the backward pass, factors included."""
        sites = getattr(self.optimizer, "sites", ())
        return [*self.model.parameters(), *(factor for site in sites for factor in (site.A, site.B))]


def build(options: argparse.Namespace) -> LlamaForCausalLM:
    heads = max(1, options.hidden // 64)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=options.hidden, intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers, num_attention_heads=heads, num_key_value_heads=heads,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(options.dtype)


def linear_weights(model: nn.Module) -> list[nn.Parameter]:
    """Freeze everything but the linear maps of the layers, and return those."""
    chosen = [m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]
    kept = {id(weight) for weight in chosen}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in kept)
    return chosen


def tensor_bytes(values: Iterable[Any]) -> int:
    """Bytes of all tensors in a state, also of those inside GaLore's projector object."""
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += value.nbytes
        elif isinstance(value, dict | list | tuple):
            total += tensor_bytes(value.values() if isinstance(value, dict) else value)
        elif hasattr(value, "ortho_matrix"):
            total += tensor_bytes([value.ortho_matrix])
    return total


def contenders(options: argparse.Namespace) -> list[Contender]:
    rank, rate = options.rank, 1e-4

    def add(name: str, model: Any, optimizer: Any, state: Callable[[], int] | None = None) -> None:
        count = state or (lambda: tensor_bytes(optimizer.state.values()))
        found.append(Contender(name, model, optimizer, count, [], []))

    def low_rank(name: str, **choices: Any) -> None:
        model = build(options)
        optimizer = LowRankOptimizer(model, rank=rank, alpha=16, base_kwargs={"lr": rate}, **choices)
        add(name, model, optimizer, lambda: sum(optimizer.state_bytes().values()))

    found: list[Contender] = []
    adapted = get_peft_model(build(options), LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear"))
    factors = [p for p in adapted.parameters() if p.requires_grad]
    modules = torch.optim.AdamW(factors, rate)
    add("PEFT LoRA", adapted, modules, lambda: tensor_bytes(modules.state.values()) + tensor_bytes(factors))
    low_rank("LoRA optimiser")
    low_rank("LoRA optimiser, folded", fold_in_backward=True)
    low_rank("LoRA optimiser, folded, no copy of W0", fold_in_backward=True, resync="incremental")
    model = build(options)
    group = {"rank": rank, "update_proj_gap": options.gap, "scale": 1.0, "projection_type": "std"}
    add("GaLore", model, GaLore([{"params": linear_weights(model), **group}], lr=rate))
    model = build(options)
    add("AdamW on the matrices", model, torch.optim.AdamW(linear_weights(model), rate))
    return found


def safe_load(optimizer: torch.optim.Optimizer) -> str:
    """Save the state and read it as ``torch.load`` does by default."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except Exception as error:  # the message is the result
        lines = [line for line in str(error).splitlines() if "Unsupported" in line]
        return f"refused: {(lines or [type(error).__name__])[0].split(': GLOBAL ')[-1].split(' was not')[0]}"
    return "yes"


def measure(options: argparse.Namespace) -> list[str]:
    ids = torch.randint(VOCABULARY, (options.batch, options.length), generator=torch.Generator().manual_seed(0))
    runs = contenders(options)
    for run in runs:  # moments and projectors come into being
        run.step(ids)
        run.steps.clear()
        run.updates.clear()
    for _ in range(options.repeats):
        for run in runs:
            run.step(ids)
    peaks = [peak_bytes(lambda run=run: run.step(ids)) for run in runs]  # type: ignore[misc]
    lines = [
        "| | step, ms | to PEFT | update alone, ms | share of the step | state, MiB | gradients after backward, MiB "
        "| peak of a step, MiB | to PEFT | checkpoint read safely |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for run, peak in zip(runs, peaks, strict=True):
        count = options.repeats
        ratios = [a / b for a, b in zip(run.steps[:count], runs[0].steps[:count], strict=True)]
        update = statistics.median(run.updates[:count])
        shares = [a / b for a, b in zip(run.updates[:count], run.steps[:count], strict=True)]
        cells = (
            run.name,
            f"{statistics.median(run.steps[:count]):.0f}",
            f"{statistics.median(ratios):.3f}",
            f"{update:.1f}",
            f"{100 * statistics.median(shares):.1f} %",
            f"{run.state() / 2**20:.2f}",
            f"{run.gradients / 2**20:.2f}",
            f"{peak / 2**20:.1f}",
            f"{peak / peaks[0]:.3f}",
            safe_load(run.optimizer),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("hidden", 512), ("layers", 4), ("batch", 8), ("length", 512), ("rank", 8), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--gap", type=int, default=200, help="steps between GaLore's decompositions")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="a small model; writes no file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        options.hidden, options.layers, options.batch, options.length, options.repeats = 128, 2, 2, 128, 3
    lines = measure(options)
    text = [
        "# LoRA as an optimiser against PEFT's LoRA and GaLore",
        "",
        f"Llama of {options.layers} layers of width {options.hidden}, {options.batch} x {options.length} tokens, rank "
        f"{options.rank}, {str(options.dtype).removeprefix('torch.')}, {options.threads} threads, PyTorch "
        f"{torch.__version__}, {platform.machine()}. Medians of {options.repeats} interleaved steps. GaLore decomposes "
        f"every {options.gap} steps, and no such step is among the timed ones. State: moments, factors, copies of W0 "
        "and projections. Peak: what one step allocates above weights and state. Made by `benchmarks/low_rank.py`.",
        "",
        *lines,
    ]
    print("\n".join(text))
    if not options.quick:
        Path(__file__).with_suffix(".md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
