"""Files of ids: equal to encoding at once whatever the size of the blocks, and read back as written."""

from __future__ import annotations

import io

import numpy as np
import pytest

from danlu.tokens import idfiles
from danlu.tokens.facts import longest_pieces, readable, vocabulary_facts

TEXT = "the watching of 天气 né\n\n\r\n  café\u2028x\nabab天"


@pytest.fixture(params=[1, 7, 1 << 20])
def block(request, monkeypatch):
    monkeypatch.setattr(idfiles, "_BLOCK", request.param)


def source(content):
    return io.BytesIO(content.encode() if isinstance(content, str) else content)


def test_blocks_change_nothing(tokenizer, block, tmp_path):
    whole = np.concatenate(list(idfiles.stream_ids(tokenizer, [(source(TEXT), "x")]))).tolist()
    assert whole == tokenizer.encode(TEXT)
    lines = list(idfiles.encode_lines(tokenizer, source(TEXT), "x"))
    assert [row for row, _ in lines] == [tokenizer.encode(line) for line in TEXT.split("\n")]
    assert [ended for _, ended in lines] == [True] * TEXT.count("\n") + [False]
    assert idfiles.write_ids(tokenizer, [(source(TEXT), "x")], tmp_path / "x.npy") == len(whole)
    assert b"".join(idfiles.decode_ids(tokenizer, np.load(tmp_path / "x.npy"))) == TEXT.encode()
    written = " ".join(map(str, whole))
    for layout in (written, written.replace(" ", "\n"), f"  {written}\n"):
        assert b"".join(idfiles.decode_whole(tokenizer, source(layout), "x")) == TEXT.encode()


def test_draws_do_not_depend_on_blocks(tokenizer, monkeypatch):
    def draw():
        rows = [row for row, _ in idfiles.encode_lines(tokenizer, source(TEXT * 9), "x", alpha=0.1, seed=4)]
        whole = idfiles.stream_ids(tokenizer, [(source(TEXT * 9), "x")] * 1, alpha=0.1, seed=4)
        return rows, np.concatenate(list(whole)).tolist()

    before = draw()
    monkeypatch.setattr(idfiles, "_BLOCK", 5)
    assert draw() == before


def test_places_of_broken_bytes(tokenizer, block):
    broken = "天气x".encode() + b"\xe5\xa4 y"
    with pytest.raises(ValueError, match=r"name is not UTF-8 \(byte 0xe5 at offset 7\)"):
        list(idfiles.text_parts(source(broken), "name"))
    with pytest.raises(ValueError, match=r"byte 0xe5 at offset 3"):
        list(idfiles.text_parts(source("天".encode() + b"\xe5\xa4"), "name"))
    assert b"".join(idfiles.text_parts(source(broken), "name", raw=True)) == broken  # type: ignore[arg-type]


def test_framing_and_progress(tokenizer, tmp_path):
    seen = []
    files = [(source("the"), "a"), (source(" of"), "b")]
    count = idfiles.write_ids(
        tokenizer, files, tmp_path / "x.bin", add_bos=True, add_eos=True, progress=lambda done: seen.append(done)
    )
    ids = idfiles.read_ids(tmp_path / "x.bin", tokenizer.vocab_size)
    assert ids.tolist() == [1, *tokenizer.encode("the"), 2, 1, *tokenizer.encode(" of"), 2] and count == ids.size
    assert seen == [3, 3]


def test_types():
    assert idfiles.id_type(65_536) == np.uint16 and idfiles.id_type(65_537) == np.uint32


@pytest.mark.parametrize("suffix", idfiles.SUFFIXES)
def test_empty(tokenizer, tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    assert idfiles.write_ids(tokenizer, [(source(""), "x")], path) == 0
    assert idfiles.read_ids(path, tokenizer.vocab_size).size == 0


def test_bad_files(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"must end in .npy or .bin, got x.txt"):
        idfiles.write_ids(tokenizer, [], tmp_path / "x.txt")
    (tmp_path / "x.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match="numbers of 2 bytes, got 3 bytes"):
        idfiles.read_ids(tmp_path / "x.bin", 300)
    np.save(tmp_path / "x.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"whole numbers in one dimension, got float64 of shape \(2, 2\)"):
        idfiles.read_ids(tmp_path / "x.npy", 300)
    (tmp_path / "y.npy").write_bytes(b"abc")
    with pytest.raises(ValueError, match="not an array that numpy reads"):
        idfiles.read_ids(tmp_path / "y.npy", 300)
    with pytest.raises(ValueError, match="ids must be in"):
        list(idfiles.decode_ids(tokenizer, np.array([9999])))
    with pytest.raises(ValueError, match="line 1 of x: ids must be in"):
        list(idfiles.decode_lines(tokenizer, source("9999"), "x"))


def test_facts(tokenizer):
    facts = vocabulary_facts(tokenizer, examples=3)
    pieces, counts = tokenizer.vocabulary.pieces, tokenizer.vocabulary.counts
    multi = [piece for piece in pieces if len(piece) > 1]
    assert facts.multi_byte == len(multi) == len(pieces) - 256
    assert facts.not_utf8 == 2 and facts.with_line_feed == 2
    assert facts.with_space == sum(b" " in piece for piece in multi)
    assert sum(item.pieces for item in facts.classes) == len(pieces)
    assert abs(sum(item.share for item in facts.classes) - 1) < 1e-12
    assert facts.longest == longest_pieces(tokenizer, 3) == (b"atching", "天气".encode(), "中文".encode())
    assert facts.uses == counts.sum() and facts.lowest_score == tokenizer.vocabulary.scores.min()
    assert facts.classes[0].shortest == facts.classes[0].longest == 1
    assert facts.classes[0].examples[0] == b"\n"


def test_readable():
    assert readable(b" a\n") == "▁a\\n"
    assert readable("天".encode()) == "天"
    assert readable(b"\xe5\xa4") == "\\xe5\\xa4"
    assert readable(b"\\n\t\x00") == "\\\\n\\t\\x00"
