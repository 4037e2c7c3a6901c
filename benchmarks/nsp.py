"""Batches of next-sentence classification: against the bare model on sorted pairs, and a loop over labels.

The bare model gets the same pairs, tokenised and sorted before the clock starts. The loop is what the published code
does: for each label a pass over the texts in their order, tokenised in batches and padded to the longest of a batch.

    python benchmarks/nsp.py [--texts 24] [--labels 8] [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForNextSentencePrediction, BertTokenizer

from danlu.zero_shot import NSPClassifier

WORDS = [f"w{i}" for i in range(995)]
#: Words of a text: all alike, or, as in mixed sources, mostly short with some long.
LENGTHS = {"equal": (60,), "mixed": (8, 12, 16, 24, 32, 48, 96, 180)}
BATCH = 16


def build(device: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024
    )
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate([*special, *WORDS])})
    return BertForNextSentencePrediction(config).to(device).eval(), tokenizer


def sample(count: int, lengths: tuple[int, ...]) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(lengths), (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (lengths[n],), generator=generator)) for n in drawn]


@torch.no_grad()
def loop(model: Any, tokenizer: Any, texts: list[str], labels: list[str]) -> torch.Tensor:
    columns = []
    for label in labels:
        parts = []
        for start in range(0, len(texts), BATCH):
            block = texts[start : start + BATCH]
            inputs = tokenizer([label] * len(block), block, padding=True, truncation="only_second", return_tensors="pt")
            logits = model(**inputs.to(model.device)).logits
            parts.append(logits[:, 0] - logits[:, 1])
        columns.append(torch.cat(parts))
    return torch.stack(columns, 1).cpu()


def sorted_batches(tokenizer: Any, texts: list[str], labels: list[str], budget: int, device: str) -> list[Any]:
    pairs = sorted(((len(text.split()), label, text) for text in texts for label in labels), reverse=True)
    batches, start = [], 0
    while start < len(pairs):
        length = len(tokenizer(pairs[start][1], pairs[start][2])["input_ids"])
        block = pairs[start : start + max(1, budget // length)]
        inputs = tokenizer([one[1] for one in block], [one[2] for one in block], padding=True, return_tensors="pt")
        batches.append(inputs.to(device))
        start += len(block)
    return batches


@torch.no_grad()
def bare(model: Any, batches: list[Any]) -> None:
    for inputs in batches:
        model(**inputs).logits.cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--labels", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = build(device)
    classifier = NSPClassifier(model, tokenizer, progress=False)
    labels = [f"w{i} w{i + 1} w{i + 2}" for i in range(options.labels)]
    lines = [
        "# Next-sentence classification: batching",
        "",
        f"BERT of 4 layers, width 256; {options.texts} texts, {options.labels} labels, batches of "
        f"{classifier.scorer.batch_tokens} tokens ({BATCH} rows in the loop), float32, {device}, "
        f"{torch.get_num_threads()} threads; {options.repeats} interleaved runs. Targets: at least 0.9 of the bare "
        "model, at least 1.5 times the loop on mixed lengths.",
        "",
        "| texts | pairs/s, danlu | bare model, sorted and tokenised before | loop over labels | of the bare model "
        "(median of pairs) | times the loop |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, lengths in LENGTHS.items():
        texts = sample(options.texts, lengths)
        batches = sorted_batches(tokenizer, texts, labels, classifier.scorer.batch_tokens, device)
        calls = {
            "danlu": lambda texts=texts: classifier.scores(texts, labels),
            "bare": lambda batches=batches: bare(model, batches),
            "loop": lambda texts=texts: loop(model, tokenizer, texts, labels),
        }
        if not torch.allclose(calls["danlu"](), calls["loop"](), atol=1e-4):
            raise RuntimeError("danlu and the loop must give the same scores")
        calls["bare"]()
        times: dict[str, list[float]] = {kind: [] for kind in calls}
        for _ in range(options.repeats):
            for kind, call in calls.items():
                start = time.perf_counter()
                call()
                times[kind].append(time.perf_counter() - start)
        rate = {kind: len(texts) * len(labels) / statistics.median(values) for kind, values in times.items()}
        ratio = {
            kind: statistics.median(b / a for a, b in zip(times["danlu"], times[kind], strict=True)) for kind in times
        }
        lines.append(
            f"| {name} lengths | {rate['danlu']:.0f} | {rate['bare']:.0f} | {rate['loop']:.0f} | {ratio['bare']:.2f} | "
            f"{ratio['loop']:.2f} |"
        )
    table = "\n".join(lines) + "\n"
    print(table)
    if all(getattr(options, name) == parser.get_default(name) for name in vars(options)):
        Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
