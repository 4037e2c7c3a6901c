"""Many contexts: a combined step against a plain batched one, reading with a shared prefix, and memory.

The peer of a step is the host model on the same number of equally long rows, each of which takes its own best token.
The peer of reading is the host on whole rows in one batch. The model is random; its head is scaled so that a prediction
is about as peaked as a trained model's, and once left flat, the worst case for cutting rows to their nuclei.

    python benchmarks/naive_bayes.py [--contexts 12] [--repeats 15] [--memory 64x2048]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from danlu.assets import nano_path
from danlu.context.memory import PeakMemory, readable
from danlu.context.naive_bayes.caches import fork
from danlu.context.naive_bayes.combine import Settings, combine
from danlu.context.naive_bayes.contexts import NaiveBayesContexts

LENGTH, PREFIX, VOCABULARY = 256, 192, 32000
PEAKED = 14.0  # logits of standard deviation 6
QUESTION = list(range(100, 116))


def build(device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(device, dtype).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(PEAKED)
    return model


def seconds(call: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def step_times(model: LlamaForCausalLM, contexts: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of a combined step, of a plain one on as many rows, and of the combination alone."""
    device = model.device.type
    generator = torch.Generator().manual_seed(0)
    parts = torch.randint(VOCABULARY, (contexts, LENGTH), generator=generator).tolist()
    rows = NaiveBayesContexts(model).prepare(parts).rows
    logits, _ = rows.feed(torch.tensor(QUESTION, device=model.device))
    whole = torch.tensor([[*part, *QUESTION] for part in (parts[0], *parts)], device=model.device)
    cache = model(whole, use_cache=True, logits_to_keep=1).past_key_values
    token = torch.ones(1, dtype=torch.long, device=model.device)
    settings = Settings()

    def combined() -> None:
        found, _ = rows.fork().feed(token)
        int(combine(found, settings, 0).scores.argmax())

    def plain() -> None:
        output = model(token.expand(contexts + 1, 1), past_key_values=fork(cache), use_cache=True, logits_to_keep=1)
        output.logits[:, -1].float().argmax(-1).tolist()

    flat = logits / PEAKED
    runs = {
        "combined": combined,
        "plain": plain,
        "combination": lambda: int(combine(logits, settings, 0).scores.argmax()),
        "of flat rows": lambda: int(combine(flat, settings, 0).scores.argmax()),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, call in runs.items():
            took = seconds(call, device)
            if repeat:
                times[name].append(took)
    return times


def read_times(model: LlamaForCausalLM, contexts: int, repeats: int) -> dict[str, list[float]]:
    """Seconds to read all rows up to the first answer token, with a shared prefix read once and row by row."""
    device = model.device.type
    generator = torch.Generator().manual_seed(1)
    prefix = torch.randint(VOCABULARY, (PREFIX,), generator=generator).tolist()
    rest = LENGTH - PREFIX - len(QUESTION)
    parts = torch.randint(VOCABULARY, (contexts, rest), generator=generator).tolist()
    whole = torch.tensor([[*prefix, *part, *QUESTION] for part in (parts[0], *parts)], device=model.device)
    reader = NaiveBayesContexts(model, prefix=prefix)
    question = torch.tensor(QUESTION, device=model.device)
    times: dict[str, list[float]] = {"shared": [], "whole rows": []}
    for repeat in range(repeats + 1):
        shared = seconds(lambda: reader.prepare(parts).rows.feed(question), device)
        plain = seconds(lambda: model(whole, use_cache=True, logits_to_keep=1), device)
        if repeat:
            times["shared"].append(shared)
            times["whole rows"].append(plain)
    return times


def memory_of(contexts: int, length: int) -> tuple[int | None, int, float]:
    """Peak bytes of an answer on danlu-nano, bytes of its keys and values alone, and seconds."""
    model = AutoModelForCausalLM.from_pretrained(nano_path(), dtype=torch.float32).eval()
    config = model.config
    generator = torch.Generator().manual_seed(2)
    parts = torch.randint(1, config.vocab_size, (contexts, length), generator=generator).tolist()
    reader = NaiveBayesContexts(model, max_length=length + 64)  # past the trained length: only memory counts here
    start = time.perf_counter()
    with PeakMemory(torch.device("cpu")) as peak:
        reader.generate(parts, QUESTION, max_new_tokens=4)
    held = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4 * contexts * length
    return peak.bytes, held, time.perf_counter() - start


def ratio(first: list[float], second: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--memory", default="64x2048", help="contexts x tokens on danlu-nano, such as 16x1024")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    count, length = (int(part) for part in options.memory.split("x"))

    model = build(device, dtype)
    with torch.no_grad():
        steps = step_times(model, options.contexts, options.repeats)
        reads = read_times(model, options.contexts, max(3, options.repeats // 3))
    peak, held, took = memory_of(count, length)
    n = options.contexts
    bound = 1.15 * (1 - n * PREFIX / ((n + 1) * LENGTH))
    milliseconds = {name: 1e3 * statistics.median(times) for name, times in {**steps, **reads}.items()}
    lines = [
        "# Many contexts by naive Bayes",
        "",
        f"Llama of 4 layers, width 512, {VOCABULARY} tokens; {n} contexts of {LENGTH} tokens and the row without one; "
        f"{device}, {dtype}, {torch.get_num_threads()} threads; medians of {options.repeats} interleaved repeats.",
        "",
        "| what | ours, ms | peer, ms | ratio | bound |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| one token: all rows and their combination, against {n + 1} plain rows | {milliseconds['combined']:.1f} | "
        f"{milliseconds['plain']:.1f} | {ratio(steps['combined'], steps['plain']):.2f} | 1.10 |",
        f"| the combination alone, against that plain step | {milliseconds['combination']:.2f} | "
        f"{milliseconds['plain']:.1f} | {ratio(steps['combination'], steps['plain']):.3f} | 0.05 |",
        f"| the same of flat rows | {milliseconds['of flat rows']:.2f} | {milliseconds['plain']:.1f} | "
        f"{ratio(steps['of flat rows'], steps['plain']):.3f} | |",
        f"| reading rows of {LENGTH} tokens that share {PREFIX}, against whole rows | {milliseconds['shared']:.1f} | "
        f"{milliseconds['whole rows']:.1f} | {ratio(reads['shared'], reads['whole rows']):.2f} | {bound:.2f} |",
        "",
        f"Memory: {count} contexts of {length} tokens on danlu-nano (float32, CPU) take a peak of "
        f"{'an unknown amount' if peak is None else readable(peak)} above the model, of which their keys and values "
        f"are {readable(held)}; {took:.0f} seconds in all.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if vars(options) == vars(parser.parse_args([])):
        Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
