"""``danlu train``: train or adapt a model as a recipe says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from danlu.cli.streams import progress_phases, wide_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A TOML file, such as recipes/nano.toml.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the run. Default: runs/ and the recipe's name.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="Change a key, such as training.steps=100; may be repeated."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
    sharded: Annotated[
        bool, typer.Option("--sharded", help="Shard the model over the processes of torchrun (FSDP2).")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Read the recipe, print it whole, and stop.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a table.")] = False,
) -> None:
    """Train or adapt a model as a recipe says, with the host library's Trainer.

    Writes checkpoints, curves, the trained model and a report page. Several processes: torchrun --nproc-per-node 2 -m
    danlu train RECIPE. Example: danlu train recipes/nano.toml --set training.steps=300
    """
    from danlu.training.recipe import load_recipe

    read = load_recipe(recipe, settings or ())
    if check:
        typer.echo(json.dumps(read.model_dump(mode="json", exclude_none=True), indent=1))
        return
    folder = Path("runs") / read.name if out is None else out
    main = int(os.environ.get("RANK", "0")) == 0

    from transformers.utils import logging as host_logging

    from danlu.training.run import run_recipe

    host_logging.set_verbosity_error()
    host_logging.disable_progress_bar()

    try:
        with progress_phases() as phase:
            report = run_recipe(read, folder, resume=resume, sharded=sharded, progress=phase)
    except KeyboardInterrupt:
        typer.echo(f"stopped; go on with: danlu train {recipe} --out {folder} --resume", err=True)
        raise typer.Exit(130) from None
    if not main:
        return
    if json_output:
        typer.echo(report.to_json(), nl=False)
        return
    wide_console().print(report.table())
    typer.echo(f"model: {folder / 'model'}\nreport: {folder / 'report.html'}")
