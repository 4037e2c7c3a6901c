"""``danlu tokenizer inspect`` and ``compare``: what a tokenizer is made of, and how it does beside others."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from danlu.cli.streams import check_writable, load_tokenizer, parse_size, progress_bar, wide_console

if TYPE_CHECKING:
    from rich.console import Console

    from danlu.tokens.bytepiece import BytePiece
    from danlu.tokens.facts import VocabularyFacts


def inspect_command(
    model: Annotated[Path, typer.Option("--model", "-m", help="Tokenizer file or folder.")],
    text: Annotated[str | None, typer.Argument(help="A text to segment; - is stdin.")] = None,
    alpha: Annotated[float, typer.Option(help="Inverse temperature of entropy and samples.")] = 0.2,
    samples: Annotated[int, typer.Option(help="Random segmentations shown.")] = 3,
    seed: Annotated[int | None, typer.Option(help="Of the samples.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a vocabulary is made of, or how it segments a text.

    Example: danlu tokenizer inspect -m tok.safetensors 'the weather of today'
    """
    if samples < 0:
        raise ValueError(f"--samples must be at least 0, got {samples}")
    if not (alpha >= 0 and math.isfinite(alpha)):
        raise ValueError(f"--alpha must be at least 0 and finite, got {alpha}")
    tokenizer = load_tokenizer(model)
    if text is None:
        from danlu.tokens.facts import vocabulary_facts

        facts = vocabulary_facts(tokenizer)
        typer.echo(json.dumps(asdict(facts), default=_text, ensure_ascii=False)) if json_output else _print_facts(facts)
        return
    if text == "-":
        text = sys.stdin.buffer.read().decode()
    if not text:
        raise ValueError("the text to segment is empty")
    view = _segmented(tokenizer, text, alpha, samples, seed)
    typer.echo(json.dumps(view, ensure_ascii=False)) if json_output else _print_text(view)


def compare_command(
    files: Annotated[list[str], typer.Argument(metavar="TEXT_FILES", help="UTF-8 text; - is stdin.")],
    tokenizers: Annotated[
        list[str] | None,
        typer.Option(
            "--tokenizers",
            "-t",
            help="Comma list, may be repeated: files of BytePiece, SentencePiece or tokenizers, folders, hub names, "
            "tiktoken:NAME. Default: the bundled danlu-nano's.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for comparison.json and comparison.png.")] = Path(
        "danlu-comparison"
    ),
    limit: Annotated[str, typer.Option(help="At most so much text, an equal share of each file.")] = "4MB",
    repeats: Annotated[int, typer.Option(help="Timed rounds; the median counts.")] = 5,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Compare tokenizers on your text: bytes per token, speed, and whether the text comes back.

    Example: danlu tokenizer compare book.txt --tokenizers tok.safetensors,spm.model,tokenizer.json,gpt2
    """
    from danlu.cli.inputs import read_texts
    from danlu.tokens.compare import compare_tokenizers
    from danlu.tokens.foreign import open_tokenizer

    size = parse_size(limit, "--limit")
    if not size:
        raise ValueError(f"--limit must be above 0, got {limit!r}")
    check_writable(out, folder_wanted=True)
    texts, notes = _within([read_texts([name]) for name in files], size)
    opened = [open_tokenizer(source) for source in _sources(tokenizers)] if tokenizers else [_bundled()]
    with progress_bar() as bar:
        comparison = compare_tokenizers(texts, opened, repeats=repeats, progress=bar)
    comparison = replace(comparison, notes=tuple(notes))
    paths = [comparison.save(out / f"comparison.{kind}") for kind in ("json", "png")]
    if json_output:
        typer.echo(comparison.to_json())
        return
    console = wide_console()
    console.print(comparison.table())
    for line in (*comparison.verdict(), *notes, f"Numbers: {paths[0]}, plot: {paths[1]}"):
        console.print(line, markup=False, soft_wrap=True)


def _sources(given: Sequence[str]) -> list[str]:
    """Names of tokenizers; a name with a comma in it is taken whole where it exists."""
    parts = [part.strip() for item in given for part in ([item] if Path(item).exists() else item.split(","))]
    if not all(parts):
        raise ValueError(f"--tokenizers has an empty name in {', '.join(given)!r}")
    return list(dict.fromkeys(parts))


def _bundled() -> Any:
    from danlu.assets import nano_path
    from danlu.tokens.foreign import open_tokenizer

    return open_tokenizer(nano_path(), "danlu-nano")


def _within(texts: Sequence[str], limit: int) -> tuple[list[str], list[str]]:
    """Of each text its equal share of the limit, cut after a line where there is one, and what to say about it."""
    share = max(1, limit // len(texts))
    cut, total = [], 0
    for text in texts:
        data = text.encode()
        total += len(data)
        part = data[:share].decode(errors="ignore")
        cut.append(part if len(data) <= share else part[: part.rfind("\n") + 1] or part)
    used = sum(len(text.encode()) for text in cut)
    return cut, [f"Used {used:,} of {total:,} bytes; --limit takes more."] if used < total else []


def _segmented(tokenizer: BytePiece, text: str, alpha: float, samples: int, seed: int | None) -> dict[str, Any]:
    from danlu.tokens.facts import readable

    def named(ids: Sequence[int]) -> list[str]:
        return [readable(tokenizer.decode_bytes([i])) for i in ids]

    ids = tokenizer.encode(text)
    law = tokenizer.segmentations(text, alpha)
    scores = tokenizer.vocabulary.scores
    drawn = law.sample(samples, seed=seed) if samples else []
    return {
        "bytes": tokenizer.to_array(text).size,
        "ids": ids,
        "pieces": named(ids),
        "scores": [float(scores[i - 3]) for i in ids],
        "alpha": alpha,
        "probability": math.exp(law.log_prob(ids)),
        "entropy": law.entropy,
        "samples": [{"ids": row, "pieces": named(row), "log_probability": law.log_prob(row)} for row in drawn],
    }


def _print_text(view: dict[str, Any]) -> None:
    from rich.table import Table

    console = wide_console()
    _print_pieces(console, view["pieces"])
    table = Table("piece", box=None, pad_edge=False)
    table.add_column("id", justify="right")
    table.add_column("score", justify="right")
    for piece, identifier, score in zip(view["pieces"], view["ids"], view["scores"], strict=True):
        table.add_row(_plain(piece), str(identifier), f"{score:.3f}")
    console.print(table)
    console.print(
        f"{view['bytes']:,} bytes, {len(view['ids']):,} tokens, {view['bytes'] / len(view['ids']):.3f} bytes per "
        f"token, score {sum(view['scores']):.3f}"
    )
    console.print(
        f"At alpha {view['alpha']:g}: this segmentation has probability {view['probability']:.3g}, entropy of all "
        f"{view['entropy']:.3f} nats" + (", draws:" if view["samples"] else "")
    )
    for sample in view["samples"]:
        _print_pieces(console, sample["pieces"], f"  p {math.exp(sample['log_probability']):.2g}")


def _print_pieces(console: Console, pieces: Sequence[str], behind: str = "") -> None:
    """Alternating colours on a terminal; brackets elsewhere."""
    from rich.text import Text

    if console.is_terminal:
        line = Text()
        for place, piece in enumerate(pieces):
            line.append(piece, style=("black on bright_cyan", "black on bright_yellow")[place % 2])
        line.append(behind)
        console.print(line)
    else:
        console.print("".join(f"[{piece}]" for piece in pieces) + behind, markup=False, soft_wrap=True)


def _print_facts(facts: VocabularyFacts) -> None:
    from rich.table import Table

    from danlu.tokens.facts import readable

    console = wide_console()
    of = max(1, facts.multi_byte)
    rows = {
        "ids": f"{facts.vocab_size:,}: 256 bytes, {facts.multi_byte:,} longer pieces, "
        f"special tokens {', '.join(facts.special_tokens)}",
        "normal form": "C (nfc)" if facts.normalization else "none, text is taken as it is",
        "scores": f"{facts.lowest_score:.3f} to {facts.highest_score:.3f}, from {facts.uses:,} uses in training",
        "mean length": f"{facts.bytes_per_use:.3f} bytes per use in training",
        "longer pieces": f"{facts.with_space / of:.1%} hold a space, {facts.with_line_feed / of:.1%} end in a line "
        f"feed, {facts.not_utf8:,} are no UTF-8 of their own",
        "longest": "  ".join(f"{readable(piece)} ({len(piece)})" for piece in facts.longest),
    }
    if facts.note:
        rows["note"] = facts.note
    for name, value in rows.items():
        console.print(f"{name:<14} {value}", markup=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    table.add_column("bytes", no_wrap=True)
    table.add_column("pieces", justify="right", no_wrap=True)
    table.add_column("of text", justify="right", no_wrap=True)
    table.add_column("most frequent")
    for item in facts.classes:
        low, high = item.shortest, item.longest
        examples = "  ".join(readable(piece) for piece in item.examples)
        table.add_row(
            str(low) if low == high else f"{low}-{high}", f"{item.pieces:,}", f"{item.share:.1%}", _plain(examples)
        )
    console.print()
    console.print(table)


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)


def _text(value: Any) -> Any:
    """Pieces as text in JSON; broken bytes as escapes."""
    from danlu.tokens.facts import readable

    return readable(value)
