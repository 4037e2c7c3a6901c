"""RoFormerV2 against transformers' RoFormer (V1) and BERT of equal shape: forward and training step.

The small published size. V1 has no fused attention in transformers; BERT runs with sdpa, as RoFormerV2 does. Training
is masked language modelling with AdamW, dropout 0.1, no padding.

    python benchmarks/roformer_v2.py [--lengths 128 512] [--tokens 1024] [--repeats 9]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, RoFormerConfig, RoFormerForMaskedLM

import danlu

SIZES = {
    "vocab_size": 12000,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
}
OURS = "RoFormerV2 (danlu)"


def build(device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        OURS: danlu.RoFormerV2ForMaskedLM(danlu.RoFormerV2Config(**SIZES)).to(device),
        "RoFormer V1 (transformers)": RoFormerForMaskedLM(RoFormerConfig(**SIZES)).to(device),
        "BERT, sdpa (transformers)": BertForMaskedLM._from_config(BertConfig(**SIZES), attn_implementation="sdpa").to(
            device
        ),
    }


def seconds(call: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(options: argparse.Namespace, device: str) -> list[tuple[str, int, str, float, float]]:
    """Kind of step, length, model, median seconds, and the peer's time over ours as a median of pairs."""
    models = build(device)
    optimisers = {name: torch.optim.AdamW(model.parameters(), 1e-4) for name, model in models.items()}
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in options.lengths:
        shape = (max(1, options.tokens // length), length)
        ids = torch.randint(1, SIZES["vocab_size"], shape, generator=generator).to(device)
        labels = torch.where(torch.rand(shape, generator=generator).to(device) < 0.15, ids, -100)

        def forward(name: str, ids: torch.Tensor = ids) -> Any:
            with torch.no_grad():
                return models[name].base_model(ids)

        def train(name: str, ids: torch.Tensor = ids, labels: torch.Tensor = labels) -> None:
            models[name](ids, labels=labels).loss.backward()
            optimisers[name].step()
            optimisers[name].zero_grad(set_to_none=True)

        for kind, step in (("forward, no head", forward), ("training", train)):
            for model in models.values():
                model.train(step is train)
            for name in models:
                step(name)
            times: dict[str, list[float]] = {name: [] for name in models}
            for _ in range(options.repeats):
                for name in models:
                    times[name].append(seconds(lambda name=name, step=step: step(name), device))
            for name, values in times.items():
                ratio = statistics.median(a / b for a, b in zip(values, times[OURS], strict=True))
                rows.append((kind, length, name, statistics.median(values), ratio))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--tokens", type=int, default=1024, help="per step")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = [
        "# RoFormerV2 against RoFormer (V1) and BERT",
        "",
        f"Small size (6 layers, width 384, 6 heads, feed-forward 1536, vocabulary 12000), {options.tokens} tokens per "
        f"step, float32, {device}, {torch.get_num_threads()} threads; {options.repeats} interleaved steps. Targets: at "
        "least 1.1 times as fast as V1 in forward at 512 tokens, at least BERT's training throughput.",
        "",
        "| step | length | model | ms (median) | its time over RoFormerV2's (median of pairs) |",
        "| --- | ---: | --- | ---: | ---: |",
    ]
    for kind, length, name, spent, ratio in measure(options, device):
        lines.append(f"| {kind} | {length} | {name} | {1e3 * spent:.0f} | {ratio:.2f} |")
    table = "\n".join(lines) + "\n"
    print(table)
    if all(getattr(options, name) == parser.get_default(name) for name in vars(options)):
        Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
