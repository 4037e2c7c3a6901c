"""Comparing tokenizers: the counts are those of the text as given, what is lost is named, and nobody is favoured."""

from __future__ import annotations

import json
import math
import sys
from importlib.util import find_spec

import pytest

from danlu.assets import nano_path
from danlu.tokens import compare
from danlu.tokens.compare import Comparison, Row, compare_tokenizers, what_changed
from danlu.tokens.foreign import Candidate, open_tokenizer

TEXT = "the weather of 天气\n\n  watching é the\n"


def fake(name="fake", size=300, encode=lambda text: list(text.encode()), decode=lambda ids: bytes(ids).decode()):
    return Candidate(name, "test", size, encode, decode)


@pytest.mark.parametrize(
    ("text", "decoded", "changed"),
    [
        ("a b\n", "a b\n", ()),
        ("cafe\u0301", "café", ("normal form",)),
        ("a\nb\n", "a b ", ("line feeds", "spaces")),
        ("a\nb", "ab", ("line feeds",)),
        ("  a", "a", ("spaces",)),
        ("a\tb", "a b", ("tabs", "spaces")),
        ("a\r\nb", "a\nb", ("carriage returns",)),
        ("ﬁne", "fine", ("compatibility characters",)),
        ("a 天", "a ?", ("other characters",)),
        ("cafe\u0301\n", "café", ("line feeds", "normal form")),
        ("a\n b", "a \nb", ("places of white space",)),
        ("a b", " a b", ("spaces",)),
    ],
)
def test_what_changed(text, decoded, changed):
    assert what_changed(text, decoded) == changed


def test_numbers_of_a_row(tokenizer, monkeypatch):
    clock = iter([0.0, 1.0, 1.0, 1.5, 2.0, 6.0])  # rounds of 1, 0.5 and 4 seconds
    monkeypatch.setattr(compare.time, "perf_counter", lambda: next(clock))
    comparison = compare_tokenizers([TEXT, "the of"], [tokenizer], repeats=3)
    (row,) = comparison.rows
    size = len(TEXT.encode()) + 6
    assert (comparison.bytes, comparison.characters, comparison.lines) == (size, len(TEXT) + 6, 4)
    assert row.tokens == len(tokenizer.encode(TEXT)) + len(tokenizer.encode("the of"))
    assert math.isclose(row.bytes_per_token, size / row.tokens)
    assert math.isclose(row.megabytes_per_second, size / 1e6 / 1.0)
    assert row.vocab_size == tokenizer.vocab_size and row.changed == () and row.lossless


def test_a_tokenizer_that_drops_bytes_is_divided_by_the_same_bytes():
    loses = fake(encode=lambda text: list(text.replace(" ", "").encode()))
    (row,) = compare_tokenizers(["a b c"], [loses], repeats=1).rows
    assert (row.tokens, row.bytes_per_token, row.changed, row.lossless) == (3, 5 / 3, ("spaces",), False)


def test_turns_are_taken():
    calls = []

    def one(name):
        return fake(name, encode=lambda text: calls.append(name) or list(text.encode()))

    seen = []
    compare_tokenizers(["ab"], [one("a"), one("b")], repeats=2, progress=lambda *step: seen.append(step))
    assert calls == ["a", "b"] * 3
    assert [step[:2] for step in seen] == [(i, 6) for i in range(1, 7)]


def test_best_loses_nothing_and_rows_are_sorted():
    rows = [
        fake("one byte"),
        fake("lossy", encode=lambda text: [97], decode=lambda ids: "a"),
        fake("two bytes", encode=lambda text: list(range(len(text) // 2)), decode=lambda ids: "ab" * len(ids)),
    ]
    comparison = compare_tokenizers(["ab" * 50], rows, repeats=1)
    assert [row.name for row in comparison.rows] == ["lossy", "two bytes", "one byte"]
    assert comparison.best().name == "two bytes"
    said = " ".join(comparison.verdict())
    assert "lose nothing: two bytes, 2.000" in said and "change the text: lossy" in said and "sizes differ" not in said
    none = compare_tokenizers(["ab"], [rows[1]], repeats=1)
    assert none.best() is None and "No tokenizer gives the text back" in none.verdict()[0]
    equal = compare_tokenizers(["ab"], [fake("a"), fake("b")], repeats=1)
    assert "lose nothing: a, b, 1.000" in equal.verdict()[0]
    assert "sizes differ" in " ".join(compare_tokenizers(["a"], [fake(), fake(size=900)], repeats=1).verdict())


def test_normal_form_is_no_loss():
    row = Row("x", "y", 1, 1, 1.0, 1.0, ("normal form",))
    assert row.lossless and not Row("x", "y", 1, 1, 1.0, 1.0, ("normal form", "spaces")).lossless


def test_equal_names_are_told_apart(tokenizer, tmp_path):
    paths = [tokenizer.save(tmp_path / folder / "tok.safetensors") for folder in "ab"]
    assert {row.name for row in compare_tokenizers([TEXT], paths, repeats=1).rows} == {str(path) for path in paths}


def test_table_json_and_figure(tokenizer, tmp_path):
    lossy = fake("lossy", encode=lambda text: [1], decode=lambda ids: "")
    comparison = compare_tokenizers([TEXT], [tokenizer, lossy], repeats=1)
    cells = [list(column.cells) for column in comparison.table().columns]
    assert cells[0] == ["lossy", "BytePiece"] and cells[-1][1] == "yes" and "line feeds" in cells[-1][0]
    data = json.loads(comparison.save(tmp_path / "x.json").read_text())
    assert data["format"] == compare.FORMAT and [row["lossless"] for row in data["rows"]] == [False, True]
    left, right = comparison.figure().axes
    assert [bar.get_width() for bar in left.patches] == [row.bytes_per_token for row in comparison.rows[::-1]]
    assert [bar.get_width() for bar in right.patches] == [row.megabytes_per_second for row in comparison.rows[::-1]]
    assert [bar.get_hatch() for bar in left.patches] == [None, "///"]
    assert comparison.save(tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.png"]


@pytest.mark.parametrize("suffix", [".model", ".safetensors"])
def test_open_files_of_bytepiece(tokenizer, tmp_path, suffix):
    candidate = open_tokenizer(tokenizer.save(tmp_path / f"tok{suffix}"))
    assert (candidate.name, candidate.kind) == (f"tok{suffix}", "BytePiece")
    assert candidate.decode(candidate.encode(TEXT)) == TEXT


def test_open_a_folder_of_bytepiece(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "mine" / "bytepiece.safetensors")
    assert open_tokenizer(tmp_path / "mine").kind == "BytePiece"


def test_open_the_same_tokenizer_by_file_and_by_folder():
    folder = nano_path()
    by_file, by_folder = open_tokenizer(folder / "tokenizer.json"), open_tokenizer(folder)
    assert by_file.kind == "tokenizers BPE" and by_folder.kind.startswith("transformers")
    assert by_file.encode(TEXT) == by_folder.encode(TEXT)
    assert by_file.vocab_size == by_folder.vocab_size
    assert by_file.decode(by_file.encode(TEXT)) == by_folder.decode(by_folder.encode(TEXT)) == TEXT


def test_open_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text("the weather of the day and the watching of it\n" * 50)
    sentencepiece.SentencePieceTrainer.Train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "spm"), vocab_size=22, minloglevel=2
    )
    candidate = open_tokenizer(tmp_path / "spm.model")
    assert (candidate.kind, candidate.vocab_size) == ("SentencePiece", 22)
    (row,) = compare_tokenizers(["the weather\n of  it\n"], [candidate], repeats=1).rows
    assert set(row.changed) == {"line feeds", "spaces"}


@pytest.mark.parametrize(("package", "source"), [("sentencepiece", "spm.model"), ("tiktoken", "tiktoken:gpt2")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, source):
    (tmp_path / "spm.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"the package {package} is needed .* pip install {package}"):
        open_tokenizer(source if ":" in source else tmp_path / source)


def test_bad_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such tokenizer"):
        open_tokenizer("some/where/tok")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Nonsense"}}')
    with pytest.raises(ValueError, match="tokenizer.json is not a file that tokenizers reads"):
        open_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "damaged.json").write_text('{"model": ')
    with pytest.raises(ValueError, match="damaged.json is not a BytePiece tokenizer: damaged JSON"):
        open_tokenizer(tmp_path / "damaged.json")
    if find_spec("sentencepiece"):
        (tmp_path / "spm.model").write_bytes(b"\x0anonsense")
        with pytest.raises(ValueError, match="is not a SentencePiece model"):
            open_tokenizer(tmp_path / "spm.model")


def test_bad_arguments():
    with pytest.raises(TypeError, match="put it in a list"):
        compare_tokenizers("text", [fake()])
    with pytest.raises(ValueError, match="got 0 bytes and 1 tokenizers"):
        compare_tokenizers([""], [fake()])
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        compare_tokenizers(["a"], [fake()], repeats=0)
    with pytest.raises(ValueError, match="empty makes no token"):
        compare_tokenizers(["a"], [fake("empty", encode=lambda text: [])])


def test_notes_and_versions_are_kept():
    comparison = Comparison(1, 1, 1, 1, (), {"python": "3"}, ("cut",))
    assert json.loads(comparison.to_json())["notes"] == ["cut"]
