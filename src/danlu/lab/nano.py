"""The bundled model on unseen text, for the claims that need a language model: loss by context length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from danlu.context.evaluate import evaluate_lengths
from danlu.context.report import LengthReport
from danlu.lab.claim import Cell, Context, Plot, Table

#: Context lengths, in units of the trained length.
MULTIPLES = (1, 2, 4, 8, 16)
#: Places of the text that are scored.
WINDOWS = 6

_LOADED: dict[Path, tuple[Any, Any, Any]] = {}


def read(context: Context, stacks: dict[str, str], multiples: tuple[int, ...] = MULTIPLES) -> LengthReport:
    """Loss of the same target tokens, read with more and more context.

    Args:
        context: names the model (none: the bundled one) and the progress bar.
        stacks: label to the written form of a stack, such as ``rerope+logn``.
        multiples: context lengths over the trained length.

    Returns:
        The report; options left open in a stack are chosen for each length.
    """
    model, _, ids = _load(context)
    trained = model.config.max_position_embeddings
    total = len(stacks) * len(multiples) * WINDOWS
    steps = iter(context.track(range(total), description="reading", total=total))
    moved = 0

    def progress(done: int, planned: int, what: str) -> None:
        nonlocal moved
        while moved < done and next(steps, None) is not None:
            moved += 1

    report = evaluate_lengths(
        model, ids, [trained * multiple for multiple in multiples], stacks,
        windows=WINDOWS, decode_tokens=0, progress=progress,
    )  # fmt: skip
    for _ in steps:
        pass
    return report


def loss_table(
    report: LengthReport, title: str = "Loss, nats per token, of the same targets by context length"
) -> Table:
    """One row per stack, one column per length."""
    columns = ("method", *(f"{length} tokens" for length in report.lengths))
    rows: list[tuple[Cell, ...]] = [
        (stack, *(report.at(stack, length).loss for length in report.lengths)) for stack in report.stacks
    ]
    return Table("Loss, nats per token, of the same targets by context length", columns, tuple(rows))


def loss_plot(report: LengthReport, title: str) -> Plot:
    """Loss over length, one line per stack."""
    lines = {stack: tuple(report.at(stack, length).loss for length in report.lengths) for stack in report.stacks}
    lengths = tuple(float(length) for length in report.lengths)
    return Plot(title, "context length, tokens", "loss, nats per token", lengths, lines, log_x=True)


def setting(report: LengthReport) -> str:
    """A note on model, text and windows."""
    return (
        f"danlu-nano (trained at {report.trained_length} tokens) on standard-library modules it has never seen; "
        f"{report.windows} places, the last {report.targets} tokens of each scored; factors are chosen for each length."
    )


def _load(context: Context) -> tuple[Any, Any, Any]:
    """Model, tokenizer and held-out token ids, kept for the next claim of this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from danlu.assets import nano_path
    from danlu.context.text import held_out_text

    path = context.model or nano_path()
    if path not in _LOADED:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        ids = torch.tensor(tokenizer(held_out_text(), verbose=False)["input_ids"])
        _LOADED[path] = model, tokenizer, ids
    return _LOADED[path]
