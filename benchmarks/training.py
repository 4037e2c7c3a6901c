"""What a recipe costs over the host's bare Trainer: same model, same rows, same optimiser, blocks of steps in turn.

python benchmarks/training.py [--blocks 12] [--steps 20]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from danlu.training.build import build_model, build_optimizer, build_schedule
from danlu.training.data import Rows, tokenize
from danlu.training.metrics import Recorder
from danlu.training.recipe import parse_recipe
from danlu.training.run import _trainer

LENGTH, BATCH = 128, 8


class Bare(Dataset):
    """The least that a Trainer can be fed: rows cut from one tensor."""

    def __init__(self, ids: torch.Tensor, count: int):
        self.ids, self.count = ids, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.ids[index % len(self.ids)]
        return {"input_ids": row, "labels": row}


class Clock(TrainerCallback):
    """Mean seconds per step of every block of steps."""

    def __init__(self, block: int):
        self.block, self.times, self.started = block, [], 0.0

    def on_step_begin(self, args, state, control, **kwargs):  # noqa: D102
        if state.global_step % self.block == 0:
            self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):  # noqa: D102
        if state.global_step % self.block == 0:
            self.times.append((time.perf_counter() - self.started) / self.block)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    ours: list[float] = []
    bare: list[float] = []
    with tempfile.TemporaryDirectory() as place:
        for turn in range(options.blocks):
            first, second = ((run_recipe_block, ours), (run_bare_block, bare))[:: 1 if turn % 2 else -1]
            for run, times in (first, second):
                times.append(run(Path(place) / f"{turn}-{run.__name__}", options.steps))
    ratio = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
    table = "\n".join(
        [
            "# A recipe against the host's bare Trainer",
            "",
            f"danlu-nano (4 M parameters), batch {BATCH} x {LENGTH} tokens, AdamW, float32, "
            f"{torch.get_num_threads()} threads; {options.blocks} interleaved blocks of {options.steps} steps each, "
            "the first steps of a block left out; a point of the curves every 10 steps.",
            "",
            "| | ms per step (median) | ratio (median of pairs) |",
            "| --- | ---: | ---: |",
            f"| bare Trainer | {1e3 * statistics.median(bare):.1f} | 1 |",
            f"| danlu recipe | {1e3 * statistics.median(ours):.1f} | {ratio:.3f} |",
            "",
        ]
    )
    print(table)
    if options.blocks == parser.get_default("blocks"):
        Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


def run_recipe_block(out: Path, steps: int) -> float:
    recipe = _recipe(steps)
    model, tokenizer = build_model(recipe, out)
    ids = tokenize(recipe.data.train, tokenizer, out, limit=recipe.data.limit)
    rows = Rows(ids, tokenizer.eos_token_id, length=LENGTH, count=steps * BATCH, seed=0)
    trainer = _trainer(recipe, model, tokenizer, rows, None, out, BATCH, False)
    trainer.add_callback(Recorder(out / "metrics.jsonl", BATCH * LENGTH, None))
    return _timed(trainer)


def run_bare_block(out: Path, steps: int) -> float:
    recipe = _recipe(steps)
    model, tokenizer = build_model(recipe, out)
    ids = tokenize(recipe.data.train, tokenizer, out, limit=recipe.data.limit)
    table = torch.from_numpy(ids[: len(ids) // LENGTH * LENGTH].astype("int64")).view(-1, LENGTH)
    optimizer = build_optimizer(recipe, model)
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=BATCH, logging_steps=10, save_strategy="no",
        report_to=[], use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Bare(table, steps * BATCH),
        optimizers=(optimizer, build_schedule(recipe, optimizer)),
    )
    trainer.remove_callback(PrinterCallback)
    return _timed(trainer)


def _timed(trainer: Trainer) -> float:
    clock = Clock(5)
    trainer.add_callback(clock)
    trainer.train()
    return statistics.median(clock.times[1:])


def _recipe(steps: int):
    return parse_recipe(
        {
            "model": {"path": "danlu-nano"},
            "data": {"train": "python-stdlib", "length": LENGTH, "limit": 60, "held_out": 0},
            "optimizer": {"name": "adamw", "learning_rate": 1e-4},
            "training": {"steps": steps, "batch": BATCH, "log_every": 10, "save_every": 10000},
        }
    )


if __name__ == "__main__":
    main()
