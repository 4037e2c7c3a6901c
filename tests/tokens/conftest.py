"""Vocabularies that tokenizer tests share."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path

import pytest

from danlu.tokens.bytepiece import BytePiece
from danlu.tokens.vocabulary import Vocabulary

WORDS = {
    b"the": 900, b" the": 4000, b" of": 2000, b"wat": 30, b"watch": 60, b"ching": 40, b"ing": 800, b"w": 300,
    b"atching": 25,
    b"th": 500, b"he": 700, b"in": 600, b"an": 500, b"\n": 900, b".\n": 300, b"\n\n": 100, b"  ": 200, b"    ": 400,
    "天".encode(): 50, "天气".encode(): 80, "é".encode(): 70, "né".encode(): 9, "中文".encode(): 30, b"\xe5\xa4": 4,
    b"\x80\x81": 3, b"aa": 90, b"aaa": 50, b"a": 300, b"ab": 60, b"abab": 20,
}  # fmt: skip


def vocabulary(words: dict[bytes, int] = WORDS) -> Vocabulary:
    return Vocabulary.sorted({**{bytes([i]): 2 for i in range(256)}, **words}.items())


@pytest.fixture(scope="session")
def tokenizer() -> BytePiece:
    """A hand-made tokenizer of some 280 pieces."""
    return BytePiece(vocabulary())


@pytest.fixture(scope="session")
def lattices() -> list[tuple[BytePiece, bytes]]:
    """Small vocabularies over two or three letters with text to segment, ambiguous and with ties."""
    rng = random.Random(3)
    made = []
    for _ in range(20):
        letters = rng.choice([b"ab", b"abc"])
        words = {bytes(rng.choices(letters, k=rng.randint(1, 5))): rng.choice([1, 2, 3, 8, 8, 50]) for _ in range(12)}
        made.append((BytePiece(vocabulary(words)), bytes(rng.choices(letters, k=rng.randint(6, 10)))))
    return made


@pytest.fixture(scope="session")
def published(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The published models, unpacked: name to file."""
    folder = tmp_path_factory.mktemp("published")
    for archive in shared_data.glob("bytepiece*.zip"):
        zipfile.ZipFile(archive).extractall(folder)
    return {path.name: path for path in sorted(folder.glob("*.model"))}
