"""``danlu lab``: list the claims, run them, write the gallery."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Re-run the claims of the methods' sources: do they hold here?", no_args_is_help=True)

Out = Annotated[Path, typer.Option("--out", help="Folder for results, figures and trained toy weights.")]


@app.command("list")
def list_claims(out: Out = Path("build/lab")) -> None:
    """List all claims, with the verdict of those that have been run."""
    from rich.console import Console
    from rich.table import Table

    from danlu.lab import claims
    from danlu.lab.runner import load

    table = Table("claim", "what", "source", "seconds", "verdict")
    for name, claim in claims().items():
        record = load(name, out)
        table.add_row(name, claim.title, claim.source, f"{claim.budget:.0f}", record.verdict if record else "-")
    Console().print(table)


@app.command()
def run(
    names: Annotated[list[str] | None, typer.Argument(help="Claims to run; none is all of them.")] = None,
    out: Out = Path("build/lab"),
    force: Annotated[bool, typer.Option("--force", help="Run finished claims again.")] = False,
    seeds: Annotated[str | None, typer.Option(help="Seeds in place of each claim's own, such as 0,1,2.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Model folder for claims that read text; none is danlu-nano.")
    ] = None,
) -> None:
    """Run claims, write their records and figures, and renew the gallery; finished claims are skipped."""
    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    from danlu.lab import claims, find
    from danlu.lab.gallery import write_gallery
    from danlu.lab.runner import run as run_claim

    console = Console(soft_wrap=True)
    transformers_logging.disable_progress_bar()  # of loading weights; the lab has its own bars
    chosen = [find(name) for name in names] if names else list(claims().values())
    numbers = _seeds(seeds)
    if model is not None and not (model / "config.json").is_file():
        raise ValueError(f"model must be a folder with a config.json, got {model}")
    for claim in chosen:
        console.print(f"{claim.name}: {claim.title}", markup=False, highlight=False)
        with _tracker() as track:
            record = run_claim(claim, directory=out, seeds=numbers, model=model, force=force, track=track)
        console.print(f"  {record.verdict}: {record.evidence.summary}", markup=False, highlight=False)
    page = write_gallery(out)
    console.print(f"gallery: {page}", markup=False, highlight=False)


@app.command()
def report(out: Out = Path("build/lab")) -> None:
    """Write the gallery page and results.json from the finished claims."""
    from rich.console import Console

    from danlu.lab.gallery import write_gallery

    page = write_gallery(out)
    Console(soft_wrap=True).print(f"gallery: {page}", markup=False, highlight=False)


def _seeds(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"seeds must be whole numbers joined by commas, such as 0,1,2, got {text!r}")
    return tuple(int(part) for part in parts)


@contextlib.contextmanager
def _tracker() -> Iterator[Callable[..., Iterable[Any]]]:
    """A progress bar on a terminal; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        def track(items: Iterable[Any], description: str = "", total: int | None = None) -> Iterator[Any]:
            task = progress.add_task(description, total=total)
            for item in items:
                yield item
                progress.advance(task)
            progress.remove_task(task)

        yield track
