"""A training step with DeepNorm's residual against the host's plain one, and against pre-norm for decoders.

python benchmarks/deepnorm.py [--layers 12] [--hidden 512] [--length 256] [--repeats 15]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from danlu.models.deepnorm import apply_deepnorm

VOCABULARY = 4096


def build(kind: str, layers: int, hidden: int, length: int) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": layers, "num_attention_heads": hidden // 64}
    if kind == "BERT":
        config = BertConfig(
            **sizes, hidden_size=hidden, intermediate_size=4 * hidden, max_position_embeddings=length,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return BertForMaskedLM(config)
    if kind == "GPT-2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_embd=hidden, n_layer=layers, n_head=hidden // 64, n_positions=length, **dropout
            )
        )
    return LlamaForCausalLM(LlamaConfig(**sizes, hidden_size=hidden, intermediate_size=8 * hidden // 3 // 64 * 64))


def step_seconds(model: Any, tokens: torch.Tensor) -> float:
    """Forward and backward; the optimiser's part is the same for all and left out."""
    model.zero_grad()
    synchronise(tokens)
    start = time.perf_counter()
    model(input_ids=tokens, labels=tokens).loss.backward()
    synchronise(tokens)
    return time.perf_counter() - start


def synchronise(tokens: torch.Tensor) -> None:
    if tokens.is_cuda:
        torch.cuda.synchronize()


def variants(kind: str, options: argparse.Namespace, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """The host as it is, post-norm with alpha = 1, and DeepNorm; BERT as it is is post-norm with alpha = 1."""
    models = {"host": build(kind, options.layers, options.hidden, options.length)}
    if kind != "BERT":
        models["post-norm"] = build(kind, options.layers, options.hidden, options.length)
        apply_deepnorm(models["post-norm"], alpha=1)
    models["DeepNorm"] = build(kind, options.layers, options.hidden, options.length)
    apply_deepnorm(models["DeepNorm"])
    return {name: model.to(device, dtype).train() for name, model in models.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    lines = [
        "# A training step with DeepNorm against the plain residual",
        "",
        f"{options.layers} layers of width {options.hidden}, {options.batch} x {options.length} tokens, forward and "
        f"backward, {device}, {dtype}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}; "
        f"{options.repeats} interleaved steps. `host` is the stock model: pre-norm for Llama and GPT-2, post-norm for "
        "BERT. Made by `benchmarks/deepnorm.py`.",
        "",
        "| model | residual | step, ms (median) | ratio to host (median of pairs) | ratio to post-norm with alpha 1 |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for kind in ("Llama", "GPT-2", "BERT"):
        models = variants(kind, options, device, dtype)
        tokens = torch.randint(VOCABULARY, (options.batch, options.length), device=device)
        times: dict[str, list[float]] = {name: [] for name in models}
        for repeat in range(options.repeats + 1):
            for name, model in models.items():
                seconds = step_seconds(model, tokens)
                if repeat:  # the first round warms up
                    times[name].append(seconds)
        plain = "post-norm" if "post-norm" in models else "host"
        for name in models:
            cells = [ratio(times[name], times["host"]), ratio(times[name], times[plain])]
            lines.append(f"| {kind} | {name} | {1e3 * statistics.median(times[name]):.1f} | {cells[0]} | {cells[1]} |")
    table = "\n".join(lines) + "\n"
    print(table)
    if all(getattr(options, name) == parser.get_default(name) for name in vars(options)):
        Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


def ratio(ours: list[float], theirs: list[float]) -> str:
    return f"{statistics.median(a / b for a, b in zip(ours, theirs, strict=True)):.3f}"


if __name__ == "__main__":
    main()
