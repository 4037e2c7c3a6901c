"""One training step of a ladder against PEFT's LoRA and full tuning on the same backbone: time and memory.

Memory is what autograd keeps for the backward pass, counted by tensors, so it is the same on every machine. An epoch
from cached states reads them from files that ``precompute`` wrote, through a DataLoader.

    python benchmarks/ladder.py [--width 512] [--depth 12] [--batch 8] [--length 256] [--repeats 9]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from danlu.lab.backward_memory import SavedForBackward
from danlu.tuning.ladder.cache import PadRight
from danlu.tuning.ladder.model import LadderConfig, LadderModel

VOCABULARY = 2048
LADDERS = {
    "ladder r=8, all links": LadderConfig(init="random"),
    "ladder r=8, all links, heads of 32": LadderConfig(init="random", min_head_dim=32),
    "ladder r=8, every 3rd, heads of 32": LadderConfig(init="random", layers="every:3", min_head_dim=32),
    "ladder r=8, links 2, 5, 8, heads of 32": LadderConfig(init="random", layers=(2, 5, 8), min_head_dim=32),
}
DISK = tuple(LADDERS)[:3]


def build(options: argparse.Namespace, device: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        intermediate_size=options.width * 8 // 3 // 64 * 64,
        num_hidden_layers=options.depth,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64,
        max_position_embeddings=options.length,
    )
    return LlamaForCausalLM(config).to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (options.batch, options.length), generator=generator)
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    models: dict[str, Any] = {
        "LoRA (q, v), rank 8, by PEFT": get_peft_model(build(options, device), lora),
        "full tuning": build(options, device),
    }
    peer = next(iter(models))
    ladders = {
        name: LadderModel(build(options, device), config)
        for name, config in LADDERS.items()
        if isinstance(config.layers, str) or max(config.layers) < options.depth
    }
    models |= ladders
    inputs: dict[str, Any] = {name: {"input_ids": ids, "labels": ids} for name in models}
    for name in (peer, "full tuning"):
        inputs[name]["use_cache"] = False
    with tempfile.TemporaryDirectory() as folder:
        for name in DISK:
            rows = [{"input_ids": row, "labels": row} for row in ids]
            cached = ladders[name].precompute(rows, Path(folder) / str(len(inputs)))
            inputs[f"{name}, cached states"] = DataLoader(cached, options.batch, collate_fn=PadRight())
            models[f"{name}, cached states"] = ladders[name]
        lines = measure(models, inputs, peer, options, device)
    table = "\n".join(lines) + "\n"
    print(table)
    if all(getattr(options, name) == parser.get_default(name) for name in vars(options)):
        Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


def measure(
    models: dict[str, Any], inputs: dict[str, Any], peer: str, options: argparse.Namespace, device: str
) -> list[str]:
    def step(name: str) -> float:
        start = time.perf_counter()
        batch = next(iter(inputs[name])) if isinstance(inputs[name], DataLoader) else inputs[name]
        batch = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in batch.items()}
        models[name](**batch).loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        models[name].zero_grad(set_to_none=True)
        return seconds

    kept = {}
    for name, model in models.items():
        model.train()
        with SavedForBackward(model) as counter:
            step(name)
        kept[name] = counter.peak
    times = [{name: step(name) for name in models} for _ in range(options.repeats)]
    tokens = options.batch * options.length
    lines = [
        "# One training step: ladders against LoRA and full tuning",
        "",
        f"Llama of {options.depth} layers, width {options.width}, vocabulary {VOCABULARY}, {options.batch} x "
        f"{options.length} = {tokens} tokens with a loss on each, float32, {device}, {torch.get_num_threads()} "
        f"threads; {options.repeats} interleaved steps. States are cached in bfloat16.",
        "",
        "| method | trained | step, s (median) | of LoRA's (median of pairs) | kept for backward, MiB | of LoRA's |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, model in models.items():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        ratio = statistics.median(row[name] / row[peer] for row in times)
        seconds = statistics.median(row[name] for row in times)
        lines.append(
            f"| {name} | {trained} | {seconds:.2f} | {ratio:.2f} | {kept[name] / 2**20:.1f} | "
            f"{kept[name] / kept[peer]:.2f} |"
        )
    return lines


if __name__ == "__main__":
    main()
