"""``danlu extend``: compare the methods that read past the training length, on a model and a text."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from danlu.cli.streams import progress_phases, wide_console

if TYPE_CHECKING:
    from danlu.context.report import LengthReport, NeedleScore

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

LENGTHS = "1x,2x,4x,8x,16x"
HELD_OUT = "library modules of the running Python that danlu-nano never saw"


@app.command()
def extend(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model folder or hub name. Default: the bundled danlu-nano.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", "-t", help="Text file, may be repeated; - is stdin. Default: held-out library source."),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", "-l", help=f"Tokens, or multiples of the trained length. Default: {LENGTHS}."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Comma list such as plain,yarn,rerope:window=64+logn. Default: the standard table."),
    ] = None,
    windows: Annotated[int, typer.Option(help="Places of the text that are scored.")] = 8,
    targets: Annotated[
        int | None, typer.Option(help="Scored tokens per window. Default: half the shortest length.")
    ] = None,
    trained_length: Annotated[
        int | None, typer.Option(help="Tokens the model was trained on. Default: its configuration's.")
    ] = None,
    needle: Annotated[bool, typer.Option("--needle/--no-needle", help="Also hide needles and ask for them.")] = True,
    trials: Annotated[int, typer.Option(help="Needle prompts per length, five needles each.")] = 4,
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.")] = 1,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the needles.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for report.html, report.json, report.png.")] = Path(
        "danlu-report"
    ),
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
    save_config: Annotated[
        Path | None, typer.Option(help="Folder for a config.json with the best method that runs without danlu.")
    ] = None,
) -> None:
    """Compare the methods that let a model read past its training length, without training.

    Prints the loss of the same tokens under growing context, needles found, speed and memory; names the best method and
    writes a report page. Example: danlu extend --model ./my-llama --text book.txt --lengths 1x,4x,16x
    """
    from danlu.cli.inputs import load_model, parse_lengths, read_texts, start_token

    content = read_texts(text) if text else None
    stacks = _stacks(methods)
    if save_config is not None and not any(_exportable(stack) for stack in stacks.values()):
        raise ValueError("--save-config needs a method that only changes frequencies in --methods, such as ntk-mixed")
    _check_out(out)
    name = "danlu-nano" if model is None else model
    host, tokenizer = load_model(_bundled() if model is None else model, device=device, dtype=dtype)

    from danlu.context.evaluate import evaluate_lengths, trained_length_of
    from danlu.context.needle import needle_scores, needle_tokens
    from danlu.context.text import held_out_text

    trained = trained_length_of(host, trained_length)
    wanted = parse_lengths(lengths or LENGTHS, trained)
    if content is None:
        content = held_out_text()
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    notes: list[str] = []
    if lengths is None:
        wanted = _that_fit(wanted, len(ids), notes)
    hiding = _that_hold(wanted, needle_tokens(tokenizer), notes) if needle else []
    shared: dict[str, Any] = {"trained_length": trained, "first_token": start_token(tokenizer)}
    with progress_phases() as phase:
        report = evaluate_lengths(
            host,
            ids,
            wanted,
            stacks,
            targets=targets,
            windows=windows,
            batch_size=batch_size,
            tokenizer=tokenizer,
            progress=phase("loss"),
            **shared,
        )
        needles: tuple[NeedleScore, ...] = ()
        if hiding:
            needles = needle_scores(
                host, ids, tokenizer, hiding, stacks, trials=trials, seed=seed, progress=phase("needles"), **shared
            )
    report = dataclasses.replace(
        report,
        model=name,
        needles=needles,
        text=", ".join("standard input" if item == "-" else Path(item).name for item in text) if text else HELD_OUT,
        notes=(*report.notes, *notes),
    )
    usage = usage_lines(report, None if model is None else model)
    if save_config is not None:
        notes.append(_save_config(report, stacks, host.config, trained, save_config))

    from danlu.context.page import write_report

    paths = write_report(report, out, usage=usage)
    if json_output:
        typer.echo(report.to_json())
    else:
        _print(report, usage, paths, notes)


def usage_lines(report: LengthReport, model: str | None) -> list[str]:
    """Three lines of Python that put the best method of a report on the model."""
    source = "danlu.nano_path()" if model is None else repr(model)
    best = report.at(report.best(), report.lengths[-1])
    lines = ["import danlu, transformers", f"model = transformers.AutoModelForCausalLM.from_pretrained({source})"]
    if not best.methods:
        return [*lines, "# nothing to extend: the model reads best as it is"]
    calls = re.sub(r"(?<![\w.])([A-Z]\w*\()", r"danlu.\1", best.methods)
    return [*lines, f"danlu.extend(model, {calls})"]


def _stacks(methods: str | None) -> Mapping[str, Any]:
    from danlu.context.stacks import default_stacks, parse_methods

    if methods is None:
        return default_stacks()
    names = [name.strip() for name in methods.split(",")]
    if len(set(names)) < len(names):
        raise ValueError(f"--methods names a method twice: {methods}")
    return {name: parse_methods(name) for name in names}


def _exportable(stack: Sequence[Any]) -> bool:
    from danlu.context.methods import FrequencyMethod

    return len(stack) == 1 and isinstance(stack[0], FrequencyMethod)


def _bundled() -> str:
    from danlu.assets import nano_path

    return str(nano_path())


def _check_out(folder: Path) -> None:
    """Fail before the work, not after it, where the report cannot be written."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"--out must be a folder, but {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"--out {folder} cannot be written")


def _that_fit(lengths: list[int], tokens: int, notes: list[str]) -> list[int]:
    """The default lengths that the text can fill, with a note of those that are left out."""
    from danlu.context.evaluate import DECODE_TOKENS

    fitting = [length for length in lengths if length + DECODE_TOKENS <= tokens]
    if fitting and len(fitting) < len(lengths):
        left = ", ".join(str(length) for length in lengths if length not in fitting)
        notes.append(f"left out lengths {left}: the text has only {tokens} tokens")
    return fitting or lengths[:1]


def _that_hold(lengths: list[int], needed: int, notes: list[str]) -> list[int]:
    """The lengths with room for needles, with a note of those without."""
    holding = [length for length in lengths if length >= needed]
    if len(holding) < len(lengths):
        left = ", ".join(str(length) for length in lengths if length not in holding)
        notes.append(f"no needles at {left}: they need at least {needed} tokens")
    return holding


def _save_config(report: LengthReport, stacks: Mapping[str, Any], config: Any, trained: int, folder: Path) -> str:
    """Write the host configuration of the best exportable method; returns the sentence that says so."""
    from danlu.context.stacks import resolve_stack
    from danlu.files import write_whole
    from danlu.positions.export import export_config

    longest = report.lengths[-1]
    label = min((name for name in stacks if _exportable(stacks[name])), key=lambda name: report.at(name, longest).loss)
    (method,) = resolve_stack(stacks[label], trained, longest)
    exported = export_config(
        config,
        method.rescaling,  # type: ignore[attr-defined]
        factor=method.factor,  # type: ignore[attr-defined]
        trained_length=trained,
        **method.options(),  # type: ignore[attr-defined]
    )
    path = write_whole(folder / "config.json", exported.to_json_string())
    return f"{label} for {longest} tokens as a configuration that needs no danlu: {path}"


def _print(report: LengthReport, usage: list[str], paths: Mapping[str, Path], notes: list[str]) -> None:
    console = wide_console()
    console.print(report.table())
    for line in report.verdict():
        console.print(line, markup=False)
    console.print("\nUse it:")
    for line in usage:
        console.print(f"    {line}", markup=False, soft_wrap=True)
    for note in notes:
        console.print(f"Note: {note}", markup=False, soft_wrap=True)
    console.print(f"\nReport: {paths['html']}, numbers: {paths['json']}", markup=False, soft_wrap=True)
