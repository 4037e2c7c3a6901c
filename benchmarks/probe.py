"""Statistics of attention by streaming, against an eager attention that stores its probabilities and sums over them.

Both are given the same queries and keys and compute, for every row, effective tokens, entropy, largest probability,
mean distance, and the mass on the first and on near keys. The eager side also multiplies by the values, as a forward
pass with stored probabilities does; the streaming side is added to a fused forward pass, as the probe does, in the last
column.

    python benchmarks/probe.py [--lengths 1024,2048,4096] [--memory-length 8192] [--repeats 3]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.attention.measure import attention_stats
from danlu.lab.measuring import peak_bytes

SINKS, LOCAL = 4, 32


def eager(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, ...]:
    """Attention with stored probabilities, and the statistics from them."""
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    place = torch.arange(q.shape[2])
    gap = place[:, None] - place
    if causal:
        scores = scores.masked_fill(gap < 0, -math.inf)
    p = scores.softmax(-1)
    return (
        p @ v,
        1 / p.square().sum(-1),
        torch.special.entr(p).sum(-1),
        p.amax(-1),
        (p * gap.abs()).sum(-1),
        p[..., :SINKS].sum(-1),
        (p * (gap.abs() < LOCAL)).sum(-1),
    )


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="1024,2048,4096")
    parser.add_argument("--memory-length", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    heads, dim = options.heads, 64
    lines = [
        "# Attention statistics: streaming against stored probabilities",
        "",
        f"{heads} heads of {dim}, batch 1, float32, cpu, {torch.get_num_threads()} threads; medians of "
        f"{options.repeats} interleaved pairs. Ratios are to the eager pass with stored probabilities.",
        "",
        "| length | mask | eager, s | streaming, s | ratio | fused forward + streaming, ratio |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for length in map(int, options.lengths.split(",")):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, heads, length, dim, generator=generator) for _ in range(3))
        for causal in (True, False):
            calls: dict[str, Callable[[], object]] = {
                "eager": lambda q=q, k=k, v=v, causal=causal: eager(q, k, v, causal),
                "streaming": lambda q=q, k=k, causal=causal: attention_stats(q, k, causal=causal),
                "fused": lambda q=q, k=k, v=v, causal=causal: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
            }
            for call in calls.values():
                call()
            times: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(options.repeats):
                for name, call in calls.items():
                    times[name].append(seconds(call))
            pairs = list(zip(times["eager"], times["streaming"], times["fused"], strict=True))
            ratio = statistics.median(s / e for e, s, _ in pairs)
            both = statistics.median((s + f) / e for e, s, f in pairs)
            mask = "causal" if causal else "none"
            middle = [statistics.median(times[name]) for name in ("eager", "streaming")]
            lines.append(f"| {length} | {mask} | {middle[0]:.3f} | {middle[1]:.3f} | {ratio:.2f} | {both:.2f} |")
    length = options.memory_length
    q, k = (torch.randn(1, heads, length, dim) for _ in range(2))
    used, matrix = peak_bytes(lambda: attention_stats(q, k, causal=True)), 4 * heads * length**2
    lines += [
        "",
        f"Memory at length {length}: {used / 2**20:.1f} MiB at most, the stored probabilities alone "
        f"{matrix / 2**20:.0f} MiB: {used / matrix:.2%}.",
    ]
    table = "\n".join(lines) + "\n"
    print(table)
    if vars(options) == vars(parser.parse_args([])):
        Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
