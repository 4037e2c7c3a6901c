"""Chunked exact attention: time against PyTorch's fused kernel, memory against the matrix, and merging against a copy.

python benchmarks/streaming.py [--length 32768] [--heads 8] [--repeats 3]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from danlu.attention.streaming.state import SoftmaxState, chunked_attention
from danlu.lab.measuring import peak_bytes

DIM = 64


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def paired(a: Callable[[], object], b: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Medians of both, and of their ratio over interleaved pairs."""
    a(), b()
    pairs = [(seconds(a), seconds(b)) for _ in range(repeats)]
    return (
        statistics.median(x for x, _ in pairs),
        statistics.median(y for _, y in pairs),
        statistics.median(x / y for x, y in pairs),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    length, heads, repeats = options.length, options.heads, options.repeats
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, DIM, generator=generator) for _ in range(3))
    lines = [
        "# Chunked attention, exact",
        "",
        f"Head size {DIM}, batch 1, float32, cpu, {torch.get_num_threads()} threads; medians of {repeats} interleaved "
        "pairs. The peer is F.scaled_dot_product_attention.",
        "",
        "| what | ours, s | peer, s | ratio |",
        "| --- | ---: | ---: | ---: |",
    ]

    def row(what: str, ours: Callable[[], object], peer: Callable[[], object], times: int = repeats) -> None:
        lines.append("| {} | {:.3f} | {:.3f} | {:.2f} |".format(what, *paired(ours, peer, times)))

    part = [x[:, :, : length // 4] for x in (q, k, v)]
    one = [x[:, :1] for x in (q, k, v)]
    row(
        f"causal forward, length {length}, 1 head",
        lambda: chunked_attention(*one, causal=True),
        lambda: F.scaled_dot_product_attention(*one, is_causal=True),
    )
    row(
        f"causal forward, length {length // 4}, {heads} heads",
        lambda: chunked_attention(*part, causal=True),
        lambda: F.scaled_dot_product_attention(*part, is_causal=True),
    )
    # documents: blocks of other segments are skipped, which a mask given to the peer does not do
    short = [x[:, :, :4096] for x in (q, k, v)]
    segments = (torch.arange(4096) // 512)[None]
    visible = ((segments[0][:, None] == segments[0]) & torch.ones(4096, 4096, dtype=torch.bool).tril())[None, None]
    row(
        f"documents of 512 in length 4096, {heads} heads, peer with a mask",
        lambda: chunked_attention(*short, causal=True, segment_ids=segments),
        lambda: F.scaled_dot_product_attention(*short, attn_mask=visible),
    )
    row(
        f"score bias by distance, length 4096, {heads} heads, peer with a mask",
        lambda: chunked_attention(*short, causal=True, score_bias=lambda i, j: -0.01 * (i[:, None] - j)),
        lambda: F.scaled_dot_product_attention(*short, attn_mask=torch.zeros(1, 1, 4096, 4096)),
    )
    leaves = [x[:, :2, :4096].clone().requires_grad_() for x in (q, k, v)]
    rule = torch.zeros(1, 4096, dtype=torch.int64)

    def forward() -> torch.Tensor:
        return chunked_attention(*leaves, causal=True, segment_ids=rule)

    row(
        "blocks, length 4096, 2 heads: forward and backward, peer is the forward alone",
        lambda: torch.autograd.grad(forward().sum(), leaves),
        lambda: forward().detach(),
    )
    states = [SoftmaxState(*(x.clone() for x in (one[0][..., 0], one[0][..., 0], one[0]))) for _ in range(2)]
    source = torch.cat([x.flatten() for x in (states[0].m, states[0].z, states[0].y) * 2])
    row(
        f"merge of two states of {length} rows, peer copies the same bytes once",
        lambda: states[0].merge(states[1]),
        lambda: source.clone(),
        9,
    )
    out_bytes = q.numel() * q.element_size()
    peak = peak_bytes(lambda: chunked_attention(q, k, v, causal=True))
    blocks = peak_bytes(
        lambda: chunked_attention(*(x[:, :1] for x in (q, k, v)), causal=True, segment_ids=segments_of(length))
    )
    lines += [
        "",
        f"Memory of a causal forward, length {length}, {heads} heads: {(peak - out_bytes) / 2**20:.0f} MiB beyond the "
        f"output ({out_bytes / 2**20:.0f} MiB); the matrix would take {4 * heads * length**2 / 2**30:.0f} GiB. "
        f"By blocks (documents of 2048), 1 head: {blocks / 2**20:.0f} MiB, output included.",
    ]
    table = "\n".join(lines) + "\n"
    print(table)
    if vars(options) == vars(parser.parse_args([])):
        Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


def segments_of(length: int) -> torch.Tensor:
    return (torch.arange(length) // 2048)[None]


if __name__ == "__main__":
    main()
