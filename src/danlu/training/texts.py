"""Documents of a recipe's source, one after another, whatever they are stored in."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

from danlu.context.text import docstrings, held_out_files, prose_files, training_files
from danlu.tokens.idfiles import text_parts
from danlu.training.tables import Source

#: Texts that need no file: source of the running Python, and documentation strings as English prose.
BUILT_IN = {
    "python-stdlib": lambda: _thirds(training_files()),
    "python-stdlib-held-out": held_out_files,
    "python-docstrings": lambda: prose_files()[0],
    "python-docstrings-held-out": lambda: prose_files()[1],
}
#: Files that hold one document per row instead of being one.
ROWS = (".jsonl", ".parquet", ".csv")


def documents(source: Source, limit: int | None = None, *, streaming: bool = False) -> Iterator[Iterable[str]]:
    """The documents of a source, in a fixed order, each as parts of bounded size that are to be joined.

    Args:
        source: files or a data set.
        limit: stop after so many.
        streaming: read a data set from its hub while it is used, instead of fetching it first.

    Raises:
        ValueError: no file matches, a row without the field, or a file that is not UTF-8.
    """
    return islice(_of_dataset(source, streaming) if source.dataset is not None else _of_files(source), limit)


def source_files(source: Source) -> list[Path]:
    """Files of a source, sorted within each of its entries.

    Raises:
        ValueError: an entry without a file.
    """
    found: list[Path] = []
    for name in source.files:
        if name in BUILT_IN:
            found += BUILT_IN[name]()
            continue
        path = Path(name)
        if path.is_dir():
            matched = sorted(file for file in path.glob(source.glob) if file.is_file())
            if not matched:
                raise ValueError(f"{name} must hold files that match {source.glob!r}, got none; set glob")
        else:
            matched = [path] if path.is_file() else sorted(Path(file) for file in glob.glob(name, recursive=True))
            if not matched:
                raise ValueError(f"data source {name} does not exist; give a file, a folder or a pattern")
        found += matched
    return found


def stamp(source: Source) -> list[Any]:
    """What changes when the source does: names, sizes and times of its files, or the name of its data set."""
    if source.dataset is not None:
        return [source.dataset, source.subset, source.split, source.field]
    return [[str(path), (status := path.stat()).st_size, status.st_mtime_ns] for path in source_files(source)] + [
        source.field
    ]


def _thirds(files: list[Path]) -> list[Path]:
    """Every third file first, so that a part of the corpus is not a part of the alphabet."""
    return [path for start in range(3) for path in files[start::3]]


def _of_files(source: Source) -> Iterator[Iterable[str]]:
    for name in source.files:
        for path in source_files(source.model_copy(update={"files": (name,)})):
            if name.startswith("python-docstrings"):
                yield [docstrings(path)]
            elif name in BUILT_IN:  # the library tests other encodings
                yield [path.read_text(encoding="utf-8", errors="replace")]
            elif path.suffix == ".jsonl":
                yield from _of_lines(path, source.field)
            elif path.suffix in ROWS:
                yield from _of_rows(path, source.field)
            else:
                with path.open("rb") as file:
                    yield cast(Iterator[str], text_parts(file, str(path)))


def _of_lines(path: Path, field: str) -> Iterator[Iterable[str]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text = row[field]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path} line {number} must be a JSON object with {field!r}: {error}") from error
            yield [_checked(text, f"{path} line {number}", field)]


def _of_rows(path: Path, field: str) -> Iterator[Iterable[str]]:
    import datasets

    kind = path.suffix.removeprefix(".")
    rows = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
    yield from _fields(rows, field, str(path))


def _of_dataset(source: Source, streaming: bool) -> Iterator[Iterable[str]]:
    import datasets

    try:
        rows = datasets.load_dataset(source.dataset, source.subset, split=source.split, streaming=streaming)
    except Exception as error:  # the hub's client raises many kinds, all of them about this name
        raise ValueError(f"cannot load data set {source.dataset!r}, split {source.split!r}: {error}") from error
    yield from _fields(rows, source.field, f"data set {source.dataset}")


def _fields(rows: Any, field: str, what: str) -> Iterator[Iterable[str]]:
    for number, row in enumerate(rows):
        if field not in row:
            raise ValueError(f"{what} must have a column {field!r}, got {', '.join(row)}; set field")
        yield [_checked(row[field], f"{what} row {number}", field)]


def _checked(text: Any, where: str, field: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{where}: {field!r} must be text, got {type(text).__name__}; set field")
    return text
