"""``danlu grow``: write a larger checkpoint that computes what a small one computes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from danlu.cli.streams import check_writable, wide_console

if TYPE_CHECKING:
    from torch import Tensor

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

#: Beyond this error, relative to the largest logit, a growth in float32 that should be exact is not written.
LIMIT = 1e-4
_BATCH, _LENGTH = 4, 128


@app.command()
def grow(
    model: Annotated[
        str, typer.Argument(help="Model folder or hub name; danlu-nano is the bundled one.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the grown model.", show_default=False)],
    hidden_size: Annotated[int | None, typer.Option(help="Width of the residual stream.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Width of the feed-forward layers.")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key and value heads.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Channels per head.")] = None,
    layers: Annotated[int | None, typer.Option(help="Blocks.")] = None,
    placement: Annotated[
        str, typer.Option(help="Where new blocks go: even, end, or their places in the grown model such as 3,7.")
    ] = "even",
    widening: Annotated[
        str, typer.Option(help="How the hidden size grows: repeat, pad, or auto (repeat where the sizes divide).")
    ] = "auto",
    symmetry: Annotated[
        str, typer.Option(help="What sets copies apart: antisymmetric (exact), none, or independent (lossy).")
    ] = "antisymmetric",
    noise: Annotated[float, typer.Option(help="Size of that noise, relative to the weights.")] = 1.0,
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Write the model also where growth is not exact.")
    ] = False,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", "-t", help="Text file to compare on, may be repeated; - is stdin. Default: random."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the noise and of random tokens.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace --out.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Grow a model: more width, heads, feed-forward or blocks, and the same outputs.

    Compares the logits of both models before it writes anything. The result is an ordinary checkpoint in the type that
    was computed in (float32 on a CPU). Example: danlu grow ./small --hidden-size 1536 --heads 24 --out ./large
    """
    from danlu.cli.inputs import read_texts

    check_writable(out, folder_wanted=True)
    if out.exists() and any(out.iterdir()) and not force:
        raise ValueError(f"--out {out} is not empty: choose another folder, or pass --force to replace it")
    if out.is_dir() and Path(model).is_dir() and out.samefile(model):
        raise ValueError(f"--out must not be the model itself, got {out}")
    places = _places(placement)
    content = read_texts(text) if text else None

    import torch

    from danlu.files import replacing_folder
    from danlu.hosts.loading import load_language_model
    from danlu.tuning.growth.grow import grow as grow_model
    from danlu.tuning.growth.grow import verify_growth
    from danlu.tuning.growth.plan import read_growable
    from danlu.tuning.growth.sizes import sizes_of

    small, tokenizer = load_language_model(model, device=device, dtype=dtype)
    ids = _tokens(content, tokenizer, small, seed)
    grown = grow_model(
        small,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        num_hidden_layers=layers,
        symmetry=symmetry,
        noise=noise,
        placement=places,
        widening=widening,
        allow_lossy=allow_lossy,
        seed=seed,
    )
    check = verify_growth(small, grown, ids)
    if check.relative_error > LIMIT and small.dtype == torch.float32 and not allow_lossy:
        raise ValueError(
            f"the grown model is off by {check.relative_error:.1e} of the largest logit (limit {LIMIT:g}); nothing was "
            "written. Please report the model; --allow-lossy writes it all the same"
        )
    with replacing_folder(out) as folder:
        grown.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    sizes = [asdict(sizes_of(read_growable(one))) for one in (small, grown)]
    for size, one in zip(sizes, (small, grown), strict=True):
        size["parameters"] = sum(parameter.numel() for parameter in one.parameters())
    if json_output:
        result = {"before": sizes[0], "after": sizes[1], **asdict(check), "out": str(out)}
        typer.echo(json.dumps(result, indent=2))
    else:
        _print(sizes, check, "random tokens" if content is None else "the text", out)


def _places(placement: str) -> str | list[int]:
    """``even``, ``end``, or numbers with commas."""
    if not placement.replace(",", "").strip().replace(" ", "").isdigit():
        return placement
    return [int(part) for part in placement.split(",") if part.strip()]


def _tokens(content: str | None, tokenizer: Any, model: Any, seed: int) -> Tensor:
    """A batch of token ids that the model can read, random or from a text."""
    import torch

    length = min(_LENGTH, getattr(model.config, "max_position_embeddings", None) or _LENGTH)
    if content is None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(model.config.vocab_size, (_BATCH, length), generator=generator)
    else:
        read = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"][: _BATCH * length]
        rows = max(1, len(read) // length)
        ids = torch.tensor(read[: rows * length]).reshape(rows, -1)
    # Absolute positions of RoBERTa start behind the padding token, which no row of ours holds.
    if model.config.model_type == "roberta":
        padding = model.config.pad_token_id
        ids = ids[:, : length - 2].clone()
        ids[ids == padding] = (padding + 1) % model.config.vocab_size
    return ids.to(model.device)


def _print(sizes: list[dict[str, int]], check: Any, what: str, out: Path) -> None:
    from rich.table import Table

    table = Table("", "before", "after")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, before in sizes[0].items():
        table.add_row(name, f"{before:,}", f"{sizes[1][name]:,}")
    console = wide_console()
    console.print(table)
    console.print(
        f"Largest difference of logits {check.max_error:.1e} ({check.relative_error:.1e} of the largest), same first "
        f"choice at {check.agreement:.1%} of {check.positions} positions of {what}.",
        soft_wrap=True,
    )
    console.print(f"Model: {out}", markup=False, soft_wrap=True)
