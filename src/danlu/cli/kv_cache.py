"""``danlu kv-cache``: what a model's cache costs by length, and what a conversion would save."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from danlu.cli.streams import wide_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def kv_cache(
    model: Annotated[
        str,
        typer.Argument(
            help="Model folder, config.json or hub name; danlu-nano is the bundled one.", show_default=False
        ),
    ],
    lengths: Annotated[
        str, typer.Option(help="Tokens, or factors of the trained length such as 1x,4x,131072.")
    ] = "4096,32768,131072",
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="Of the cache, such as bfloat16 or float8_e4m3fn. Default: the model's.")
    ] = None,
    kv_rank: Annotated[
        list[int] | None, typer.Option(help="Size of a latent to compare, may be repeated. Default: a few.")
    ] = None,
    rope_dim: Annotated[int | None, typer.Option(help="Rotary channels beside the latent. Default: up to 64.")] = None,
    window: Annotated[int, typer.Option(help="Tokens of the windows to compare with.")] = 1024,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """What a model's key-value cache costs, and what conversions would save.

    Reads the configuration alone, no weights. Example: danlu kv-cache ./model --lengths 8192,131072 --batch 8
    """
    from danlu.cli.inputs import parse_lengths
    from danlu.tuning.kv_cache.report import kv_cache_report

    config = _config(model)
    trained = getattr(config.get_text_config(), "max_position_embeddings", None)
    if trained is None and "x" in lengths:
        raise ValueError(f"--lengths: {model} names no trained length, so factors mean nothing; pass tokens")
    report = kv_cache_report(
        config,
        parse_lengths(lengths, trained or 1),
        batch,
        dtype,
        kv_ranks=kv_rank or None,
        rope_dim=rope_dim,
        window=window,
    )
    if json_output:
        typer.echo(report.to_json())
    else:
        wide_console().print(report)


def _config(name: str) -> Any:
    """The configuration in a folder or a file, or of a hub name.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoConfig

    from danlu.assets import nano_path

    place = nano_path() if name == "danlu-nano" else Path(name)
    if place.exists() and not (place.is_file() or (place / "config.json").is_file()):
        raise ValueError(f"MODEL must be a folder with a config.json, such a file or a hub name, got {name}")
    if not place.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"MODEL {name} does not exist")
    try:
        return AutoConfig.from_pretrained(str(place))
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot read a configuration from {name}: {first}") from error
