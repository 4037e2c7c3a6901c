"""``danlu to-mla``: write a checkpoint with multi-head latent attention, converted from a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from danlu.cli.streams import check_writable, wide_console

if TYPE_CHECKING:
    from torch import Tensor

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def to_mla(
    model: Annotated[
        str, typer.Argument(help="Model folder or hub name; danlu-nano is the bundled one.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the converted model.", show_default=False)],
    kv_rank: Annotated[
        int | None, typer.Option(help="Numbers of the latent per token and layer; needed unless --method exact.")
    ] = None,
    rope_dim: Annotated[int | None, typer.Option(help="Channels that keep their rotation. Default: up to 64.")] = None,
    method: Annotated[str, typer.Option(help="pca (needs --text), weight-svd or exact.")] = "pca",
    text: Annotated[
        list[str] | None,
        typer.Option("--text", "-t", help="Calibration text, may be repeated; - is stdin.", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of it to read.")] = 32768,
    length: Annotated[int, typer.Option(help="Tokens per row.")] = 512,
    norm: Annotated[
        str, typer.Option(help="silent (exact, latent projections stay frozen) or calibrated (all weights train).")
    ] = "silent",
    freq_fold: Annotated[str, typer.Option(help="Neighbouring frequencies mixed as one: a number or auto.")] = "1",
    damping: Annotated[float, typer.Option(help="Share of the mean added to the diagonal of the statistics.")] = 0.01,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Convert a Llama, Mistral or Qwen2 to multi-head latent attention, a DeepSeek-V3 checkpoint of dense layers.

    Example: danlu to-mla ./model --kv-rank 448 --rope-dim 64 --text corpus.txt --out ./latent
    """
    from danlu.cli.inputs import read_texts

    check_writable(out, folder_wanted=True)
    if out.exists():
        raise ValueError(f"--out {out} exists: choose another folder")
    for name, value, least in (("--tokens", tokens, 2), ("--length", length, 2)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    fold: int | str = int(freq_fold) if freq_fold.isdigit() else freq_fold
    content = read_texts(text) if text else None
    if content is None and method == "pca":
        raise ValueError("--method pca needs --text: text of the kind that the model is used on")

    from danlu.files import replacing_folder
    from danlu.hosts.loading import load_causal_lm
    from danlu.tuning.latent.conversion import to_mla as convert

    host, tokenizer = load_causal_lm(model, device=device, dtype=dtype)
    result = convert(
        host,
        kv_rank,
        rope_dim,
        method=method,
        calibration=None if content is None else _rows(content, tokenizer, host, tokens, length),
        norm=norm,
        freq_fold=fold,
        damping=damping,
    )
    with replacing_folder(out) as folder:
        result.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if json_output:
        typer.echo(json.dumps({**json.loads(result.report.to_json()), "out": str(out)}, indent=1))
        return
    console = wide_console()
    console.print(result.report)
    console.print(f"Model: {out}", markup=False, soft_wrap=True)


def _rows(content: str, tokenizer: Any, model: Any, tokens: int, length: int) -> Tensor:
    """Token ids (n, length) from the start of a text."""
    import torch

    length = min(length, getattr(model.config, "max_position_embeddings", None) or length)
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    if len(ids) < 2:
        raise ValueError(f"--text must hold at least 2 tokens, got {len(ids)}")
    length = min(length, len(ids))
    count = len(ids) // length
    return torch.tensor(ids[: count * length]).view(count, length)
