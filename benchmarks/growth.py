"""Growing a checkpoint against copying a checkpoint of the grown size.

Growth reads the small model from memory and writes every weight of the large one once, so the fair measure is a copy of
the large one. Both sides end in memory (`grow` against cloning all parameters) or in a file (`grow` and
`save_pretrained` against loading the grown checkpoint and saving it again), and the file counts when it is on the disk.

    python benchmarks/growth.py [--width 512] [--layers 8] [--repeats 7] [--threads N] [--clock wall|cpu]
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as host_logging

from danlu.tuning.growth.grow import grow

Call = Callable[[], object]


def small_model(width: int, layers: int) -> LlamaForCausalLM:
    """Build a Llama with grouped heads and a vocabulary of 32000."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 128, head_dim=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def timed(calls: list[Call], repeats: int, clock: Callable[[], float]) -> list[list[float]]:
    """Time the calls in turn; seconds by call and run, after one call of each that does not count."""
    times: list[list[float]] = [[] for _ in calls]
    for run in range(repeats + 1):
        for call, record in zip(calls, times, strict=True):
            start = clock()
            call()
            if run:
                record.append(clock() - start)
    return times


def to_disk(folder: Path) -> None:
    """Wait until the files of a folder are on the disk and not only in memory."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def row(name: str, ours: list[float], peer: list[float]) -> str:
    """One line of the table."""
    ratio = statistics.median(a / b for a, b in zip(ours, peer, strict=True))
    return f"| {name} | {statistics.median(ours):.3f} | {statistics.median(peer):.3f} | **{ratio:.2f}** |"


def main() -> None:
    """Run everything and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512, help="width of the small model, a multiple of 128")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: for a busy machine")
    options = parser.parse_args()
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    torch.set_num_threads(options.threads)
    host_logging.disable_progress_bar()
    host_logging.set_verbosity_error()
    small = small_model(options.width, options.layers)
    sizes = {
        "hidden_size": 2 * options.width,
        "intermediate_size": 6 * options.width,
        "num_attention_heads": options.width // 32,
        "num_key_value_heads": options.width // 64,
        "num_hidden_layers": options.layers + options.layers // 2,
    }
    large = grow(small, **sizes)
    parameters = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (small, large)]
    rows = ["| what | grow, s | copy, s | ratio |", "| --- | ---: | ---: | ---: |"]

    def clone() -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in large.parameters()]

    exact, plain, copied = timed(
        [lambda: grow(small, **sizes), lambda: grow(small, **sizes, symmetry="none"), clone], options.repeats, clock
    )
    rows += [row("in memory, without noise", plain, copied), row("in memory, antisymmetric noise", exact, copied)]
    folder = Path(tempfile.mkdtemp())
    try:
        large.save_pretrained(folder / "large")
        small.save_pretrained(folder / "small")

        def grown_file() -> None:
            model = LlamaForCausalLM.from_pretrained(folder / "small")
            grow(model, **sizes).save_pretrained(folder / "grown")
            to_disk(folder / "grown")

        def copied_file() -> None:
            LlamaForCausalLM.from_pretrained(folder / "large").save_pretrained(folder / "copied")
            to_disk(folder / "copied")

        ours, peer = timed([grown_file, copied_file], options.repeats, clock)
        rows.append(row("from file to file, antisymmetric noise", ours, peer))
    finally:
        shutil.rmtree(folder)
    text = [
        "# Growing a checkpoint against copying one of the grown size",
        "",
        f"Llama of {parameters[0]:.0f} million parameters (width {options.width}, {options.layers} layers) grown to "
        f"{parameters[1]:.0f} million (twice the width, heads and feed-forward, half as many layers more), float32, "
        f"{options.threads} threads, {options.clock} clock, PyTorch {torch.__version__}, {platform.machine()}. Medians "
        f"of {options.repeats} interleaved runs, files written through to the disk; the ratio is the median of "
        "neighbouring runs. Made by `benchmarks/growth.py`.",
        "",
        *rows,
    ]
    print("\n".join(text))
    if options == parser.parse_args([]):
        Path(__file__).with_suffix(".md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
