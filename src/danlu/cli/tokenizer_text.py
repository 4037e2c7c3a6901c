"""``danlu tokenizer encode`` and ``decode``: text to ids and back, in bounded memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from danlu.cli.streams import check_writable, load_tokenizer, progress_bar, reading, writing

if TYPE_CHECKING:
    from danlu.tokens.bytepiece import BytePiece

Model = Annotated[Path, typer.Option("--model", "-m", help="Tokenizer file or folder.")]


def encode(
    model: Model,
    files: Annotated[list[str] | None, typer.Argument(metavar="FILES", help="Text files; - is stdin.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File; .npy and .bin hold the ids of the whole text as numbers.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Draw segmentations at this inverse temperature instead of taking the best.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws.")] = None,
    pieces: Annotated[bool, typer.Option("--pieces", help="Print pieces for the eye instead of ids.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print an object with ids and pieces per line.")] = False,
    whole: Annotated[bool, typer.Option("--whole", help="Keep line feeds in the tokens: ids as in training.")] = False,
    bos: Annotated[bool, typer.Option("--bos", help="Put <bos> before each line; with --whole, each file.")] = False,
    eos: Annotated[bool, typer.Option("--eos", help="Put <eos> behind each line; with --whole, each file.")] = False,
    raw: Annotated[
        bool, typer.Option("--bytes", help="Take bytes as they are: no UTF-8 asked for, no normal form.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Of encoding by lines. Default: all cores.")] = None,
) -> None:
    """Encode text: one line of ids for each line of text.

    Example: danlu tokenizer encode -m tok.safetensors book.txt, and for training data:
    danlu tokenizer encode -m tok.safetensors book.txt --eos --out book.npy
    """
    from danlu.tokens.idfiles import SUFFIXES

    if pieces and json_output:
        raise ValueError("--pieces and --json exclude each other: --json prints both ids and pieces")
    if json_output and whole:
        raise ValueError("--json is by lines: leave out --whole")
    binary = out is not None and out.suffix in SUFFIXES
    if binary and (pieces or json_output):
        raise ValueError(f"--out {out} holds ids as numbers: leave out --pieces and --json")
    if out is not None:
        check_writable(out)
    tokenizer = load_tokenizer(model)
    settings: dict[str, Any] = {"raw": raw, "alpha": alpha, "seed": seed, "add_bos": bos, "add_eos": eos}
    with ExitStack() as stack:
        opened = [stack.enter_context(reading(name)) for name in files or ["-"]]
        if binary:
            assert out is not None
            _encode_binary(tokenizer, opened, out, settings)
            return
        sink = stack.enter_context(writing(out))
        if whole:
            lines = _whole_lines(tokenizer, opened, pieces, settings)
        else:
            lines = _text_lines(tokenizer, opened, pieces, json_output, {**settings, "threads": threads})
        for line in lines:
            sink.write(line)
        sink.flush()


def decode(
    model: Model,
    file: Annotated[str, typer.Argument(help="Ids, as text, .npy or .bin; - is stdin.")] = "-",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File instead of standard output.")] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="The ids hold the line feeds, as encode --whole wrote.")
    ] = False,
) -> None:
    """Decode ids: the exact inverse of encode; special tokens are left out.

    Example: danlu tokenizer decode -m tok.safetensors book.ids > book.txt
    """
    from danlu.tokens.idfiles import SUFFIXES, decode_ids, decode_lines, decode_whole, read_ids

    if out is not None:
        check_writable(out)
    tokenizer = load_tokenizer(model)
    with ExitStack() as stack:
        if Path(file).suffix in SUFFIXES:
            parts = decode_ids(tokenizer, read_ids(file, tokenizer.vocab_size))
        else:
            source, name = stack.enter_context(reading(file))
            parts = (decode_whole if whole else decode_lines)(tokenizer, source, name)
        sink = stack.enter_context(writing(out))
        for part in parts:
            sink.write(part)
        sink.flush()


def _encode_binary(
    tokenizer: BytePiece, opened: Sequence[tuple[BinaryIO, str]], out: Path, settings: dict[str, Any]
) -> None:
    from danlu.tokens.idfiles import id_type, write_ids

    with progress_bar() as bar:
        current, total = "", 0

        def announced() -> Iterator[tuple[BinaryIO, str]]:
            nonlocal current, total
            for file, name in opened:
                current, total = name, Path(name).stat().st_size if file is not sys.stdin.buffer else 0
                yield file, name

        count = write_ids(tokenizer, announced(), out, progress=lambda done: bar(done, total, current), **settings)
    typer.echo(f"{out}: {count:,} ids of {id_type(tokenizer.vocab_size).name}", err=True)


def _whole_lines(
    tokenizer: BytePiece, opened: Sequence[tuple[BinaryIO, str]], pieces: bool, settings: dict[str, Any]
) -> Iterator[bytes]:
    from danlu.tokens.idfiles import stream_ids

    for ids in stream_ids(tokenizer, opened, **settings):
        yield _written(tokenizer, ids.tolist(), pieces) + b"\n"


def _text_lines(
    tokenizer: BytePiece,
    opened: Sequence[tuple[BinaryIO, str]],
    pieces: bool,
    json_output: bool,
    settings: dict[str, Any],
) -> Iterator[bytes]:
    from danlu.tokens.facts import readable
    from danlu.tokens.idfiles import encode_lines, seeds_of

    for (file, name), seed in zip(opened, seeds_of(settings.pop("seed")), strict=False):
        for ids, ended in encode_lines(tokenizer, file, name, seed=seed, **settings):
            if json_output:
                named = [readable(tokenizer.decode_bytes([i], special_tokens=True)) for i in ids]
                yield json.dumps({"ids": ids, "pieces": named}, ensure_ascii=False).encode() + b"\n"
            else:
                yield _written(tokenizer, ids, pieces) + b"\n" * ended


def _written(tokenizer: BytePiece, ids: list[int], pieces: bool) -> bytes:
    if not pieces:
        return " ".join(map(str, ids)).encode()
    from danlu.tokens.facts import readable

    return " ".join(readable(tokenizer.decode_bytes([i], special_tokens=True)) for i in ids).encode()
