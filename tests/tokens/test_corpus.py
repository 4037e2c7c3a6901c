"""Shards hold the text of the corpus, cut where nothing looks across."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danlu.tokens.corpus import Corpus, files, open_corpus

TEXT = st.text(st.sampled_from("ab\n\ne\u0301é각가\u0338中😀\r"), max_size=40)


def texts_of(corpus: Corpus) -> list[list[bytes]]:
    shards = [corpus.read(index) for index in range(len(corpus))]
    return [
        [shard.data[a:b].tobytes() for a, b in zip([0, *shard.ends[:-1]], shard.ends, strict=True)] for shard in shards
    ]


def joined(corpus: Corpus) -> bytes:
    return b"".join(text for shard in texts_of(corpus) for text in shard)


def opened(corpus, folder: Path, normalization: str | None = "nfc", shard_bytes: int = 1 << 20) -> Corpus:
    return open_corpus(corpus, normalization=normalization, shard_bytes=shard_bytes, folder=folder)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(TEXT, min_size=1, max_size=4), st.integers(1, 30), st.sampled_from(["nfc", None]))
def test_files_and_documents_give_the_normal_form_in_safe_blocks(tmp_path, documents, shard_bytes, normalization):
    if not any(documents):
        return
    paths = []
    for number, text in enumerate(documents):
        paths.append(tmp_path / f"{number}.txt")
        paths[-1].write_bytes(text.encode())
    whole = [unicodedata.normalize("NFC", text) if normalization else text for text in documents]
    from_files = opened(paths, tmp_path, normalization, shard_bytes)
    from_texts = opened(iter(documents), tmp_path, normalization, shard_bytes)
    for corpus in (from_files, from_texts):
        assert joined(corpus) == "".join(whole).encode()
        blocks = [text for shard in texts_of(corpus) for text in shard]
        for text in whole:  # the blocks of each document in turn
            rest = text.encode()
            while rest:
                block = blocks.pop(0)
                assert block and rest.startswith(block)
                rest = rest[len(block) :]
                if rest:
                    assert block.endswith(b"\n") and not rest.startswith(b"\n")
        assert not blocks
    lines = max(len(line.encode()) for text in documents for line in re.findall("[^\n]*\n*", text))
    assert max(shard.data.size for shard in map(from_texts.read, range(len(from_texts)))) <= shard_bytes + 3 * lines


def test_blocks_beyond_the_window(tmp_path):
    path = tmp_path / "long.txt"
    path.write_bytes(b"x" * 70000 + b"\n" * 70000 + b"y" * 70000 + b"\nz\n\nz")
    corpus = files([path], normalization="nfc", shard_bytes=10)
    assert [len(text) for shard in texts_of(corpus) for text in shard] == [140000, 70001, 4]


def test_an_iterator_is_read_once_and_a_shard_many_times(tmp_path):
    corpus = opened((f"document {number}\n" for number in range(100)), tmp_path, shard_bytes=300)
    assert len(corpus) > 3 and joined(corpus) == joined(corpus)
    assert corpus.size == len(joined(corpus))
    assert sum(len(shard) for shard in texts_of(corpus)) == 100


def test_data_is_writable_and_plain(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text")
    for corpus in (opened([path], tmp_path), opened(["text"], tmp_path)):
        shard = corpus.read(0)
        # One type of array, so that loops are compiled once.
        assert shard.data.flags.writeable and shard.data.dtype == np.uint8 and shard.ends.dtype == np.int64


def test_fingerprint_tells_texts_shards_and_bounds_apart(tmp_path):
    prints = [
        opened(documents, tmp_path, shard_bytes=size).fingerprint()
        for documents, size in [(["ab", "c"], 9), (["a", "bc"], 9), (["abc"], 9), (["abd"], 9), (["ab", "c"], 1)]
    ]
    assert len(set(prints)) == 5
    assert opened(["ab", "c"], tmp_path, shard_bytes=9).fingerprint() == prints[0]


@pytest.mark.parametrize(
    ("corpus", "error", "message"),
    [
        ("text", TypeError, "corpus must be an iterable of documents .* got one str: put it in a list"),
        (b"text", TypeError, "got one bytes"),
        (Path("a.txt"), TypeError, "got one PosixPath|got one WindowsPath"),
        (3, TypeError, "got int"),
        ([], ValueError, "got an empty iterable: an iterator may be used up"),
        (iter(()), ValueError, "got an empty iterable"),
        (["", ""], ValueError, "corpus must hold text, got no document with a character"),
        ([b"text"], TypeError, "got bytes as document 0: decode it first"),
        (["a", "b", None], TypeError, "got NoneType as document 2"),
        (["a", Path("b")], TypeError, "as document 1: pass str documents, or pathlib.Path"),
        (
            ["fine", "a\ud800b"],
            ValueError,
            r"document 1 must be encodable as UTF-8, got the lone surrogate '\\ud800' at character 1",
        ),
    ],
)
def test_wrong_corpora(corpus, error, message, tmp_path):
    with pytest.raises(error, match=message):
        opened(corpus, tmp_path)


def test_wrong_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.txt"):
        opened([tmp_path / "missing.txt"], tmp_path)
    path, empty = tmp_path / "latin.txt", tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(ValueError, match="corpus must hold text, got 1 files without a byte"):
        opened([empty], tmp_path)
    path.write_bytes(b"line\n" * 10 + "naïve".encode("latin-1"))
    for shard_bytes in (7, 1000):
        corpus = opened([empty, path], tmp_path, shard_bytes=shard_bytes)
        with pytest.raises(ValueError, match=r"latin.txt is not UTF-8: byte 0xef at offset 52 .*convert it to UTF-8"):
            joined(corpus)
    with pytest.raises(TypeError, match="corpus must not mix files and documents, got str after a path"):
        opened([path, "text"], tmp_path)
    with pytest.raises(ValueError, match="the first, .*latin.txt', names a file: pass pathlib.Path"):
        opened([str(path)], tmp_path)


def test_a_file_that_changes_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text")
    corpus = opened([path], tmp_path)
    path.write_text("other text")
    os.utime(path, (1, 1))
    with pytest.raises(ValueError, match="a.txt changed while it was read"):
        corpus.read(0)
