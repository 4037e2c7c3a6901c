"""What a command reads and writes: files or standard streams, tokenizers, a progress bar."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from rich.console import Console

    from danlu.tokens.bytepiece import BytePiece


def load_tokenizer(path: Path) -> BytePiece:
    """A BytePiece tokenizer from a file of either format or a folder.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: the file is damaged or of another kind.
    """
    from danlu.tokens.bytepiece import BytePiece

    return BytePiece.from_file(path)


def check_writable(path: Path, *, folder_wanted: bool = False) -> None:
    """Fail before the work, not after it, where a file, or a folder with files, cannot be written.

    Raises:
        ValueError: a file where a folder is needed, a folder where a file is, or no permission.
    """
    if path.is_dir() and not folder_wanted:
        raise ValueError(f"cannot write {path}: it is a folder")
    above = path.absolute().parents
    folder = next(place for place in ((path, *above) if folder_wanted else above) if place.exists())
    if not folder.is_dir():
        raise ValueError(f"cannot write {path}: {folder} is a file")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write {path}: no permission in {folder}")


def parse_size(text: str, option: str) -> int:
    """``4GB``, ``512M`` or ``1000000`` as bytes; units are powers of 1024.

    Raises:
        ValueError: not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), flags=re.IGNORECASE)
    if match is None:
        raise ValueError(f"{option} must be a number with an optional unit, such as 4GB or 512MB, got {text!r}")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


@contextmanager
def progress_phases() -> Iterator[Callable[[str], Callable[[int, int, str], None]]]:
    """A bar per phase on a terminal's standard error; nothing elsewhere.

    Yields what makes a phase, which is called with (done, total, what); total 0 is unknown.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def phase(name: str) -> Callable[[int, int, str], None]:
            task = bar.add_task(name, total=None)
            return lambda done, total, what: bar.update(task, completed=done, total=total or None, description=what)

        yield phase


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int, str], None]]:
    """A single phase of :func:`progress_phases`."""
    with progress_phases() as phase:
        yield phase("")


def wide_console() -> Console:
    """Standard output for tables. One cut to a narrow pipe would lose columns; only a terminal's width is a limit."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    return console


@contextmanager
def reading(name: str) -> Iterator[tuple[BinaryIO, str]]:
    """A file open for reading bytes, and its name; ``-`` is standard input."""
    if name == "-":
        yield sys.stdin.buffer, "standard input"
        return
    with Path(name).open("rb") as file:
        yield file, name


@contextmanager
def writing(out: Path | None) -> Iterator[BinaryIO]:
    """A file that is written whole or not at all; None is standard output."""
    if out is None:
        yield sys.stdout.buffer
        return
    from danlu.files import replacing

    with replacing(out) as temporary, temporary.open("wb") as file:
        yield file
