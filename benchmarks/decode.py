"""One decoding step of a whole model at a long context: extended against the same model as it is.

The cache is filled with random keys and values instead of a prefill, which changes nothing for the cost of a step.

    python benchmarks/decode.py [--context 16384] [--repeats 25]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import danlu

STACKS = {
    "as it is": (),
    "ReRoPE(512)": (danlu.ReRoPE(window=512),),
    "ReRoPE(512) + log n": (danlu.ReRoPE(window=512), danlu.LogN()),
    "leaky ReRoPE(512, 16)": (danlu.LeakyReRoPE(window=512, stride=16.0),),
    "dynamic NTK": (danlu.DynamicNTK(),),
    "YaRN(8)": (danlu.YaRN(factor=8),),
}


def build(device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device, dtype).eval()


def filled_cache(model: LlamaForCausalLM, context: int) -> DynamicCache:
    """A cache of ``context`` random tokens, made through one real step so that it is of the kind the model makes."""
    device, dtype = model.device, model.dtype
    cache = model(torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=True).past_key_values
    for layer in cache.layers:
        shape = (*layer.keys.shape[:2], context, layer.keys.shape[3])
        layer.keys = torch.randn(shape, dtype=dtype, device=device)
        layer.values = torch.randn(shape, dtype=dtype, device=device)
    return cache


def step_seconds(model: LlamaForCausalLM, cache: DynamicCache) -> float:
    token = torch.ones(1, 1, dtype=torch.long, device=model.device)
    start = time.perf_counter()
    model(token, past_key_values=cache, use_cache=True)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of all tensors that the cache's layers hold, ours included."""
    tensors = [x for layer in cache.layers for x in vars(layer).values() if isinstance(x, torch.Tensor)]
    return sum(x.numel() * x.element_size() for x in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=25)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    times: dict[str, list[float]] = {name: [] for name in STACKS}
    bytes_held: dict[str, int] = {}
    models, caches = {}, {}
    with torch.no_grad():
        for name, stack in STACKS.items():
            models[name] = build(device, dtype)
            if stack:
                danlu.extend(models[name], *stack)
            caches[name] = filled_cache(models[name], options.context)
            step_seconds(models[name], caches[name])
        for _ in range(options.repeats):
            for name, model in models.items():
                times[name].append(step_seconds(model, caches[name]))
    bytes_held = {name: cache_bytes(cache) for name, cache in caches.items()}
    plain = list(STACKS)[0]
    lines = [
        "# Decoding step: extended against the model as it is",
        "",
        f"Llama of 4 layers, 8 heads of 64, context {options.context}, batch 1, {device}, {dtype}, "
        f"{torch.get_num_threads()} threads; {options.repeats} interleaved steps.",
        "",
        "| stack | step, ms (median) | ratio to plain (median of pairs) | cache bytes, ratio |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name in STACKS:
        ratio = statistics.median(a / b for a, b in zip(times[name], times[plain], strict=True))
        memory = bytes_held[name] / bytes_held[plain]
        lines.append(f"| {name} | {1e3 * statistics.median(times[name]):.1f} | {ratio:.2f} | {memory:.3f} |")
    table = "\n".join(lines) + "\n"
    print(table)
    if options.context == parser.get_default("context"):
        Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
