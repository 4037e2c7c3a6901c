"""``danlu tokenizer``: train byte-level tokenizers, encode and decode with them, look inside, compare, export."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from danlu.cli import tokenizer_text, tokenizer_views
from danlu.cli.streams import check_writable, load_tokenizer, parse_size, progress_bar

if TYPE_CHECKING:
    from danlu.tokens.bytepiece import BytePiece

app = typer.Typer(
    help="Train byte-level tokenizers, encode and decode with them, look inside, compare with others, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[Path, typer.Option("--model", "-m", help="Tokenizer file or folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
#: Endings that make --out of `train` a file; any other is a folder.
_FILES = (".safetensors", ".model")
_SAMPLE = 1 << 20
FORMATS = ("bytepiece", "danlu", "sentencepiece", "tokenizers", "transformers")


def train(
    files: Annotated[list[str], typer.Argument(metavar="FILES", help="Text files and folders; - is stdin.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="NAME.safetensors, NAME.model, or a folder for transformers.")
    ],
    vocab_size: Annotated[
        str, typer.Option("--vocab-size", "-v", help="Ids in all; several, such as 8000,32000, give one file each.")
    ] = "32000",
    glob: Annotated[str, typer.Option(help="Which files of a folder are read.")] = "**/*.txt",
    order: Annotated[int, typer.Option(help="Longest byte n-gram of the language model, 1 to 7.")] = 6,
    min_count: Annotated[int, typer.Option(help="What occurs less often is dropped; 32 for large corpora.")] = 2,
    max_piece_length: Annotated[int, typer.Option(help="Longest piece in bytes.")] = 36,
    isolate_digits: Annotated[bool, typer.Option("--isolate-digits", help="No piece holds two digits.")] = False,
    ensure_unicode: Annotated[
        bool, typer.Option("--ensure-unicode/--no-ensure-unicode", help="No piece begins within a character.")
    ] = True,
    normalization: Annotated[str, typer.Option(help="nfc or none.")] = "nfc",
    workers: Annotated[int | None, typer.Option(help="Threads. Default: all cores.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="For counts, such as 4GB; more goes to files. Default: half the machine's.")
    ] = None,
    work_dir: Annotated[Path | None, typer.Option(help="Keeps finished parts, to go on after an interruption.")] = None,
    refine: Annotated[
        int,
        typer.Option(help="Rounds of joining and dropping pieces afterwards: fewer tokens, more time; 4 are enough."),
    ] = 0,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster to work on, or auto.")] = None,
    json_output: Json = False,
) -> None:
    """Train a tokenizer on text files.

    Example: danlu tokenizer train book.txt src --glob '**/*.py' --vocab-size 16000 --out tok.safetensors
    """
    sizes = _sizes(vocab_size)
    form = _normalization(normalization)
    if out.suffix == ".model" and form is None:
        raise ValueError("--out: a .model always has normalization nfc: choose a name that ends in .safetensors")
    check_writable(out, folder_wanted=out.suffix not in _FILES)
    if ray is not None:
        _need_ray()
    budget = None if memory is None else parse_size(memory, "--memory")
    begin = time.perf_counter()
    with ExitStack() as stack:
        paths = stack.enter_context(_training_files(files, glob, work_dir))

        from danlu.tokens.bytepiece import BytePiece
        from danlu.tokens.trainer import BytePieceTrainer

        trainer = BytePieceTrainer(
            sizes,
            order=order,
            min_count=min_count,
            max_piece_length=max_piece_length,
            isolate_digits=isolate_digits,
            ensure_unicode=ensure_unicode,
            normalization=form,
            workers=workers,
            memory=budget,
            work_dir=work_dir,
            refine=refine,
            ray=ray,
            progress=stack.enter_context(progress_bar()),
        )
        vocabularies = trainer.train(paths)
        sample = _sample(paths)
    seconds = time.perf_counter() - begin
    reports = []
    for size, vocabulary in sorted(vocabularies.items()):
        tokenizer = BytePiece(vocabulary, normalization=form)
        place = out if len(sizes) == 1 else out.with_name(f"{out.stem}-{size}{out.suffix}")
        _save(tokenizer, place)
        reports.append(_trained(tokenizer, place, sample, seconds))
    if json_output:
        typer.echo(json.dumps(reports if len(sizes) > 1 else reports[0], ensure_ascii=False))
        return
    for report in reports:
        typer.echo(
            f"{report['out']}: {report['vocab_size']:,} ids, {report['bytes_per_token']:.3f} bytes per token on a "
            f"sample of the training text, {seconds:.1f} s"
        )
        typer.echo(f"  longest pieces: {'  '.join(report['longest'])}")


def export(
    model: Model,
    to: Annotated[str, typer.Option(help=f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File; for transformers a folder.")],
) -> None:
    """Write a tokenizer for another library.

    Example: danlu tokenizer export -m tok.safetensors --to tokenizers tokenizer.json
    """
    if to not in FORMATS:
        raise ValueError(f"--to must be one of {', '.join(FORMATS)}, got {to!r}")
    if to == "bytepiece" and out.suffix != ".model":
        raise ValueError(f"the published BytePiece format has names that end in .model, got {out.name}")
    if to == "danlu" and out.suffix != ".safetensors":
        raise ValueError(f"danlu's own format has names that end in .safetensors, got {out.name}")
    check_writable(out, folder_wanted=to == "transformers")
    tokenizer = load_tokenizer(model)
    left_out: dict[bytes, str] = {}
    if to in ("bytepiece", "danlu"):
        tokenizer.save(out)
    elif to == "transformers":
        tokenizer.to_transformers().save_pretrained(out)
    elif to == "sentencepiece":
        from danlu.tokens.export import to_sentencepiece

        left_out = to_sentencepiece(tokenizer, out)
    else:
        from danlu.files import write_whole
        from danlu.tokens.export import to_tokenizers

        write_whole(out, to_tokenizers(tokenizer).to_str(pretty=True))
    lacking = f"; pieces that it cannot hold: {len(left_out):,}" if left_out else ""
    typer.echo(f"{out}: {tokenizer.vocab_size:,} ids for {to}{lacking}")


def _sizes(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"--vocab-size must be a whole number, or several joined by commas, got {text!r}")
    return sorted({int(part) for part in parts})


def _normalization(name: str) -> str | None:
    if name not in ("nfc", "none"):
        raise ValueError(f"--normalization must be nfc or none, got {name!r}")
    return None if name == "none" else name


def _need_ray() -> None:
    from importlib.util import find_spec

    if find_spec("ray") is None:
        raise ValueError("--ray needs the package ray: pip install 'danlu[ray]', or leave out --ray")


@contextmanager
def _training_files(names: Sequence[str], glob: str, work_dir: Path | None) -> Iterator[list[Path]]:
    """The files behind names of files and folders; standard input is kept in a file as long as it is needed."""
    if names.count("-") > 1:
        raise ValueError("- stands for standard input, which can be read only once")
    if work_dir is not None:
        work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="danlu-", dir=work_dir) as folder:
        paths = []
        for name in names:
            if name == "-":
                path = Path(folder) / "standard input"
                with path.open("wb") as file:
                    while block := sys.stdin.buffer.read(_SAMPLE):
                        file.write(block)
                paths.append(path)
            elif Path(name).is_dir():
                found = sorted(path for path in Path(name).glob(glob) if path.is_file())
                if not found:
                    raise ValueError(f"folder {name} has no file that matches --glob {glob!r}")
                paths += found
            else:
                paths.append(Path(name))
        try:
            yield paths
        except ValueError as error:
            raise ValueError(str(error).replace(f"file {folder}/", "")) from error


def _sample(paths: Sequence[Path]) -> list[bytes]:
    """The beginnings of some files, about a megabyte in all, cut at line feeds."""
    chosen = paths[:: max(1, len(paths) // 16)][:16]
    parts = []
    for path in chosen:
        with path.open("rb") as file:
            part = file.read(_SAMPLE // len(chosen))
        parts.append(part[: part.rfind(b"\n") + 1] or part)
    return parts


def _trained(tokenizer: BytePiece, place: Path, sample: Sequence[bytes], seconds: float) -> dict[str, Any]:
    from danlu.tokens.facts import longest_pieces, readable

    tokens = sum(tokenizer.encode_array(part.decode(errors="ignore")).size for part in sample)
    return {
        "out": str(place),
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": sum(map(len, sample)) / max(1, tokens),
        "longest": [readable(piece) for piece in longest_pieces(tokenizer, 5)],
        "seconds": round(seconds, 3),
        "note": tokenizer.vocabulary.note,
    }


def _save(tokenizer: BytePiece, out: Path) -> None:
    if out.suffix in _FILES:
        tokenizer.save(out)
    else:
        tokenizer.to_transformers().save_pretrained(out)


app.command()(train)
app.command()(tokenizer_text.encode)
app.command()(tokenizer_text.decode)
app.command("inspect")(tokenizer_views.inspect_command)
app.command("compare")(tokenizer_views.compare_command)
app.command()(export)
