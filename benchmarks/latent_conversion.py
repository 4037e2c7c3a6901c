"""Converting a model to multi-head latent attention: time and memory, against a plain decomposition of its weights.

The peer takes one full singular value decomposition of the stacked key and value weights per layer, the least that a
conversion without text can do. It gives no rotary key, no report and no checkpoint. Weights are random, which changes
nothing for the cost.

    python benchmarks/latent_conversion.py [--tokens 4096] [--repeats 3]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import danlu
from danlu.lab.measuring import peak_bytes
from danlu.tuning.latent.conversion import to_mla

LENGTH, RANK, ROPE = 512, 192, 64


def build() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def plain_svd(model: LlamaForCausalLM) -> None:
    """The peer: keys and values of each layer through the first directions of their weights."""
    for layer in model.model.layers:
        attention = layer.self_attn
        joint = torch.cat((attention.k_proj.weight, attention.v_proj.weight)).double()
        u, s, v = torch.linalg.svd(joint, full_matrices=True)
        _ = u[:, :RANK] * s[:RANK], v[:RANK]


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model = build()
    count = sum(parameter.numel() for parameter in model.parameters())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(32000, (max(1, options.tokens // LENGTH), LENGTH), generator=generator)
    ways = {
        "full SVD of the weights (peer)": lambda: plain_svd(model),
        "weight-svd, whole checkpoint": lambda: to_mla(model, RANK, ROPE, method="weight-svd"),
        "exact, whole checkpoint": lambda: to_mla(model, method="exact"),
        f"pca on {ids.numel():,} tokens, report": lambda: to_mla(model, RANK, ROPE, calibration=ids),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, call in ways.items():
            times[name].append(seconds(call))
    peaks = {name: peak_bytes(call) for name, call in ways.items()}
    peer = next(iter(ways))
    lines = [
        "# Conversion to multi-head latent attention",
        "",
        f"danlu {danlu.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, CPU, float32. Llama "
        f"of {count / 1e6:.0f} million weights: 12 layers, width 512, 8 heads, 4 key heads of 64; 512 numbers per "
        f"token and layer become {RANK} + {ROPE}. {options.repeats} interleaved runs, medians.",
        "",
        "| conversion | seconds | ratio to the peer | peak memory, of the weights | 1 billion weights, minutes |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in ways:
        took = statistics.median(times[name])
        ratio = statistics.median(a / b for a, b in zip(times[name], times[peer], strict=True))
        minutes = took * 1e9 / count / 60
        lines.append(f"| {name} | {took:.1f} | {ratio:.1f} | {peaks[name] / weights:.2f} | {minutes:.1f} |")
    lines += [
        "",
        "The last column scales by the number of weights. Most of the time of `pca` is one forward pass over the text, "
        "which scales so; the decompositions grow with the cube of the width of keys and values. Memory counts "
        "tensors made during the call, the new model's weights among them.",
        "",
    ]
    table = "\n".join(lines)
    print(table)
    if vars(options) == {name: parser.get_default(name) for name in vars(options)}:
        Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
