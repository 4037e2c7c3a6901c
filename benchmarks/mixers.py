"""Every mixer of the decoder against the host's Llama of the same size: prefill, training step, decoding step, cache.

python benchmarks/mixers.py [--context 4096] [--repeats 3]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import danlu

SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
}
MIXERS: dict[str, dict[str, Any]] = {
    "full": {},
    "grouped": {"num_key_value_heads": 2},
    "window": {"sliding_window": 256},
    "hybrid": {"sliding_window": 256},
    "latent": {"kv_rank": 128, "rope_head_dim": 32},
    "linear": {"feature_map": "favor", "num_features": 128},
    "vq": {"num_codes": 256, "block_size": 256},
    "recurrent": {},
}
LLAMA = "host's Llama"


def build(name: str, device: str) -> Any:
    torch.manual_seed(0)
    if name == LLAMA:
        model: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
    else:
        model = danlu.DanluForCausalLM(danlu.DanluConfig(**SIZES, mixer=name, **MIXERS[name]))
    return model.to(device).eval()


def seconds(work: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def held(thing: Any) -> int:
    """Bytes of the tensors that a cache layer, or a state in it, holds."""
    if isinstance(thing, torch.Tensor):
        return thing.numel() * thing.element_size()
    if isinstance(thing, list | tuple):
        return sum(map(held, thing))
    return sum(map(held, vars(thing).values())) if hasattr(thing, "__dict__") else 0


def train(model: Any, ids: torch.Tensor) -> None:
    model.train()
    model(ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)
    model.eval()


@torch.no_grad()
def prefill(model: Any, ids: torch.Tensor) -> Any:
    return model(ids, use_cache=True, logits_to_keep=1).past_key_values


@torch.no_grad()
def step(model: Any, cache: Any, ids: torch.Tensor) -> None:
    model(ids[:, :1], past_key_values=cache, use_cache=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.randint(4096, (1, options.context), generator=torch.Generator().manual_seed(0)).to(device)
    names = [LLAMA, *MIXERS]
    models = {name: build(name, device) for name in names}
    caches = {name: prefill(model, ids) for name, model in models.items()}
    sizes = {name: sum(map(held, cache.layers)) for name, cache in caches.items()}
    works: dict[str, Callable[[str], Any]] = {
        "prefill": lambda name: prefill(models[name], ids),
        "training step": lambda name: train(models[name], ids[:, :2048]),
        "decoding step": lambda name: step(models[name], caches[name], ids),
    }
    times: dict[tuple[str, str], list[float]] = {}
    for kind, work in works.items():
        repeats = options.repeats * (5 if kind == "decoding step" else 1)
        for name in names:
            work(name)
        for _ in range(repeats):
            for name in names:
                times.setdefault((kind, name), []).append(seconds(lambda n=name, w=work: w(n), device))
    lines = [
        "# Mixers of the decoder against the host's Llama",
        "",
        f"4 layers of 512, 8 heads of 64, batch 1, {device}, float32, {torch.get_num_threads()} threads. Prefill and "
        f"decoding at {options.context} tokens, training step (forward and backward) at 2048. Milliseconds are medians "
        f"of {options.repeats} interleaved runs ({5 * options.repeats} steps), ratios medians of pairs.",
        "",
        "| mixer | prefill, ms | ratio | training step, ms | ratio | decoding step, ms | ratio | cache, KiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in names:
        cells = []
        for kind in works:
            mine, host = times[kind, name], times[kind, LLAMA]
            ratio = statistics.median(a / b for a, b in zip(mine, host, strict=True))
            cells.append(f"{1e3 * statistics.median(mine):.1f} | {ratio:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} | {sizes[name] / 1024:.0f} |")
    table = "\n".join(lines) + "\n"
    print(table)
    if options.context == parser.get_default("context"):
        Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
