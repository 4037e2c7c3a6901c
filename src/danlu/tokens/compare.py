"""Several tokenizers on the same text: bytes per token, speed, and whether the text comes back."""

from __future__ import annotations

import json
import platform
import statistics
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danlu.files import replacing, write_whole
from danlu.tokens.bytepiece import BytePiece
from danlu.tokens.foreign import Candidate, open_tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

#: Version of the JSON.
FORMAT = 1
_NORMAL = "normal form"


@dataclass(frozen=True)
class Row:
    """What one tokenizer did.

    Args:
        name: of the tokenizer.
        kind: library, and model where that is known.
        vocab_size: number of ids, special tokens included.
        tokens: of all texts together.
        bytes_per_token: UTF-8 bytes of the texts as given, over tokens.
        megabytes_per_second: the same bytes over the median time to encode them, on one core.
        changed: what differs between the texts and their decoded tokens; empty when they come back whole.
    """

    name: str
    kind: str
    vocab_size: int
    tokens: int
    bytes_per_token: float
    megabytes_per_second: float
    changed: tuple[str, ...]

    @property
    def lossless(self) -> bool:
        """Whether the texts come back, in normal form C at least."""
        return set(self.changed) <= {_NORMAL}


@dataclass(frozen=True)
class Comparison:
    """Tokenizers on the same texts, best compression first."""

    bytes: int
    characters: int
    lines: int
    repeats: int
    rows: tuple[Row, ...]
    versions: dict[str, str]
    notes: tuple[str, ...] = ()

    def best(self) -> Row | None:
        """The tokenizer with most bytes per token among those that lose nothing; None when all lose something."""
        return next((row for row in self.rows if row.lossless), None)

    def table(self) -> Table:
        """The comparison as a ``rich`` table."""
        from rich.table import Table

        table = Table(title=f"{self.bytes:,} bytes, {self.characters:,} characters, {self.lines:,} lines")
        table.add_column("tokenizer", overflow="fold")
        table.add_column("kind", overflow="fold")
        for name in ("ids", "tokens", "bytes/token", "MB/s"):
            table.add_column(name, justify="right")
        table.add_column("text comes back")
        for row in self.rows:
            table.add_row(
                row.name,
                row.kind,
                f"{row.vocab_size:,}",
                f"{row.tokens:,}",
                f"{row.bytes_per_token:.3f}",
                f"{row.megabytes_per_second:.2f}",
                _comes_back(row),
                style="bold" if row == self.best() else None,
            )
        return table

    def verdict(self) -> list[str]:
        """The findings in sentences, with what makes the numbers unequal."""
        best = self.best()
        lines = []
        if best is None:
            lines.append("No tokenizer gives the text back: their compression counts what they threw away.")
        elif len(self.rows) > 1:
            first = ", ".join(row.name for row in self.rows if row.lossless and row.tokens == best.tokens)
            lines.append(f"Most bytes per token among those that lose nothing: {first}, {best.bytes_per_token:.3f}.")
        losing = [row.name for row in self.rows if not row.lossless]
        if losing and best is not None:
            lines.append(f"Not to be compared with it, as they change the text: {', '.join(losing)}.")
        sizes = [row.vocab_size for row in self.rows]
        if max(sizes) > 1.1 * min(sizes):
            lines.append("Vocabulary sizes differ: more ids give more bytes per token and a larger embedding.")
        return lines

    def figure(self) -> Figure:
        """Bytes per token and speed, one bar each; bars of tokenizers that change the text are hatched."""
        from matplotlib.figure import Figure

        rows = self.rows[::-1]  # the first row on top
        figure = Figure(figsize=(9.0, 1.3 + 0.42 * len(rows)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        panels = (
            (left, [row.bytes_per_token for row in rows], "bytes per token", "#0072B2", ".2f"),
            (right, [row.megabytes_per_second for row in rows], "MB/s on one core", "#E69F00", ".3g"),
        )
        for axes, values, label, colour, form in panels:
            bars = axes.barh(range(len(rows)), values, height=0.62, color=colour, edgecolor="white")
            for bar, row in zip(bars, rows, strict=True):
                if not row.lossless:
                    bar.set(hatch="///", alpha=0.45)
            axes.bar_label(bars, [f"{value:{form}}" for value in values], padding=3, fontsize=8)
            axes.set_xlabel(label)
            axes.margins(x=0.14)
            axes.spines[["top", "right"]].set_visible(False)
        left.set_yticks(range(len(rows)), [f"{_short(row.name)}\n{row.vocab_size:,} ids" for row in rows], fontsize=8)
        hatched = "; hatched: changes the text" if any(not row.lossless for row in rows) else ""
        figure.suptitle(f"The same {self.bytes:,} bytes{hatched}", fontsize=10)
        return figure

    def to_json(self) -> str:
        """The comparison as JSON text."""
        rows = [{**asdict(row), "lossless": row.lossless} for row in self.rows]
        return json.dumps({"format": FORMAT, **asdict(self), "rows": rows}, indent=1, ensure_ascii=False)

    def save(self, path: str | Path) -> Path:
        """Write the JSON, or the figure where the name ends in ``.png``, ``.svg`` or ``.pdf``; whole or not at all."""
        path = Path(path)
        if path.suffix not in (".png", ".svg", ".pdf"):
            return write_whole(path, self.to_json() + "\n")
        figure = self.figure()
        with replacing(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], dpi=150)
        return path


def compare_tokenizers(
    texts: Sequence[str],
    tokenizers: Sequence[str | Path | BytePiece | Candidate],
    *,
    repeats: int = 5,
    progress: Callable[[int, int, str], None] | None = None,
) -> Comparison:
    """Encode the same texts with several tokenizers.

    Every tokenizer gets each text whole, without special tokens, one text after another on one core. Bytes are those of
    the texts as given, so that a tokenizer which drops some gains nothing by it in the divisor, and the last column of
    the table says what it dropped. One round warms up and counts; then come ``repeats`` timed rounds in which the
    tokenizers take turns, and the median counts. Tokenizers that keep the words they have seen are timed with these.

    Args:
        texts: not empty.
        tokenizers: what :func:`danlu.tokens.foreign.open_tokenizer` opens.
        repeats: timed rounds, at least 1.
        progress: called with (done, total, what).

    Returns:
        One row per tokenizer, most bytes per token first.

    Raises:
        TypeError: ``texts`` is a single text.
        ValueError: no text or tokenizer, ``repeats`` below 1, or a tokenizer that gives no token.
        FileNotFoundError: a tokenizer that is not there.
    """
    if isinstance(texts, str | bytes):
        raise TypeError(f"texts must be a sequence of str, got one {type(texts).__name__}: put it in a list")
    size = sum(len(text.encode()) for text in texts)
    if not size or not tokenizers:
        raise ValueError(f"need text and tokenizers, got {size} bytes and {len(tokenizers)} tokenizers")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    opened = [item if isinstance(item, Candidate) else open_tokenizer(item) for item in tokenizers]
    opened = _with_distinct_names(opened, tokenizers)
    total, done = len(opened) * (repeats + 1), 0

    def step(what: str) -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total, what)

    counted = []
    for candidate in opened:
        counted.append(_count(candidate, texts))
        step(f"{candidate.name}: tokens")
    seconds: list[list[float]] = [[] for _ in opened]
    for _ in range(repeats):
        for candidate, taken in zip(opened, seconds, strict=True):
            begin = time.perf_counter()
            for text in texts:
                candidate.encode(text)
            taken.append(time.perf_counter() - begin)
            step(f"{candidate.name}: speed")
    rows = [
        Row(
            candidate.name,
            candidate.kind,
            candidate.vocab_size,
            tokens,
            size / tokens,
            size / 1e6 / statistics.median(taken),
            changed,
        )
        for candidate, (tokens, changed), taken in zip(opened, counted, seconds, strict=True)
    ]
    return Comparison(
        bytes=size,
        characters=sum(map(len, texts)),
        lines=sum(text.count("\n") + (not text.endswith("\n")) for text in texts if text),
        repeats=repeats,
        rows=tuple(sorted(rows, key=lambda row: -row.bytes_per_token)),
        versions=_versions(),
    )


def what_changed(text: str, decoded: str) -> tuple[str, ...]:
    """What differs between a text and what came back, in words; empty when nothing does."""
    if decoded == text:
        return ()
    composed = unicodedata.normalize("NFC", text)
    if decoded == composed:
        return (_NORMAL,)
    characters = {"line feeds": "\n", "carriage returns": "\r", "tabs": "\t", "spaces": " "}
    changed = [name for name, character in characters.items() if text.count(character) != decoded.count(character)]
    got = "".join(decoded.split())
    if got != "".join(text.split()):
        if got == "".join(composed.split()):
            changed.append(_NORMAL)
        elif got == "".join(unicodedata.normalize("NFKC", text).split()):
            changed.append("compatibility characters")
        else:
            changed.append("other characters")
    return tuple(changed) if set(changed) - {_NORMAL} else (*changed, "places of white space")


def _count(candidate: Candidate, texts: Sequence[str]) -> tuple[int, tuple[str, ...]]:
    tokens = 0
    changed: dict[str, None] = {}
    for text in texts:
        ids = list(candidate.encode(text))
        tokens += len(ids)
        changed |= dict.fromkeys(what_changed(text, candidate.decode(ids)))
    if not tokens:
        raise ValueError(f"{candidate.name} makes no token of the text: is it trained?")
    return tokens, tuple(changed)


def _with_distinct_names(opened: Sequence[Candidate], sources: Sequence[Any]) -> list[Candidate]:
    """The same candidates; those whose names are equal get their whole source as name."""
    names = [candidate.name for candidate in opened]
    longer = [
        str(source) if isinstance(source, str | Path) else name for source, name in zip(sources, names, strict=True)
    ]
    names = [long if names.count(name) > 1 else name for name, long in zip(names, longer, strict=True)]
    return [Candidate(name, c.kind, c.vocab_size, c.encode, c.decode) for c, name in zip(opened, names, strict=True)]


def _comes_back(row: Row) -> str:
    if not row.changed:
        return "yes"
    if row.lossless:
        return "yes, in normal form C"
    return f"no: changes {', '.join(row.changed)}"


def _short(name: str) -> str:
    return name if len(name) <= 32 else f"...{name[-29:]}"


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("danlu", "tokenizers", "transformers", "sentencepiece", "tiktoken"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
