"""Run a recipe from its tables to a trained model, a report, and everything needed to go on after a kill."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate

from danlu.files import replacing_folder, write_whole
from danlu.training.build import attach_loss, build_model, build_optimizer, build_schedule
from danlu.training.data import LiveRows, Order, Rows, Shuffled, end_token, tokenize
from danlu.training.recipe import differences
from danlu.training.report import TrainingReport
from danlu.training.tables import Data, Recipe, Source, Tiger

Progress = Callable[[int, int, str], None]


def run_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    sharded: bool = False,
    progress: Callable[[str], Progress] | None = None,
) -> TrainingReport:
    """Train as a recipe says.

    Args:
        recipe: what to do.
        out: folder of the run: ``recipe.json``, ``metrics.jsonl``, ``checkpoints``, at the end ``model``, and the
            report.
        resume: go on from the newest checkpoint in ``out``, or start when there is none yet.
        sharded: shard parameters, gradients and optimiser state over the processes (FSDP2) instead of copying them
            (DDP).
        progress: makes the progress callback of a phase from its name.

    Returns:
        The report of the whole run, also of what ran before a resumption.

    Raises:
        ValueError: a folder that holds another run, a corpus shorter than one batch, or what cannot be built.
        OSError: a checkpoint that cannot be saved; the one before stays whole.

    On a CPU two runs of one recipe give equal losses, and so does one that was killed and resumed.
    """
    from accelerate import PartialState

    started = time.monotonic()
    out = Path(out)
    processes = PartialState(cpu=not torch.cuda.is_available())
    if sharded and processes.num_processes < 2:
        raise ValueError("--sharded needs several processes: torchrun --nproc-per-node N -m danlu train ...")
    if sharded and (recipe.tasks or recipe.loss.name == "emo"):
        raise ValueError("tasks and the loss 'emo' need whole parameters and cannot be sharded: leave --sharded out")
    rows_per_process = _rows_per_process(recipe, processes.num_processes)
    phase = progress if progress is not None and processes.is_main_process else None
    with processes.main_process_first():
        if processes.is_main_process:
            _claim(out, recipe, resume)
        model, tokenizer = build_model(recipe, out)
        train, validation = _data(recipe, model, tokenizer, out, phase)

    from danlu.training.metrics import Recorder, read_rows
    from danlu.training.trainer import newest_checkpoint

    trainer = _trainer(recipe, model, tokenizer, train, validation, out, rows_per_process, sharded)
    rows = 1 + len(recipe.tasks)
    tokens = recipe.training.batch * recipe.data.length * rows
    trainer.add_callback(
        Recorder(out / "metrics.jsonl", tokens, phase("training") if phase else None, processes.is_main_process)
    )
    last = newest_checkpoint(out / "checkpoints") if resume else None
    trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
    measured = read_rows(out / "metrics.jsonl")
    if validation is not None and not any(
        row["step"] == recipe.training.steps and "validation_loss" in row for row in measured
    ):
        trainer.evaluate()
    _save(trainer, out, tokenizer, processes.is_main_process)
    report = TrainingReport.gather(recipe, out, trainer.model, time.monotonic() - started, processes.num_processes)
    if processes.is_main_process:
        report.write(out)
    processes.wait_for_everyone()
    return report


def _rows_per_process(recipe: Recipe, processes: int) -> int:
    parts = recipe.training.accumulation * processes
    if recipe.training.batch % parts:
        raise ValueError(
            f"training.batch must be a multiple of accumulation x processes = {parts}, got {recipe.training.batch}"
        )
    return recipe.training.batch // parts


def _claim(out: Path, recipe: Recipe, resume: bool) -> None:
    """Make the folder this run's own, or refuse."""
    kept = out / "recipe.json"
    if kept.is_file():
        if not resume:
            raise ValueError(f"--out {out} already holds a run: go on with --resume, or name another folder")
        if changed := differences(recipe, json.loads(kept.read_text(encoding="utf-8"))):
            raise ValueError(f"--resume: {out} holds the run of another recipe, which differs in {', '.join(changed)}")
    elif out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} must be a folder, got a file")
    write_whole(kept, json.dumps(recipe.fingerprint(), indent=1) + "\n")


def _data(recipe: Recipe, model: Any, tokenizer: Any, out: Path, phase: Callable[[str], Progress] | None) -> Any:
    """Rows to train on, and rows to validate on: one data set, or one by task."""
    data, training = recipe.data, recipe.training
    progress = phase("tokenizing") if phase is not None else None
    if data.streaming:
        live = LiveRows(
            data.train, tokenizer, length=data.length, packing=data.packing, seed=recipe.seed, limit=data.limit
        )
        held = data.validation and tokenize(data.validation, tokenizer, out / "data", progress=progress)
        return live, None if held is None else _validation(recipe, tokenizer, held)
    sources = {"main": (data.train, data.validation)} | {t.name: (t.train, t.validation) for t in recipe.tasks}
    train, validation = {}, {}
    for name, (source, own) in sources.items():
        ids, held = _split(data, source, own, tokenizer, out, progress)
        train[name] = _training(recipe, tokenizer, ids, "data.train" if name == "main" else f"train of task {name}")
        if held is not None:
            validation[name] = _validation(recipe, tokenizer, held)
    if recipe.tasks:
        return Together(train), validation or None
    rows: Any = train["main"]
    if recipe.model.ladder is not None and recipe.model.ladder.cache:
        rows.order, rows.count = Order(rows.rows_per_pass, None), rows.rows_per_pass
        features = model.precompute(
            rows, out / "features", batch_size=training.batch, progress=phase("features") if phase else None
        )
        rows = Shuffled(features, training.steps * training.batch, recipe.seed)
    return rows, validation.get("main")


def _split(
    data: Data, source: Source, validation: Source | None, tokenizer: Any, out: Path, progress: Progress | None
) -> tuple[Any, Any]:
    ids = tokenize(source, tokenizer, out / "data", limit=data.limit, progress=progress)
    if validation is not None:
        return ids, tokenize(validation, tokenizer, out / "data", limit=data.limit, progress=progress)
    held = int(len(ids) * data.held_out)
    return (ids[:-held], ids[-held:]) if held >= data.length else (ids, None)


def _training(recipe: Recipe, tokenizer: Any, ids: Any, name: str) -> Rows:
    data, training = recipe.data, recipe.training
    rows = Rows(
        ids,
        end_token(tokenizer),
        length=data.length,
        count=training.steps * training.batch,
        packing=data.packing,
        seed=recipe.seed,
        positions=data.positions,
        pad=_pad(tokenizer),
        name=name,
    )
    if rows.rows_per_pass < training.batch:
        raise ValueError(
            f"{name} must hold at least one batch of {training.batch} rows of {data.length} tokens, "
            f"got {rows.rows_per_pass} rows ({len(ids):,} tokens)"
        )
    return rows


def _validation(recipe: Recipe, tokenizer: Any, ids: Any) -> Rows:
    """Rows spread evenly over the text, always the same."""
    data = recipe.data
    rows = Rows(
        ids, end_token(tokenizer), length=data.length, packing=data.packing, pad=_pad(tokenizer), name="validation text"
    )
    rows.keep_evenly(recipe.training.evaluate_rows)
    return rows


def _pad(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_token(tokenizer)


class Together(Dataset):
    """Item i of several data sets at once, by name."""

    def __init__(self, parts: dict[str, Rows]):
        self.parts = parts

    def __len__(self) -> int:
        return min(len(part) for part in self.parts.values())

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: part[index] for name, part in self.parts.items()}


def _trainer(
    recipe: Recipe, model: Any, tokenizer: Any, train: Any, validation: Any, out: Path, rows: int, sharded: bool
) -> Any:
    from transformers import PrinterCallback, TrainingArguments

    from danlu.optim.folding import fold_in_trainer
    from danlu.training.trainer import RecipeTrainer, TaskTrainer

    training = recipe.training
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=training.steps,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=training.accumulation,
        max_grad_norm=training.max_grad_norm,
        bf16=training.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        torch_compile=training.compile,
        logging_steps=training.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="no" if validation is None else "steps",
        eval_steps=training.evaluate_every,
        prediction_loss_only=True,
        save_steps=training.save_every,
        save_total_limit=training.keep,
        report_to=[],
        seed=recipe.seed,
        dataloader_num_workers=training.workers,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
    )
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    attach_loss(recipe, model)
    kind: Any = TaskTrainer if recipe.tasks else RecipeTrainer
    if sharded:
        from danlu.training.sharding import ShardedTrainer, shard

        kind, model = ShardedTrainer, shard(model)
    optimizer = build_optimizer(recipe, model)
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=default_collate,
        processing_class=tokenizer,
        optimizers=(optimizer, build_schedule(recipe, optimizer)),
        **({"combine": {"method": recipe.multitask.method}} if recipe.tasks else {}),
    )
    trainer.remove_callback(PrinterCallback)
    if isinstance(recipe.optimizer, Tiger) and recipe.optimizer.fold:
        fold_in_trainer(trainer)
    return trainer


def _save(trainer: Any, out: Path, tokenizer: Any, writes: bool) -> None:
    """The trained model, whole or not at all."""
    # Every process takes part in saving, one of them writes.
    with replacing_folder(out / "model") if writes else contextlib.nullcontext(out) as part:
        trainer.save_model(str(part))
        if writes:
            (part / "training_args.bin").unlink(missing_ok=True)  # a pickle, and of no use here
            tokenizer.save_pretrained(part)
