"""Earth-mover loss, forward and backward with the head: against the published formulation and against cross entropy.

Every row starts from hidden states, head and labels and ends with the gradients of hidden states and head, so the
head's three products are in all of them. Times are medians of interleaved runs, ratios medians of the ratios of
neighbouring runs. Memory is the peak of bytes allocated on top of the inputs, counted from the allocator's events.
Before anything is timed, all forms of one loss must agree in value and gradients.

    python benchmarks/emo.py [--tokens 4096] [--vocabulary 32000] [--width 512] [--repeats 5] [--threads N]

On a busy machine `--threads 1 --clock cpu` counts only the time that the process itself spent.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import danlu
from danlu.lab import measuring
from danlu.losses.emo_functional import Cost


def published(logits: Tensor, labels: Tensor, directions: Tensor) -> Tensor:
    """Mode 1 as the released code computes it: one-hot labels, smoothed ones, log-softmax, softmax, two products."""
    one_hot = F.one_hot(labels, logits.shape[-1]).to(logits.dtype)
    smoothed = one_hot + 1e-15
    smoothed = smoothed / smoothed.sum(-1, keepdim=True)
    log_p = logits.log_softmax(-1)
    ce = -(log_p * one_hot).sum(-1)
    p = log_p.exp()
    p = p - (p * one_hot).detach()
    emo = 1 - ((p @ directions) * (smoothed @ directions)).sum(-1)
    return (0.5 * (ce + (ce / (emo + 1e-10)).detach() * emo)).mean()


def forms(hidden: Tensor, head: Tensor, labels: Tensor, cost: Cost) -> dict[str, Callable[[], Tensor]]:
    """The rows of the table; each gives a loss that can be differentiated."""
    forms: dict[str, Callable[[], Tensor]] = {
        "published formulation": lambda: published(hidden @ head.T, labels, cost.table),
        "danlu, logits given": lambda: danlu.emo_loss(hidden @ head.T, labels, cost),
        "danlu, no logits": lambda: danlu.linear_emo_loss(hidden, head, labels, cost),
        "danlu, no logits, cost from the head": lambda: danlu.linear_emo_loss(hidden, head, labels),
        "danlu, vocabulary in pieces": lambda: danlu.linear_emo_loss(hidden, head, labels, cost, vocab_chunk=2048),
        "cross entropy": lambda: F.cross_entropy(hidden @ head.T, labels),
    }
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        forms["cross entropy, no logits (torch)"] = lambda: F.linear_cross_entropy(
            hidden, head, labels, options=options
        )
    return forms


def step(form: Callable[[], Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
    loss = form()
    return loss.detach(), *torch.autograd.grad(loss, tensors)


def seconds(form: Callable[[], Tensor], clock: Callable[[], float], *tensors: Tensor) -> float:
    start = clock()
    step(form, *tensors)
    if tensors[0].is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def peak_bytes(form: Callable[[], Tensor], *tensors: Tensor) -> int:
    """Most bytes alive at once on top of what was there."""
    if tensors[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(form, *tensors)
        return torch.cuda.max_memory_allocated() - before
    return measuring.peak_bytes(lambda: step(form, *tensors))


def check(found: dict[str, Callable[[], Tensor]], *tensors: Tensor) -> None:
    """All forms of the earth-mover loss must be the same function; so must those of cross entropy."""
    results = {name: step(form, *tensors) for name, form in found.items()}
    for name, values in results.items():
        reference = results["cross entropy" if name.startswith("cross") else "published formulation"]
        for mine, theirs in zip(values, reference, strict=True):
            error = float((mine - theirs).abs().max() / theirs.abs().max())
            if error > 1e-3:
                raise SystemExit(f"{name} differs from its reference by {error:.1e} of the largest entry")


def table(
    title: str, found: dict[str, Callable[[], Tensor]], repeats: int, clock: Callable[[], float], *tensors: Tensor
) -> list[str]:
    memory = {name: peak_bytes(form, *tensors) for name, form in found.items()}
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(repeats):
        for name, form in found.items():
            times[name].append(seconds(form, clock, *tensors))
    lines = [
        f"## {title}",
        "",
        "| loss | s | time / published | time / cross entropy | peak, MiB | peak / published | peak / cross entropy |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in found:
        cells = [f"{statistics.median(times[name]):.2f}"]
        for peer in ("published formulation", "cross entropy"):
            cells.append(f"{statistics.median(a / b for a, b in zip(times[name], times[peer], strict=True)):.2f}")
        cells.append(f"{memory[name] / 2**20:.0f}")
        cells += [f"{memory[name] / memory[peer]:.2f}" for peer in ("published formulation", "cross entropy")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    tokens, vocabulary, width = options.tokens, options.vocabulary, options.width
    hidden = torch.randn(tokens, width, generator=generator).to(device).requires_grad_()
    head = (0.1 * torch.randn(vocabulary, width, generator=generator)).to(device).requires_grad_()
    cost = Cost(Cost.of(head.detach()).unit())
    frequencies = 1 / torch.arange(1, vocabulary + 1)
    drawn = {
        "as frequent as words (Zipf)": torch.multinomial(frequencies, tokens, replacement=True, generator=generator),
        "uniform": torch.randint(vocabulary, (tokens,), generator=generator),
    }
    lines = [
        "# Earth-mover loss against the published formulation and cross entropy",
        "",
        f"{tokens} tokens, vocabulary {vocabulary}, width {width} (also of the cost embedding), float32, {device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}; forward and backward "
        f"with the head, {options.repeats} interleaved runs, {options.clock} clock.",
        "",
    ]
    for name, labels in drawn.items():
        labels = labels.to(device)
        found = forms(hidden, head, labels, cost)
        check(found, hidden, head)
        title = f"Labels {name}: {labels.unique().numel()} distinct"
        clock = time.process_time if options.clock == "cpu" else time.perf_counter
        lines += table(title, found, options.repeats, clock, hidden, head)
    text = "\n".join(lines)
    print(text)
    if (tokens, vocabulary, width) == tuple(parser.get_default(key) for key in ("tokens", "vocabulary", "width")):
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
