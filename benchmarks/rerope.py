"""ReRoPE attention against plain causal attention: time, memory by length, one decoding step.

Run `python benchmarks/rerope.py [--quick] [--threads N] [--clock wall|cpu]`; the table goes to the terminal and to
`rerope.md` beside this file. Times are medians of interleaved runs, so that a slow spell hits both sides; ratios are
medians of the ratios of neighbouring runs. On a busy machine `--threads 1 --clock cpu` counts only the time that the
process itself spent.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu.attention.rerope import far_shift, piecewise_attention, rerope_attention
from danlu.positions.rotary import Rotary, inverse_frequencies

HEADS, HEAD_DIM, WINDOW = 8, 64, 512
ROTARY = Rotary(inverse_frequencies(HEAD_DIM))
Call = Callable[[], object]


def tensors(length: int, heads: int = HEADS, kv_heads: int | None = None, n_queries: int | None = None) -> list[Tensor]:
    """Draw q, k and v in the memory order of a projection's output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(n_queries or length, heads), (length, kv_heads or heads), (length, kv_heads or heads)]
    return [torch.randn(1, n, h, HEAD_DIM, generator=generator).transpose(1, 2) for n, h in shapes]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rotate and attend: what a model does today."""
    cos, sin = ROTARY.angles(torch.arange(k.shape[2]))
    return F.scaled_dot_product_attention(ROTARY.apply(q, cos, sin), ROTARY.apply(k, cos, sin), v, is_causal=True)


def unrotated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend alone, without the rotations."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def ours(q: Tensor, k: Tensor, v: Tensor, stride: float = math.inf) -> Tensor:
    """Attend with clipped distances, all rotations included."""
    return rerope_attention(q, k, v, rotary=ROTARY, window=WINDOW, stride=stride)


def published(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend as the released patch does: all heads, two scaled products, a choice, an additive mask, a softmax."""
    length = k.shape[2]
    cos, sin = ROTARY.angles(torch.arange(length))
    near = ROTARY.apply(q, cos, sin) @ ROTARY.apply(k, cos, sin).mT / math.sqrt(HEAD_DIM)
    far = ROTARY.rotate(q, far_shift(WINDOW, math.inf)) @ k.mT / math.sqrt(HEAD_DIM)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    mask = torch.zeros(length, length).masked_fill_(distance < 0, torch.finfo(q.dtype).min)
    scores = torch.where(distance.abs() < WINDOW, near, far) + mask
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def dense_by_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by the same matrices with as little memory traffic as they allow: one head at a time, masked in place."""
    length = k.shape[2]
    cos, sin = ROTARY.angles(torch.arange(length))
    q_near, k_near = ROTARY.apply(q, cos, sin), ROTARY.apply(k, cos, sin)
    q_far = ROTARY.rotate(q, far_shift(WINDOW, math.inf))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    outs = []
    for head in range(q.shape[1]):
        near, far = (x[:, head] @ y[:, head].mT for x, y in ((q_near, k_near), (q_far, k)))
        scores = torch.where(distance < WINDOW, near, far) * HEAD_DIM**-0.5
        outs.append(scores.masked_fill_(distance < 0, -math.inf).softmax(-1) @ v[:, head])
    return torch.stack(outs, 1)


def with_backward(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Call:
    """Make a call that also runs the backward pass."""
    grad = torch.ones(1, inputs[0].shape[2], inputs[0].shape[1], HEAD_DIM).transpose(1, 2)

    def call() -> None:
        function(*(x.detach().requires_grad_() for x in inputs)).backward(grad)

    return call


def interleave(calls: Sequence[Call], runs: int, clock: Callable[[], float]) -> list[list[float]]:
    """Time the calls in turn; milliseconds by call and run, after one call of each that does not count."""
    times: list[list[float]] = [[] for _ in calls]
    for run in range(runs + 1):
        for call, record in zip(calls, times, strict=True):
            start = clock()
            call()
            if run:
                record.append(1e3 * (clock() - start))
    return times


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Give the median ratio of neighbouring runs."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def speed(lengths: Sequence[int], runs: int, clock: Callable[[], float]) -> list[str]:
    """Make the table of forward and forward + backward times."""
    rows = [
        "| length | pass | SDPA, ms | rotations + SDPA, ms | ReRoPE, ms | to rotations + SDPA | fastest to fastest "
        "| to SDPA | Leaky (16) to rotations + SDPA |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for length in lengths:
        inputs = tensors(length)
        functions = [unrotated, plain, ours, lambda q, k, v: ours(q, k, v, 16.0)]
        for name in ("forward", "forward + backward"):
            if name == "forward":
                calls: list[Call] = [lambda f=f, x=inputs: f(*x) for f in functions]  # type: ignore[misc]
            else:
                calls = [with_backward(f, inputs) for f in functions]
            bare, rotated, rerope, leaky = interleave(calls, runs, clock)
            middle = " | ".join(f"{statistics.median(x):.0f}" for x in (bare, rotated, rerope))
            rows.append(
                f"| {length} | {name} | {middle} | **{ratio(rerope, rotated):.3f}** | {min(rerope) / min(rotated):.3f} "
                f"| {ratio(rerope, bare):.3f} | {ratio(leaky, rotated):.3f} |"
            )
            print(rows[-1], flush=True)
    return rows


def against_dense(length: int, runs: int, clock: Callable[[], float]) -> list[str]:
    """Compare with the formulation that fills length x length matrices."""
    inputs = tensors(length)
    largest = (dense_by_head(*inputs) - ours(*inputs)).abs().max().item()
    calls = [lambda: published(*inputs), lambda: dense_by_head(*inputs), lambda: ours(*inputs)]
    whole, by_head, fast = interleave(calls, runs, clock)
    rows = ["| length | formulation | ms | ReRoPE, ms | times slower |", "| ---: | --- | ---: | ---: | ---: |"]
    for name, slow in (("as published", whole), ("head by head, in place", by_head)):
        middle = f"{statistics.median(slow):.0f} | {statistics.median(fast):.0f}"
        rows.append(f"| {length} | {name} | {middle} | **{ratio(slow, fast):.1f}** |")
        print(rows[-1], flush=True)
    return [*rows, "", f"Largest difference of the outputs {largest:.1e}."]


def decode(length: int, runs: int, clock: Callable[[], float]) -> list[str]:
    """Time one query against a cache of raw keys and a ring of `WINDOW` rotated ones."""
    rows = [
        "| query heads / key heads | SDPA, ms | ReRoPE, ms | to SDPA | one softmax over two products, to SDPA |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for kv_heads in (HEADS, 2):
        q, k, v = tensors(length, kv_heads=kv_heads, n_queries=1)
        k, v = k.contiguous(), v.contiguous()
        ring = ROTARY.rotate(k[:, :, -WINDOW:], torch.arange(length - WINDOW, length)).contiguous()
        cos, sin = ROTARY.angles(torch.tensor([length - 1]))
        far_cos, far_sin = ROTARY.angles(far_shift(WINDOW, math.inf))
        grouped = kv_heads != HEADS

        def stock(q=q, k=k, v=v, cos=cos, sin=sin, grouped=grouped):  # type: ignore[no-untyped-def]
            return F.scaled_dot_product_attention(ROTARY.apply(q, cos, sin), k, v, enable_gqa=grouped)

        def flash(q=q, k=k, v=v, ring=ring, cos=cos, sin=sin, far=(far_cos, far_sin)):  # type: ignore[no-untyped-def]
            near, far_query = ROTARY.apply(q, cos, sin), ROTARY.apply(q, *far)
            return piecewise_attention(near, ring, far_query, k, v, window=WINDOW)

        def products(q=q, k=k, v=v, ring=ring, cos=cos, sin=sin, far=(far_cos, far_sin), h=kv_heads):  # type: ignore[no-untyped-def]
            near, far_query = (
                x.reshape(1, h, -1, HEAD_DIM) for x in (ROTARY.apply(q, cos, sin), ROTARY.apply(q, *far))
            )
            scores = torch.cat((far_query @ k[:, :, :-WINDOW].mT, near @ ring.mT), -1) * HEAD_DIM**-0.5
            return (scores.softmax(-1) @ v).reshape(q.shape)

        with torch.no_grad():
            torch.testing.assert_close(flash(), products())
            sdpa, two, one = interleave([stock, flash, products], 20 * runs, clock)
        middle = " | ".join(f"{statistics.median(x):.2f}" for x in (sdpa, two))
        rows.append(f"| {HEADS} / {kv_heads} | {middle} | **{ratio(two, sdpa):.3f}** | {ratio(one, sdpa):.3f} |")
        print(rows[-1], flush=True)
    return rows


def peak_mib() -> float:
    """Give the largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1 << 20)


def memory_of(length: int, name: str) -> None:
    """Print how much the peak resident size grows over the inputs, forward and then with backward; one head."""
    function = ours if name == "rerope" else plain
    for size in (WINDOW + 1, length):  # the first round loads whatever the first call loads
        inputs = [x.requires_grad_() for x in tensors(size, heads=1)]
        start = peak_mib()
        out = function(*inputs)
        forward = peak_mib() - start
        out.backward(torch.ones_like(out))
        both = peak_mib() - start
    print(f"{forward:.1f} {both:.1f}")


def memory(lengths: Sequence[int]) -> list[str]:
    """Measure each length in a process of its own."""
    rows = [
        "| length | plain forward, MiB | ReRoPE forward, MiB | plain with backward, MiB | ReRoPE with backward, MiB "
        "| one length x length matrix, MiB |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for length in lengths:
        numbers = []
        for name in ("plain", "rerope"):
            command = [sys.executable, __file__, "--memory-of", str(length), name]
            numbers += subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        plain_forward, plain_both, our_forward, our_both = numbers
        matrix = f"{length * length * 4 / 2**20:.0f}"
        cells = (plain_forward, our_forward, plain_both, our_both, matrix)
        rows.append(f"| {length} | " + " | ".join(cells) + " |")
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run everything and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shorter lengths and fewer runs; writes no file")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=int, default=0, help="timed runs of each call")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument(
        "--only", choices=["speed", "dense", "decode", "memory"], help="measure one section again, keep the others"
    )
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        memory_of(int(options.memory_of[0]), options.memory_of[1])
        return
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    runs = options.runs or (3 if options.quick else 7)
    lengths = [2048, 4096] if options.quick else [2048, 4096, 8192, 16384]
    sizes = [2**n for n in range(11, 14 if options.quick else 17)]
    sections = {
        # first, because a child process starts with its parent's peak
        "memory": ("Growth of the peak memory over the inputs, one head", lambda: memory(sizes)),
        "speed": ("Time", lambda: speed(lengths, runs, clock)),
        "dense": ("Against the dense formulation", lambda: against_dense(min(lengths[-1], 8192), 3, clock)),
        "decode": (f"One decoding step, {lengths[-1]} keys", lambda: decode(lengths[-1], runs, clock)),
    }
    text = [
        "# ReRoPE attention against plain causal attention",
        "",
        f"Batch 1, {HEADS} heads of {HEAD_DIM} (unless said otherwise), window {WINDOW}, float32, {options.threads} "
        f"threads, {options.clock} clock, PyTorch {torch.__version__}, {platform.machine()}. Medians of {runs} "
        "interleaved runs. Both sides rotate with the same code; all rotations are inside the times. Made by "
        "`benchmarks/rerope.py`.",
    ]
    file = Path(__file__).with_suffix(".md")
    known = {} if options.quick or not file.exists() else read_sections(file)
    for name, (title, make) in sections.items():
        if options.only in (None, name):
            known[title] = "\n".join(make())
            done = [f"## {t}\n\n{known[t]}" for t, _ in sections.values() if t in known]
            if not options.quick:  # after each section: a stopped run keeps what it has measured
                file.write_text("\n\n".join(["\n".join(text), *done]) + "\n")


def read_sections(file: Path) -> dict[str, str]:
    """Sections of the report written before, by title; a run with --only replaces one of them."""
    parts = file.read_text().split("\n## ")[1:]
    return {title: body.strip() for title, _, body in (part.partition("\n\n") for part in parts)}


if __name__ == "__main__":
    main()
