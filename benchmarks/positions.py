"""Cost of the frequency side: building a table, the base bound, and a token under exported frequencies.

The first two tables are single-process times; the third interleaves the same Llama with its own configuration and with
an exported one (the host's longrope type), because rescaled frequencies must not cost anything per token.

    python benchmarks/positions.py [--length 512] [--repeats 15] [--longest 131072]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from danlu.positions import METHODS, export_config, max_length, recommended_base, rope_inv_freq


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median over `repeats`, after one call that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def tables(repeats: int) -> None:
    print("| method | one table, d = 128 (ms) |\n|---|---|")
    for method in METHODS:
        cost = milliseconds(
            lambda method=method: rope_inv_freq(method, 128, 1e4, factor=8.0, trained_length=4096, new_base=1e6),
            20 * repeats,
        )
        print(f"| {method} | {cost:.3f} |")


def bounds(longest: int) -> None:
    start = time.perf_counter()
    max_length(1e4, 128)
    recommended_base(64, 128)
    print(f"\nfirst call (import and compilation): {time.perf_counter() - start:.1f} s\n")
    print("| L, d = 128 | b* | b* alone (CPU s) | b_safe | b*, b_safe and islands (CPU s) |\n|---|---|---|---|---|")
    length = 1024
    while length <= longest:
        start = time.process_time()
        quick = recommended_base(length, 128, safe=False)
        middle = time.process_time()
        full = recommended_base(length, 128)
        end = time.process_time()
        print(f"| {length} | {quick.b_star:.4g} | {middle - start:.2f} | {full.b_safe:.4g} | {end - middle:.2f} |")
        length *= 2


def tokens(length: int, repeats: int, device: torch.device) -> None:
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=length // 4,
    )
    torch.manual_seed(0)
    stock = LlamaForCausalLM(config).to(device).eval()
    scaled = LlamaForCausalLM(export_config(config, "ntk-mixed", factor=4.0)).to(device).eval()
    scaled.load_state_dict(stock.state_dict())
    ids = torch.randint(0, 2048, (1, length), device=device)

    def decode(model: LlamaForCausalLM) -> None:
        cache = model(ids[:, : length // 2]).past_key_values
        for step in range(length // 2, length // 2 + 32):
            model(ids[:, step : step + 1], past_key_values=cache)

    print("\n| work | stock (ms) | exported ntk-mixed (ms) | ratio |\n|---|---|---|---|")
    with torch.no_grad():
        for name, call in (("prefill", lambda model: model(ids)), ("prefill of a half + 32 steps", decode)):
            call(stock), call(scaled)
            pairs = []
            for turn in range(repeats):
                took = {}
                for model in (stock, scaled) if turn % 2 else (scaled, stock):
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    start = time.perf_counter()
                    call(model)
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    took[id(model)] = 1e3 * (time.perf_counter() - start)
                pairs.append((took[id(stock)], took[id(scaled)]))
            ours = [statistics.median(column) for column in zip(*pairs, strict=True)]
            ratio = statistics.median(b / a for a, b in pairs)
            print(f"| {name}, length {length} | {ours[0]:.1f} | {ours[1]:.1f} | {ratio:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--longest", type=int, default=131072)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"torch {torch.__version__}, {device.type}, {torch.get_num_threads()} threads\n")
    tables(options.repeats)
    bounds(options.longest)
    tokens(options.length, options.repeats, device)


if __name__ == "__main__":
    main()
