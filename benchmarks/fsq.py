"""Finite scalar quantisation against the FSQ of vector-quantize-pytorch: time, and which indices are right.

python benchmarks/fsq.py [--repeats 60] [--no-compile]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from vector_quantize_pytorch import FSQ as Peer

from danlu.vision.fsq import FSQ

LEVELS = [8, 5, 5, 5]
SHAPE = (64, 1024, 4)
LARGE = ([8] * 8, [8] * 9, [16] * 9)


def interleaved(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    """Median of the ratios of neighbouring runs."""
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))


def wrong_share(levels: list[int], z: torch.Tensor) -> tuple[float, float]:
    """Shares of wrong indices of the peer and of danlu, against Python integers of the peer's own digits."""
    # with return_indices the peer would make a table of all codes first
    peer = Peer(levels, return_indices=False)
    codes = peer(z[None])[0][0]  # it takes nothing but (batch, length, dim)
    digits = (codes * (torch.tensor(levels) // 2)).round().long() + torch.tensor(levels) // 2
    strides = [math.prod(levels[:j]) for j in range(len(levels))]
    exact = [sum(k * w for k, w in zip(row, strides, strict=True)) for row in digits.tolist()]
    theirs = peer.codes_to_indices(codes).tolist()
    ours = FSQ(levels).encode(z).tolist()
    count = len(exact)
    return (
        sum(a != b for a, b in zip(theirs, exact, strict=True)) / count,
        sum(a != b for a, b in zip(ours, exact, strict=True)) / count,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(SHAPE, generator=generator)
    ours, peer = FSQ(LEVELS), Peer(LEVELS)
    indices = ours.encode(z)
    theirs = peer(z)[1]
    differing = (indices != theirs).float().mean().item()
    with torch.no_grad():
        steps: dict[str, Callable[[], object]] = {
            "peer: forward": lambda: peer(z),
            "danlu: forward": lambda: ours(z),
            "danlu: encode": lambda: ours.encode(z),
            "peer: decode": lambda: peer.indices_to_codes(theirs),
            "danlu: decode": lambda: ours.decode(indices),
            "tanh, round": lambda: z.tanh().round(),
        }
        if not options.no_compile:
            forward, bare = torch.compile(ours, fullgraph=True), torch.compile(lambda x: x.tanh().round())
            steps |= {"danlu: forward, compiled": lambda: forward(z), "tanh, round, compiled": lambda: bare(z)}
        times = interleaved(steps, options.repeats)
        both = {
            "peer": [a + b for a, b in zip(times["peer: forward"], times["peer: decode"], strict=True)],
            "danlu": [a + b for a, b in zip(times["danlu: encode"], times["danlu: decode"], strict=True)],
            "danlu, forward": [a + b for a, b in zip(times["danlu: forward"], times["danlu: decode"], strict=True)],
        }
    leaf = z.clone().requires_grad_()
    trained = interleaved(
        {
            "peer": lambda: torch.autograd.grad(peer(leaf)[0].sum(), leaf),
            "danlu": lambda: torch.autograd.grad(ours(leaf).quantized.sum(), leaf),
        },
        options.repeats // 2,
    )

    lines = [
        "# FSQ against vector-quantize-pytorch",
        "",
        f"z {SHAPE}, levels {LEVELS}, float32, cpu, {torch.get_num_threads()} threads; medians of {options.repeats} "
        f"interleaved runs; {differing:.4%} of the indices differ.",
        "",
        "| step | ms |",
        "| --- | ---: |",
        *(f"| {name} | {1e3 * statistics.median(values):.2f} |" for name, values in times.items()),
        "",
        "| ratio | measured | wanted |",
        "| --- | ---: | ---: |",
        f"| peer / danlu, encode and decode | {ratio(both, 'peer', 'danlu'):.2f} | at least 2 |",
        f"| peer / danlu, forward and decode | {ratio(both, 'peer', 'danlu, forward'):.2f} | |",
        f"| peer / danlu, forward and backward | {ratio(trained, 'peer', 'danlu'):.2f} | |",
        f"| forward with indices / tanh and round | {ratio(times, 'danlu: forward', 'tanh, round'):.2f} | |",
    ]
    if not options.no_compile:
        lines += [
            f"| forward with indices, compiled / tanh and round, {name} | "
            f"{ratio(times, 'danlu: forward, compiled', key):.2f} | {wanted} |"
            for name, key, wanted in (
                ("eager", "tanh, round", "at most 1.5"),
                ("compiled", "tanh, round, compiled", ""),
            )
        ]
    lines += [
        "",
        "| levels | codes | wrong indices, peer | wrong indices, danlu | state, danlu |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for levels in LARGE:
        their_share, our_share = wrong_share(levels, torch.randn(20000, len(levels), generator=generator))
        state = sum(buffer.numel() * buffer.element_size() for buffer in FSQ(levels).buffers())
        lines.append(
            f"| [{levels[0]}] * {len(levels)} | {math.prod(levels)} | {their_share:.1%} | {our_share:.1%} | {state} B |"
        )
    table = "\n".join(lines) + "\n"
    print(table)
    if options.repeats == parser.get_default("repeats") and not options.no_compile:
        Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
