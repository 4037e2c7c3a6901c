"""Decoding of a latent attention model as the host library does it, and in absorbed form on the same cache.

    python benchmarks/absorb.py [--contexts 1024 4096] [--repeats 7] [--threads 1]

The model is a random DeepSeek-V3 of 4 dense layers, width 512, with the head shapes of V2-Lite. The cache is filled
with random latents instead of a prefill, which changes nothing for the cost of a step. Both sides run in turn; times
are medians, ratios are medians over neighbouring runs.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from pathlib import Path

import torch
from transformers import Cache

from danlu.attention.latent.absorb import absorb
from danlu.lab.latent import attention_step, filled_cache, interleaved, small_model, step
from danlu.lab.measuring import peak_bytes


def chunk(model: torch.nn.Module, cache: Cache, tokens: int) -> None:
    with torch.no_grad():
        model(torch.ones(1, tokens, dtype=torch.long), past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.crop(-tokens)


def prefill(model: torch.nn.Module, tokens: int) -> None:
    with torch.no_grad():
        model(torch.ones(1, tokens, dtype=torch.long), use_cache=True, logits_to_keep=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    stock = small_model()
    ours = absorb(copy.deepcopy(stock))
    lines = [
        "# Absorbed decoding against the host library's own",
        "",
        f"DeepSeek-V3 of 4 dense layers, width 512, 16 heads, latent 512 + 64; float32, batch 1, "
        f"{options.threads} thread(s), {options.repeats} interleaved runs.",
        "",
        "| what | stock, ms | absorbed, ms | ratio |",
        "| --- | ---: | ---: | ---: |",
    ]
    memory = []

    def row(what: str, first: object, second: object) -> None:
        a, b, ratio = interleaved(first, second, options.repeats)  # type: ignore[arg-type]
        lines.append(f"| {what} | {1e3 * a:.1f} | {1e3 * b:.2f} | {ratio:.2f} |")
        print(lines[-1])

    for tokens in options.contexts:
        with torch.no_grad():
            caches = [filled_cache(model, tokens) for model in (stock, ours)]
        row(
            f"step of one attention layer, {tokens} cached",
            attention_step(stock, caches[0]),
            attention_step(ours, caches[1]),
        )
        row(f"step of the model, {tokens} cached", partial(step, stock, caches[0]), partial(step, ours, caches[1]))
        trials = {"stock": (stock, caches[0]), "absorbed": (ours, caches[1])}
        memory += [(tokens, name, peak_bytes(partial(step, *trial)) / 2**20) for name, trial in trials.items()]
    last = options.contexts[-1]
    for new in (16, 64, 170, 256):
        row(
            f"chunk of {new} tokens, {last} cached",
            partial(chunk, stock, caches[0], new),
            partial(chunk, ours, caches[1], new),
        )
    row("prefill of 1024 tokens", partial(prefill, stock, 1024), partial(prefill, ours, 1024))
    lines += ["", "| memory of a step above the model and the cache | cached | MiB |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {tokens} | {size:.1f} |" for tokens, name, size in memory]
    table = "\n".join(lines) + "\n"
    print(table)
    if vars(options) == {name: parser.get_default(name) for name in vars(options)}:
        Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
