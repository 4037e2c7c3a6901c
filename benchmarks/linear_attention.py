"""Linear-time attention against dense causal attention: time by length, memory by length, and one decoding step.

Ours: attention to quantised keys, FAVOR+ and plain exponential features. The peer is scaled_dot_product_attention of
PyTorch. Memory is what the forward pass holds beyond its inputs and its output.

    python benchmarks/linear_attention.py [--heads 4] [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.attention.linear.engine import linear_attention
from danlu.attention.linear.feature_maps import ExpFeatures, FavorFeatures
from danlu.attention.linear.layer import LinearAttention
from danlu.attention.vq.engine import vq_attention
from danlu.attention.vq.layer import VQAttention
from danlu.lab.measuring import peak_bytes
from danlu.positions.rotary import Rotary, inverse_frequencies

DIM, CODES, BLOCK = 64, 256, 256
LENGTHS = (4096, 16384)
MEMORY_LENGTHS = (4096, 16384, 65536)
DECODE_LENGTHS = (1_000, 10_000, 100_000)


def methods(heads: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(heads, CODES, DIM, generator=generator)
    bias = torch.zeros(heads, BLOCK + 1)
    rotary = Rotary(inverse_frequencies(DIM))
    favor, exponential = FavorFeatures(DIM, CODES), ExpFeatures(DIM)
    return {
        "SDPA, causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        f"VQ, {CODES} codes, block {BLOCK}": lambda q, k, v: vq_attention(q, k, v, codebook, block=BLOCK, bias=bias)[0],
        "the same, rotary": lambda q, k, v: vq_attention(q, k, v, codebook, block=BLOCK, rotary=rotary)[0],
        f"FAVOR+, {CODES} features": lambda q, k, v: linear_attention(q, k, v, favor, chunk=BLOCK)[0],
        f"exp, {DIM} features": lambda q, k, v: linear_attention(q, k, v, exponential, chunk=128)[0],
    }


def tensors(heads: int, length: int, grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(1, heads, length, DIM, generator=generator).requires_grad_(grad) for _ in range(3)]


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def forward_table(heads: int, repeats: int) -> list[str]:
    lines = [
        "| length | method | forward, ms | dense / this | forward and backward, ms | dense / this |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    kinds = methods(heads)
    dense = next(iter(kinds))
    for length in LENGTHS:
        inputs, learning = tensors(heads, length), tensors(heads, length, grad=True)
        with torch.no_grad():
            for name, method in kinds.items():
                if name != dense:
                    method(*inputs)
        once: dict[str, list[float]] = {name: [] for name in kinds}
        both: dict[str, list[float]] = {name: [] for name in kinds}
        for repeat in range(repeats):
            for name, method in kinds.items():
                with torch.no_grad():
                    once[name].append(seconds(lambda method=method, inputs=inputs: method(*inputs)))
                if repeat < (repeats + 1) // 2:
                    both[name].append(
                        seconds(lambda method=method, inputs=learning: method(*inputs).square().sum().backward())
                    )
        for name in kinds:
            cells = []
            for times in (once, both):
                ratio = statistics.median(a / b for a, b in zip(times[dense], times[name], strict=True))
                cells.append(f"{1e3 * statistics.median(times[name]):.0f} | **{ratio:.2f}**")
            lines.append(f"| {length} | {name} | {' | '.join(cells)} |")
    return lines


def memory_table(heads: int) -> list[str]:
    lines = [
        "| method | " + " | ".join(f"{length} tokens, MiB" for length in MEMORY_LENGTHS) + " | largest / smallest |",
        "| --- |" + " ---: |" * (len(MEMORY_LENGTHS) + 1),
    ]
    for name, method in list(methods(heads).items())[1:]:
        extra = []
        for length in MEMORY_LENGTHS:
            inputs = tensors(heads, length)
            output = inputs[0].numel() * inputs[0].element_size()
            codes = heads * length * 8 if name.startswith(("VQ", "the same")) else 0  # codes are returned as well
            with torch.no_grad():
                extra.append(peak_bytes(lambda method=method, inputs=inputs: method(*inputs)) - output - codes)
        cells = " | ".join(f"{x / 2**20:.2f}" for x in extra)
        lines.append(f"| {name} | {cells} | **{max(extra) / min(extra):.2f}** |")
    return lines


def decode_table(heads: int, repeats: int) -> list[str]:
    """One step of a layer after a context of each length, steps of the lengths interleaved."""
    lines = [
        "| layer | "
        + " | ".join(f"after {length}, us" for length in DECODE_LENGTHS)
        + " | longest / shortest context |",
        "| --- |" + " ---: |" * (len(DECODE_LENGTHS) + 1),
    ]
    hidden = heads * DIM
    generator = torch.Generator().manual_seed(1)
    for name, mixer in (
        ("VQAttention", VQAttention(hidden_size=hidden, heads=heads, codes=CODES, block=BLOCK)),
        ("LinearAttention, favor", LinearAttention(hidden_size=hidden, heads=heads, features=CODES)),
    ):
        mixer.eval()
        caches = {length: mixer.make_cache() for length in DECODE_LENGTHS}
        times: dict[int, list[float]] = {length: [] for length in DECODE_LENGTHS}
        with torch.no_grad():
            for length, cache in caches.items():
                for start in range(0, length, 10_000):
                    size = min(10_000, length - start)
                    x = torch.randn(1, size, hidden, generator=generator)
                    mixer(x, torch.arange(start, start + size), cache=cache)
            token = torch.randn(1, 1, hidden, generator=generator)
            for repeat in range(repeats + 20):
                for length, cache in caches.items():
                    place = torch.tensor([cache.get_seq_length()])
                    spent = seconds(lambda: mixer(token, place, cache=cache))  # noqa: B023 - called at once
                    if repeat >= 20:
                        times[length].append(spent)
        medians = {length: statistics.median(spent) for length, spent in times.items()}
        shortest, longest = times[DECODE_LENGTHS[0]], times[DECODE_LENGTHS[-1]]
        ratio = statistics.median(a / b for a, b in zip(longest, shortest, strict=True))
        cells = " | ".join(f"{1e6 * medians[length]:.0f}" for length in DECODE_LENGTHS)
        lines.append(f"| {name} | {cells} | **{ratio:.3f}** |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    lines = [
        "# Linear-time attention against dense causal attention",
        "",
        f"Batch 1, {options.heads} heads of {DIM}, float32, CPU, {torch.get_num_threads()} threads, PyTorch "
        f"{torch.__version__}. Medians of {options.repeats} interleaved runs ({(options.repeats + 1) // 2} with a "
        "backward pass); ratios are medians of neighbouring runs. Made by `benchmarks/linear_attention.py`.",
        "",
        *forward_table(options.heads, options.repeats),
        "",
        "Most memory held during a forward pass beyond inputs and outputs:",
        "",
        *memory_table(options.heads),
        "",
        "One decoding step of a layer, projections included:",
        "",
        *decode_table(options.heads, 100 * options.repeats),
    ]
    table = "\n".join(lines) + "\n"
    print(table)
    if options.heads == parser.get_default("heads") and options.repeats == parser.get_default("repeats"):
        Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
