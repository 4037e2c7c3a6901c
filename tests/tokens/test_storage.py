import base64
import json

import numpy as np
import pytest

from danlu.tokens import storage
from danlu.tokens.bytepiece import BytePiece

from .conftest import vocabulary

SPECIAL = ("<pad>", "<bos>", "<eos>", "<|天|>")


@pytest.mark.parametrize("name", ["tok.safetensors", "tok", "tok.model"])
def test_save_load_save_is_identical(tokenizer, tmp_path, name):
    path = tokenizer.save(tmp_path / "new" / name)
    again = BytePiece.from_file(path)
    assert again == tokenizer
    assert again.encode("watching the 天气\n") == tokenizer.encode("watching the 天气\n")
    assert again.save(tmp_path / f"again-{name}").read_bytes() == path.read_bytes()
    assert [item.name for item in path.parent.iterdir()] == [name]


def test_options_are_kept_in_our_format_only(tmp_path):
    made = BytePiece(vocabulary(), special_tokens=SPECIAL, normalization=None)
    again = BytePiece.from_file(made.save(tmp_path / "bytepiece.safetensors"))
    assert again.special_tokens == SPECIAL and again.normalization is None
    assert BytePiece.from_file(tmp_path) == made  # a folder
    with pytest.raises(ValueError, match="the published format has no room for special tokens .* ends in .safetensors"):
        made.save(tmp_path / "tok.model")
    assert not (tmp_path / "tok.model").exists()


def test_published_format(tokenizer, tmp_path):
    entries = json.loads(tokenizer.save(tmp_path / "tok.model").read_text(encoding="utf-8"))
    assert list(entries)[0] == base64.b64encode(b"\0").decode()
    assert entries[base64.b64encode("天气".encode()).decode()][1:] == ["天气", 80]
    assert [entry[0] for entry in entries.values()] == list(range(3, 3 + len(entries)))


def test_published_files_are_written_as_they_were_read(published, tmp_path):
    for name, path in published.items():
        copy = BytePiece.from_file(path).save(tmp_path / name)
        assert json.loads(copy.read_text(encoding="utf-8")) == json.loads(path.read_text(encoding="utf-8"))


def _entries(**changes):
    entries = {
        base64.b64encode(piece).decode(): [i, piece.decode(errors="ignore"), 2]
        for i, piece in enumerate(vocabulary().pieces, 3)
    }
    return {**entries, **changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is neither a published BytePiece .model"),
        (b"\x0a\x0e\x0a\x05<unk>", "it is neither a published BytePiece .model"),
        (b"{", "damaged JSON"),
        (b"{}", "it has no pieces"),
        (b'{"version": "1.0", "model": {"type": "BPE"}}', "entry 'version' must"),
        (json.dumps(_entries())[:-100].encode(), "damaged JSON"),
        (json.dumps(_entries(**{"!!": [600, "", 2]})).encode(), "entry '!!' must be base64 of a piece"),
        (json.dumps(_entries(**{"YWJjZA==": [9999, "abcd", 2]})).encode(), "without gaps, got 9999 for b'abcd'"),
        (json.dumps(_entries(**{"YWJjZA==": [600, "abcd"]})).encode(), "must be base64 of a piece with"),
        (json.dumps(_entries(**{"AA==": [3, "", 0]})).encode(), r"counts must be at least 1, got 0 for piece b'\\x00'"),
        (json.dumps(_entries(**{"AA==": [3, "", 1.5]})).encode(), "must have whole numbers for id and count"),
        (b'{"YQ==": [3, "a", 1], "YQ==": [4, "a", 1]}', "pieces must be distinct, got b'a' twice"),
        (b'{"YQ==": [3, "a", 1]}', "all 256 single bytes, 255 are missing"),
        (b"\x10" + bytes(7) + b'{"a": "b"}      ', "damaged or foreign safetensors file"),
    ],
)
def test_foreign_and_damaged_files(tmp_path, content, message):
    path = tmp_path / "tok.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"tok.model is not a BytePiece tokenizer: .*{message}"):
        BytePiece.from_file(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays, header: header.update(version=99), "version must be at most 1, got 99: update danlu"),
        (lambda arrays, header: header.update(format="other"), "format must be 'danlu-bytepiece', got 'other'"),
        (lambda arrays, header: header.pop("normalization"), "damaged or foreign safetensors file"),
        (lambda arrays, header: arrays.update(lengths=arrays["lengths"][:-1]), "lengths must add up"),
        (lambda arrays, header: arrays.update(counts=arrays["counts"] * 0), "counts must be at least 1, got 0"),
        (lambda arrays, header: arrays.pop("pieces"), "damaged or foreign safetensors file"),
    ],
)
def test_damaged_files_of_our_format(tokenizer, tmp_path, change, message):
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    path = tokenizer.save(tmp_path / "tok.safetensors")
    arrays = load_file(path)
    with safe_open(path, "np") as file:
        header = json.loads(file.metadata()["danlu"])
    change(arrays, header)
    save_file(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, {"danlu": json.dumps(header)}
    )
    with pytest.raises(ValueError, match=message):
        BytePiece.from_file(path)


def test_a_truncated_file_and_a_missing_one(tokenizer, tmp_path):
    path = tokenizer.save(tmp_path / "tok.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged or foreign safetensors file"):
        BytePiece.from_file(path)
    with pytest.raises(FileNotFoundError):
        BytePiece.from_file(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="bytepiece.safetensors"):
        BytePiece.from_file(tmp_path)


def test_a_failed_save_leaves_the_old_file(tokenizer, tmp_path, monkeypatch):
    path = tokenizer.save(tmp_path / "tok.safetensors")
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        tokenizer.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    assert storage.load(path).vocabulary == tokenizer.vocabulary
