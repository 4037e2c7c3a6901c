"""The ``danlu`` command: one module per subcommand, imported only when that subcommand is asked for."""

from __future__ import annotations

import importlib
import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from danlu.cli.errors import is_user_error, one_sentence

#: Subcommands and where their Typer applications live.
COMMANDS = {
    "ask": "danlu.cli.ask:app",
    "classify": "danlu.cli.classify:app",
    "extend": "danlu.cli.extend:app",
    "grow": "danlu.cli.grow:app",
    "kv-cache": "danlu.cli.kv_cache:app",
    "lab": "danlu.cli.lab:app",
    "papers": "danlu.cli.papers:app",
    "probe": "danlu.cli.probe:app",
    "sample": "danlu.cli.sample:app",
    "to-mla": "danlu.cli.to_mla:app",
    "tokenizer": "danlu.cli.tokenizer:app",
    "train": "danlu.cli.train:app",
}


class LazyGroup(TyperGroup):
    """Finds subcommands in ``COMMANDS`` and turns user errors of all of them into one sentence and exit code 2."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.commands = dict.fromkeys(COMMANDS)  # type: ignore[assignment]  # names now, commands when asked for

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import the subcommand; None when there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name].split(":")
        command = typer.main.get_command(getattr(importlib.import_module(module), name))
        command.name = cmd_name
        return command

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if ctx.params.get("debug") or os.environ.get("DANLU_DEBUG") or not is_user_error(error):
                raise
            typer.echo(f"danlu: {one_sentence(error)}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


def _version(wanted: bool) -> None:
    if wanted:
        import danlu

        typer.echo(f"danlu {danlu.__version__}")
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of user errors too.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Thrifty methods for language models: get more out of the model that you already have."""
