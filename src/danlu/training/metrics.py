"""What a run measures while it goes: one line of JSON per point of its curves, on the disk at once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from danlu.files import write_whole

Row = dict[str, float]
#: Log entries of the host that are measurements of ours, beside those of tasks.
_OWN = ("loss", "grad_norm", "learning_rate")
_TASK = ("_loss", "_weight", "_cosine")


class Recorder(TrainerCallback):
    """Writes the curves of a run to ``path`` as they grow, and cuts them to the checkpoint that a run resumes from.

    Args:
        path: a file of JSON lines.
        tokens_per_step: of all processes.
        progress: called with (steps done, steps, text).
        writes: whether this process is the one that writes.
    """

    def __init__(
        self, path: Path, tokens_per_step: int, progress: Callable[[int, int, str], None] | None, writes: bool = True
    ):
        self.path, self.tokens_per_step, self.progress, self.writes = path, tokens_per_step, progress, writes
        self._spent, self._steps, self._started, self._loss = 0.0, 0, 0.0, float("nan")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget points behind the step that is resumed from."""
        if self.writes:
            kept = [row for row in read_rows(self.path) if row["step"] <= state.global_step]
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock, which stands still during validation and saving."""
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self._spent += time.perf_counter() - self._started
        self._steps += 1
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps, f"step {state.global_step}, loss {self._loss:.3f}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write a point."""
        values = {
            _own_name(key): float(value)
            for key, value in (logs or {}).items()
            if key in _OWN or (key.endswith(_TASK) and key != "train_loss")
        }
        if not values:
            return
        row: Row = {"step": state.global_step, **values}
        if "loss" in values:
            self._loss = values["loss"]
            if self._spent:
                row["tokens_per_second"] = self._steps * self.tokens_per_step / self._spent
            row["tokens"] = state.global_step * self.tokens_per_step
            row["peak_bytes"] = peak_bytes()
            self._spent, self._steps = 0.0, 0
        if self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def _own_name(key: str) -> str:
    """``eval_loss`` is the validation loss, and so is ``eval_main_loss``; ``eval_code_loss`` is that of a task."""
    if not key.startswith("eval_"):
        return key
    task = key.removeprefix("eval_").removesuffix("loss").removeprefix("main_")
    return f"{task}validation_loss"


def read_rows(path: Path) -> list[Row]:
    """The points of a run by step; a last line that was cut off by a kill is left out."""
    rows: list[Row] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def peak_bytes() -> int:
    """Peak memory of this process so far: the GPU's allocator where there is one, else the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
