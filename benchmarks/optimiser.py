"""Memory and time of Tiger and Lion against torch.optim.AdamW.

Memory: bytes of tensors alive at the peak of a window of 8 micro-batches on a Llama of about 25 million parameters,
counted by the allocator's events (CPU) or its own peak (CUDA). Time: one optimiser step on the same shapes, and one
window of backward passes and step with a micro-batch of a few tokens.

    python benchmarks/optimiser.py [--repeats 25] [--hidden 512] [--layers 6]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import danlu
from danlu.lab.measuring import peak_bytes
from danlu.optim.folding import fold_in_backward
from danlu.optim.groups import tiger_param_groups
from danlu.optim.lion import Lion
from danlu.optim.tiger import Tiger

MICRO_BATCHES = 8
Build = Callable[[torch.nn.Module], torch.optim.Optimizer]

STEPS: dict[str, Build] = {
    "AdamW, fused": lambda model: torch.optim.AdamW(model.parameters(), fused=True),
    "AdamW, foreach": lambda model: torch.optim.AdamW(model.parameters(), foreach=True),
    "AdamW, loop": lambda model: torch.optim.AdamW(model.parameters(), foreach=False, fused=False),
    "Tiger": lambda model: Tiger(tiger_param_groups(model)),
    "Tiger, without looking for NaN": lambda model: Tiger(tiger_param_groups(model), nonfinite="ignore"),
    "Tiger, foreach": lambda model: Tiger(tiger_param_groups(model), foreach=True),
    "Tiger, plain": lambda model: Tiger(tiger_param_groups(model), fused=False, foreach=False),
    "Tiger, plain rule (Signum)": lambda model: Tiger(model.parameters(), rule="plain"),
    "Lion": lambda model: Lion(model.parameters()),
    "Lion, foreach": lambda model: Lion(model.parameters(), foreach=True),
}
WINDOWS = ("AdamW, fused", "Lion", "Tiger", "Tiger, folded", "Tiger, folded, bfloat16 momentum")


def build(device: str, dtype: torch.dtype, hidden: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device, dtype)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], device: str) -> float:
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def step_times(options: argparse.Namespace, device: str, dtype: torch.dtype) -> dict[str, list[float]]:
    """Interleaved times of ``step`` with gradients in place."""
    runs = {}
    for name, make in STEPS.items():
        model = build(device, dtype, options.hidden, options.layers)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3
        runs[name] = make(model)
    if device == "cuda":
        model = build(device, dtype, options.hidden, options.layers)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3
        runs["Tiger, torch.compile"] = Tiger(tiger_param_groups(model), fused=True)
    for optimizer in runs.values():
        optimizer.step()
        optimizer.step()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, optimizer in runs.items():
            times[name].append(seconds(optimizer.step, device))
    return times


class Window:
    """A model, its optimiser, and a window of micro-batches of a few tokens."""

    def __init__(self, name: str, options: argparse.Namespace, device: str, dtype: torch.dtype):
        self.model = build(device, dtype, options.hidden, options.layers)
        state = torch.bfloat16 if "bfloat16" in name else None
        if name.startswith("Tiger"):
            self.optimizer: Any = Tiger(tiger_param_groups(self.model), state_dtype=state)
        else:
            self.optimizer = STEPS[name](self.model)
        self.ids = torch.arange(8, device=device)[None]
        if "folded" in name:
            fold_in_backward(self.optimizer)
        self()

    def __call__(self) -> None:
        """One window."""
        for _ in range(MICRO_BATCHES):
            self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def bytes(self, device: str) -> dict[str, int]:
        """Parameters, state, largest gradient, and the peak of everything."""
        sizes = [parameter.numel() * parameter.element_size() for parameter in self.model.parameters()]
        values = [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        state = sum(x.numel() * x.element_size() for x in values if x.ndim)
        if device == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self()
            torch.cuda.synchronize()
            above = torch.cuda.max_memory_allocated() - before
        else:
            above = peak_bytes(self)
        return {"parameters": sum(sizes), "state": state, "largest": max(sizes), "peak": sum(sizes) + state + above}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32

    memory: dict[str, dict[str, int]] = {}
    window_times: dict[str, list[float]] = {name: [] for name in WINDOWS}
    for name in WINDOWS:  # one at a time: what another holds would count
        memory[name] = Window(name, options, device, dtype).bytes(device)
    windows = {name: Window(name, options, device, dtype) for name in WINDOWS}
    for _ in range(max(3, options.repeats // 5)):
        for name, window in windows.items():
            window_times[name].append(seconds(window, device))
    del windows
    times = step_times(options, device, dtype)

    count = sum(p.numel() for p in build(device, dtype, options.hidden, options.layers).parameters())
    lines = [
        "# Optimisers: Tiger and Lion against torch.optim.AdamW",
        "",
        f"Llama of {count / 1e6:.1f} million parameters, {dtype}, {device}, {torch.get_num_threads()} threads, PyTorch "
        f"{torch.__version__}, danlu {danlu.__version__}.",
        "",
        f"## Memory with accumulation over {MICRO_BATCHES} micro-batches",
        "",
        "| optimiser | state, bytes/parameter | peak, MB | peak, bytes/parameter | of parameters + state + largest "
        "gradient | window, ms (median) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, sizes in memory.items():
        ideal = sizes["parameters"] + sizes["state"] + sizes["largest"]
        lines.append(
            f"| {name} | {sizes['state'] / count:.2f} | {sizes['peak'] / 1e6:.1f} | {sizes['peak'] / count:.2f} | "
            f"{sizes['peak'] / ideal:.3f} | {1e3 * statistics.median(window_times[name]):.0f} |"
        )
    lines += [
        "",
        "## One step",
        "",
        f"Gradients in place, {options.repeats} interleaved steps; ratios are medians of pairs.",
        "",
        "| optimiser | step, ms (median) | to AdamW fused | to AdamW foreach |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, own in times.items():
        ratios = [
            statistics.median(a / b for a, b in zip(own, times[peer], strict=True))
            for peer in ("AdamW, fused", "AdamW, foreach")
        ]
        lines.append(f"| {name} | {1e3 * statistics.median(own):.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    table = "\n".join(lines) + "\n"
    print(table)
    if all(getattr(options, key) == parser.get_default(key) for key in ("repeats", "hidden", "layers")):
        Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
