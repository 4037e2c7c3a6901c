"""``danlu probe``: how concentrated a model's attention is, by layer and head, on a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from danlu.cli.streams import check_writable, progress_bar, wide_console

if TYPE_CHECKING:
    from torch import Tensor

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_LENGTH = 1024
DEFAULT_TEXT = "library modules of the running Python"


@app.command()
def probe(
    model: Annotated[
        str, typer.Argument(help="Model folder or hub name; danlu-nano is the bundled one.", show_default=False)
    ],
    text: Annotated[
        list[str] | None,
        typer.Option("--text", "-t", help="Text file, may be repeated; - is stdin. Default: library source."),
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", "-l", help=f"Tokens per text. Default: the model's, at most {_LENGTH}.")
    ] = None,
    texts: Annotated[int, typer.Option(help="Places of the text that are read, evenly spread.")] = 8,
    layers: Annotated[
        str | None, typer.Option(help="Layers to measure, such as 0,5,8-11. Default: all.", show_default=False)
    ] = None,
    sinks: Annotated[int, typer.Option(help="How many of the first tokens count as attention sinks.")] = 4,
    local: Annotated[int, typer.Option(help="Keys closer than this count as near.")] = 32,
    heads: Annotated[bool, typer.Option("--heads", help="A row per head instead of one per layer.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write a page (.html), a figure (.png) or .json.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Measure how concentrated attention is: effective tokens, entropy, sinks, distance, rank and scale.

    Runs the model on a text as it is, with any backend, and never holds an attention matrix.
    Example: danlu probe ./my-llama --text book.txt --length 4096 --out attention.html
    """
    from danlu.cli.inputs import read_texts

    if out is not None:
        check_writable(out)
        if out.suffix not in (".html", ".png", ".json"):
            raise ValueError(f"--out must end in .html, .png or .json, got {out}")
    for option, value, least in (("--texts", texts, 1), ("--length", length or _LENGTH, 2)):
        if value < least:
            raise ValueError(f"{option} must be at least {least}, got {value}")
    wanted = None if layers is None else parse_layers(layers)
    content = read_texts(text) if text else None

    import torch

    from danlu.context.probe.capture import AttentionProbe
    from danlu.context.probe.figures import write_probe
    from danlu.context.text import held_out_text
    from danlu.hosts.loading import load_language_model

    host, tokenizer = load_language_model(model, device=device, dtype=dtype)
    measuring = AttentionProbe(host, layers=wanted, sinks=sinks, local=local)
    rows, notes = _cut(tokenizer, host, held_out_text() if content is None else content, length, texts)
    with progress_bar() as progress, measuring, torch.no_grad():
        for done, ids in enumerate(rows):
            progress(done, len(rows), f"text {done + 1} of {len(rows)}")
            host(input_ids=ids[None].to(host.device))
    report = measuring.report(model=model, text=_names(text), notes=notes)
    written = None if out is None else write_probe(report, out)
    if json_output:
        typer.echo(report.to_json())
        return
    console = wide_console()
    console.print(report.table("head" if heads else "layer"))
    for line in (*report.verdict(), *(f"Note: {note}" for note in report.notes)):
        console.print(line, markup=False, soft_wrap=True)
    if written is not None:
        console.print(f"Written: {written}", markup=False, soft_wrap=True)


def parse_layers(text: str) -> list[int]:
    """``0,5,8-11`` as indices.

    Raises:
        ValueError: not of that form.
    """
    found: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdigit() or (dash and not high.isdigit()):
            raise ValueError(f"--layers must be indices and ranges such as 0,5,8-11, got {part.strip()!r}")
        found.extend(range(int(low), int(high if dash else low) + 1))
    return sorted(set(found))


def _names(text: Sequence[str] | None) -> str:
    if not text:
        return DEFAULT_TEXT
    return ", ".join("standard input" if item == "-" else Path(item).name for item in text)


def _cut(tokenizer: Any, host: Any, content: str, length: int | None, texts: int) -> tuple[list[Tensor], list[str]]:
    """Evenly spread pieces of a text, each framed by the tokens that the tokenizer puts around a text."""
    import torch

    plain = tokenizer("x", add_special_tokens=False)["input_ids"]
    framed = tokenizer("x")["input_ids"]
    place = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), 0)
    before, after = framed[:place], framed[place + len(plain) :]
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    most = getattr(host.config.get_text_config(), "max_position_embeddings", None)
    if getattr(host.config, "model_type", "") in ("roberta", "xlm-roberta", "camembert"):
        most = most and most - host.config.pad_token_id - 1  # its positions start behind the padding token
    wanted = min(most or _LENGTH, _LENGTH) if length is None else length
    inner = min(wanted - len(before) - len(after), len(ids))
    if inner < 1:
        raise ValueError(f"--length must leave room for a token beside {len(before) + len(after)} special ones")
    count = min(texts, len(ids) // inner)
    starts = [0] if count == 1 else [round(i * (len(ids) - inner) / (count - 1)) for i in range(count)]
    notes = [f"the text holds {count} pieces of {inner} tokens, not {texts}"] if count < texts else []
    if most is not None and wanted > most:
        notes.append(f"the model was trained on {most} tokens and reads {wanted} here")
    return [torch.tensor([*before, *ids[start : start + inner], *after]) for start in starts], notes
