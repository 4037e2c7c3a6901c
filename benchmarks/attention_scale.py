"""Cost of log n scaling and of key normalisation, as a share of a training step and of a forward pass of a small Llama.

Both are elementwise on one tensor per layer, so the machine's noise is larger than what they add. The table therefore
times the added work alone, forward and backward, and sets it against the step; the last column is the plain ratio of
interleaved steps, noise included. A step is forward and backward, without the optimiser. CPU times are processor time.

    python benchmarks/attention_scale.py [--length 512] [--repeats 9]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from danlu.attention import add_key_norm, key_norm, log_n_factor, remove_key_norm

TRAINED = 256


def scaled(query: torch.Tensor, keys: int) -> torch.Tensor:
    positions = torch.arange(keys - query.shape[2], keys, device=query.device)
    return query * log_n_factor(positions, TRAINED).to(query.dtype)[:, None]


def log_n_attention(module, query, key, value, attention_mask, **kwargs):
    return sdpa_attention_forward(module, scaled(query, key.shape[2]), key, value, attention_mask, **kwargs)


AttentionInterface.register("log_n", log_n_attention)
AttentionMaskInterface.register("log_n", sdpa_mask)


def build(device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=TRAINED,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device, dtype)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    # Processor time on a CPU: milliseconds against seconds are not comparable by the clock of a machine that does more.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def measure(length: int, repeats: int, device: torch.device, dtype: torch.dtype) -> None:
    model = build(device, dtype)
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    ids = torch.randint(0, 2048, (1, length), device=device)

    def use(name: str) -> None:
        remove_key_norm(model)
        model.set_attn_implementation("log_n" if name == "log n" else "sdpa")
        if name == "key norm":
            add_key_norm(model)

    def forward() -> None:
        with torch.no_grad():
            model(ids, use_cache=False)

    def step() -> None:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()

    # Layouts as in the model: queries are transposed views, keys come flat from their projection.
    flat = torch.randn(1, length, heads * 64, device=device, dtype=dtype, requires_grad=True)
    seed = torch.randn_like(flat)

    def log_n_work(backward: bool) -> None:
        for _ in range(layers):
            out = scaled(flat.unflatten(-1, (-1, 64)).transpose(1, 2), length)
            if backward:
                out.backward(seed.unflatten(-1, (-1, 64)).transpose(1, 2))

    def key_norm_work(backward: bool) -> None:
        for _ in range(layers):
            out = key_norm(flat.unflatten(-1, (-1, 64))).flatten(-2)
            if backward:
                out.backward(seed)

    work = {"log n": log_n_work, "key norm": key_norm_work}
    whole: dict[tuple[str, str], list[float]] = {}
    added: dict[tuple[str, str], list[float]] = {}
    for turn in range(repeats + 1):
        names = ["plain", *work]
        for name in names[turn % 3 :] + names[: turn % 3]:  # no variant always follows the same other
            use(name)
            for kind, call in (("forward", forward), ("step", step)):
                elapsed = seconds(call, device)
                if turn:  # the first turn warms up
                    whole.setdefault((name, kind), []).append(elapsed)
        for name, call in work.items():
            with torch.no_grad():
                alone = seconds(lambda call=call: call(False), device)
            both = seconds(lambda call=call: call(True), device)
            if turn:
                added.setdefault((name, "forward"), []).append(alone)
                added.setdefault((name, "step"), []).append(both)
    threads = torch.get_num_threads() if device.type == "cpu" else torch.cuda.get_device_name()
    print(f"\n{device.type} ({threads}), {dtype}, length {length}, 6 layers, 8 heads of 64, medians of {repeats}\n")
    print("| method | part | plain ms | added ms | share | interleaved ratio |")
    print("|---|---|---:|---:|---:|---:|")
    for (name, kind), values in added.items():
        plain, extra = statistics.median(whole["plain", kind]), statistics.median(values)
        ratio = statistics.median(a / b for a, b in zip(whole[name, kind], whole["plain", kind], strict=True))
        print(f"| {name} | {kind} | {plain * 1e3:.1f} | {extra * 1e3:.2f} | {extra / plain:.1%} | {ratio:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    measure(arguments.length, arguments.repeats, torch.device("cpu"), torch.float32)
    if torch.cuda.is_available():
        measure(arguments.length * 4, arguments.repeats, torch.device("cuda"), torch.bfloat16)


if __name__ == "__main__":
    main()
