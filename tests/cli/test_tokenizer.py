"""``danlu tokenizer`` as its user meets it: exact round trips, tables, files, and one sentence for bad input."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from typer.testing import CliRunner

from danlu.cli import app
from danlu.tokens.bytepiece import BytePiece
from danlu.tokens.vocabulary import Vocabulary

WORDS = {b"the": 90, b" the": 400, b" of": 200, b"wea": 30, b"weather": 60, b"ther": 40, b"\n": 90, b".\n": 30}
WORDS |= {b"\n\n": 20, "é".encode(): 7, "天".encode(): 5, b"  ": 50, b"\xe5\xa4": 2}
TEXT = "the weather of the day.\n\n\n  the café\r\nweather\t天气\u2028 of\n \nthe end"


@pytest.fixture(scope="module")
def tokenizer():
    return BytePiece(Vocabulary.sorted({**{bytes([i]): 2 for i in range(256)}, **WORDS}.items()))


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    return tokenizer.save(tmp_path_factory.mktemp("tokenizer") / "tok.safetensors")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.fixture
def corpus(tmp_path):
    """A folder with text of few words, in two files of which one lies deeper."""
    rng = random.Random(1)
    folder = tmp_path / "corpus"
    for name in ("a.txt", "deep/b.txt"):
        words = rng.choices(["the", "weather", "of", "today", "is", "fine"], k=3000)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(word + rng.choice(["  ", " ", "\n"]) for word in words))
    return folder


def run(*words, **options):
    return CliRunner().invoke(app, ["tokenizer", *map(str, words)], env={"COLUMNS": "200"}, **options)


def good(*words, **options):
    result = run(*words, **options)
    assert result.exit_code == 0, result.output
    return result


def rows(result):
    return [[int(word) for word in line.split()] for line in result.stdout.split("\n")]


def test_a_line_of_ids_for_each_line_of_text(tokenizer, model, text):
    result = good("encode", "-m", model, text)
    assert rows(result) == [tokenizer.encode(line) for line in TEXT.split("\n")]
    assert rows(good("encode", "-m", model, input=TEXT)) == rows(result)


@pytest.mark.parametrize("content", [TEXT, TEXT + "\n", "", "\n", "\n\nx", "\r\n \n", "no line feed"])
@pytest.mark.parametrize("options", [(), ("--whole",), ("--alpha", 0.1), ("--whole", "--alpha", 0), ("--bos", "--eos")])
def test_decode_gives_back_what_encode_got(model, content, options):
    ids = good("encode", "-m", model, *options, input=content.encode()).stdout_bytes
    whole = [word for word in options if word == "--whole"]
    assert good("decode", "-m", model, *whole, input=ids).stdout_bytes == content.encode()


@pytest.mark.parametrize("options", [(), ("--whole",)])
def test_bytes_that_are_no_text_come_back_too(model, options):
    content = bytes(random.Random(0).choices(range(256), k=2000)) + "e\u0301".encode()
    ids = good("encode", "-m", model, "--bytes", *options, input=content).stdout_bytes
    assert good("decode", "-m", model, *options, input=ids).stdout_bytes == content


def test_text_comes_back_in_normal_form(model):
    content = "cafe\u0301 of\n"
    ids = good("encode", "-m", model, input=content.encode()).stdout_bytes
    decoded = good("decode", "-m", model, input=ids).stdout_bytes.decode()
    assert decoded == unicodedata.normalize("NFC", content) != content


def test_whole_ids_are_those_of_the_whole_text(tokenizer, model, text):
    result = good("encode", "-m", model, "--whole", "--eos", text, text)
    assert [i for row in rows(result) for i in row] == 2 * [*tokenizer.encode(TEXT), tokenizer.eos_id]


@pytest.mark.parametrize("name", ["ids.npy", "ids.bin"])
def test_binary_ids(tokenizer, model, text, tmp_path, name):
    result = good("encode", "-m", model, text, "--eos", "-o", tmp_path / name)
    ids = np.load(tmp_path / name) if name.endswith("npy") else np.fromfile(tmp_path / name, "<u2")
    assert ids.dtype == np.uint16 and ids.tolist() == [*tokenizer.encode(TEXT), tokenizer.eos_id]
    assert result.stdout == "" and f"{len(ids)} ids of uint16" in result.stderr
    assert good("decode", "-m", model, tmp_path / name).stdout_bytes == TEXT.encode()
    good("decode", "-m", model, tmp_path / name, "-o", tmp_path / "back.txt")
    assert (tmp_path / "back.txt").read_bytes() == TEXT.encode()


def test_draws_follow_the_seed_and_differ_from_line_to_line(model):
    def draw(seed, *options):
        lines = ("the weather of the day " * 4 + "\n") * 20
        return good("encode", "-m", model, "--alpha", 0, "--seed", seed, *options, input=lines).stdout.splitlines()

    assert draw(1) == draw(1, "--threads", 2)
    assert len({*draw(1), *draw(2)}) == 40, "each line and each seed has random numbers of its own"


def test_pieces_and_json(tokenizer, model):
    assert good("encode", "-m", model, "--pieces", input=" the weather").stdout == "▁the ▁ weather"
    record = json.loads(good("encode", "-m", model, "--json", "--eos", input=" of").stdout)
    assert record == {"ids": [*tokenizer.encode(" of"), 2], "pieces": ["▁of", "<eos>"]}


def test_inspect_a_vocabulary(tokenizer, model):
    printed = good("inspect", "-m", model).stdout
    for word in ("271: 256 bytes, 12 longer pieces", "<pad>, <bos>, <eos>", "weather (7)"):
        assert word in printed
    facts = json.loads(good("inspect", "-m", model, "--json").stdout)
    assert facts["vocab_size"] == tokenizer.vocab_size and facts["longest"][0] == "weather"


def test_inspect_a_text(tokenizer, model):
    words = ("inspect", "-m", model, "the weather", "--alpha", 0.5, "--seed", 3, "--samples", 2)
    printed = good(*words).stdout
    assert printed.startswith("[the][▁][weather]\n")
    view = json.loads(good(*words, "--json").stdout)
    law = tokenizer.segmentations("the weather", 0.5)
    assert math.isclose(view["probability"], math.exp(0.5 * sum(view["scores"]) - law.log_partition))
    assert math.isclose(view["entropy"], law.entropy)
    assert [row["ids"] for row in view["samples"]] == law.sample(2, seed=3)
    assert all("[" + "][".join(row["pieces"]) + "]" in printed for row in view["samples"])
    assert good("inspect", "-m", model, "-", input="the weather").stdout.startswith("[the][▁][weather]\n")


def test_compare(tokenizer, model, text, tmp_path):
    from danlu.assets import nano_path

    out = tmp_path / "out"
    result = good("compare", text, "-t", f"{model},{nano_path()}", "--repeats", 1, "-o", out)
    assert "tok.safetensors" in result.stdout and "nano" in result.stdout and result.stderr == ""
    data = json.loads((out / "comparison.json").read_text())
    ours = next(row for row in data["rows"] if row["kind"] == "BytePiece")
    assert data["bytes"] == len(TEXT.encode()) and ours["tokens"] == len(tokenizer.encode(TEXT)) and ours["lossless"]
    assert (out / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    printed = json.loads(good("compare", "-", "--repeats", 1, "-o", out, "--json", input=TEXT).stdout)
    assert [row["name"] for row in printed["rows"]] == ["danlu-nano"]


def test_compare_takes_an_equal_share_of_each_file(model, tmp_path):
    for name, line in (("a", "the day\n"), ("b", "weather\n")):
        (tmp_path / name).write_text(line * 100)
    words = ("-t", model, "--repeats", 1, "--limit", "0.1K", "-o", tmp_path)
    result = good("compare", tmp_path / "a", tmp_path / "b", *words)
    assert "Used 96 of 1,600 bytes; --limit takes more." in result.stdout


def test_train_several_sizes_on_a_folder(corpus, tmp_path):
    words = ("train", corpus, "-v", "270,300", "-o", tmp_path / "tok.safetensors", "--workers", 1)
    result = good(*words)
    sizes = [BytePiece.from_file(tmp_path / f"tok-{size}.safetensors").vocab_size for size in (270, 300)]
    assert 259 < sizes[0] <= 270 < sizes[1] <= 300
    assert f"{sizes[1]:,} ids" in result.stdout and "longest pieces:" in result.stdout


def test_train_on_standard_input_is_train_on_the_file(corpus, tmp_path):
    file = corpus / "a.txt"
    words = ("-v", 280, "--normalization", "none", "--memory", "64MB")
    record = json.loads(good("train", file, *words, "-o", tmp_path / "a.safetensors", "--json").stdout)
    good("train", "-", *words, "-o", tmp_path / "b.safetensors", input=file.read_bytes())
    first, second = [BytePiece.from_file(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    assert first == second and first.normalization is None
    tokens = len(first.encode(file.read_text()))
    assert record["bytes_per_token"] == pytest.approx(file.stat().st_size / tokens, rel=0.01)


def test_train_options_reach_the_trainer(corpus, tmp_path):
    text = (corpus / "a.txt").read_text().replace("weather", "2024")
    words = ("train", "-", "-v", 290)
    good(*words, "-o", tmp_path / "plain.model", input=text)
    good(*words, "-o", tmp_path / "tok.model", "--isolate-digits", "--max-piece-length", 4, input=text)
    for name, alone in (("plain.model", False), ("tok.model", True)):
        pieces = [piece for piece in BytePiece.from_file(tmp_path / name).vocabulary.pieces if len(piece) > 1]
        assert (max(map(len, pieces)) <= 4) == alone
        assert (not any(sum(byte in b"0123456789" for byte in piece) for piece in pieces)) == alone


def test_train_refined_takes_fewer_tokens(corpus, tmp_path):
    file = corpus / "a.txt"
    sizes = []
    for rounds in (0, 2):
        good("train", file, "-v", 290, "-o", tmp_path / f"{rounds}.model", "--refine", rounds)
        sizes.append(len(BytePiece.from_file(tmp_path / f"{rounds}.model").encode(file.read_text())))
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize(("form", "name"), [("bytepiece", "tok.model"), ("danlu", "copy.safetensors")])
def test_export_to_formats_of_bytepiece(tokenizer, model, tmp_path, form, name):
    result = good("export", "-m", model, "--to", form, tmp_path / name)
    assert str(tmp_path / name) in result.stdout
    assert BytePiece.from_file(tmp_path / name) == tokenizer


def test_export_to_tokenizers(tokenizer, model, tmp_path):
    from tokenizers import Tokenizer

    good("export", "-m", model, "--to", "tokenizers", tmp_path / "tokenizer.json")
    other = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert other.encode(TEXT, add_special_tokens=False).ids == tokenizer.encode(TEXT)


def test_export_to_transformers(tokenizer, model, tmp_path):
    good("export", "-m", model, "--to", "transformers", tmp_path / "host")
    assert BytePiece.from_file(tmp_path / "host") == tokenizer


def test_export_to_sentencepiece(tokenizer, model, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    result = good("export", "-m", model, "--to", "sentencepiece", tmp_path / "spm.model")
    assert "pieces that it cannot hold: 1" in result.stdout  # the two bytes of half a character
    assert sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model")).GetPieceSize() > 256


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("encode", "-m", "nowhere", "TEXT"), ("nowhere", "No such file")),
        (("encode", "-m", "TEXT", "TEXT"), ("text.txt is not a BytePiece tokenizer",)),
        (("encode", "-m", "MODEL", "nowhere.txt"), ("nowhere.txt", "No such file")),
        (("encode", "-m", "MODEL", "TEXT", "--alpha", "-1"), ("alpha must be at least 0", "-1")),
        (("encode", "-m", "MODEL", "TEXT", "--seed", "-1"), ("seed must be in 0..2**64 - 1",)),
        (("encode", "-m", "MODEL", "BROKEN"), ("line 2 of", "not UTF-8 (byte 0xff at offset 3)", "--bytes")),
        (("encode", "-m", "MODEL", "BROKEN", "-o", "OUT.npy"), ("not UTF-8 (byte 0xff at offset 5)",)),
        (("encode", "-m", "MODEL", "TEXT", "--pieces", "--json"), ("exclude each other",)),
        (("encode", "-m", "MODEL", "TEXT", "-o", "TEXT/x"), ("text.txt is a file",)),
        (("decode", "-m", "MODEL", "TEXT"), ("line 1 of", "must hold ids, got 'the'")),
        (("decode", "-m", "MODEL", "--whole", "TEXT"), ("must hold ids, got 'the'",)),
        (("decode", "-m", "MODEL", "LARGE"), ("line 2 of", "got 99999")),
        (("inspect", "-m", "MODEL", ""), ("text to segment is empty",)),
        (("inspect", "-m", "MODEL", "x", "--alpha", "nan"), ("--alpha must be at least 0 and finite",)),
        (("compare", "TEXT", "-t", "nowhere.model", "-o", "OUT"), ("nowhere.model", "no such tokenizer")),
        (("compare", "TEXT", "-t", "TEXT", "-o", "OUT"), ("text.txt is not a BytePiece tokenizer",)),
        (("compare", "BROKEN", "-o", "OUT"), ("not UTF-8",)),
        (("compare", "TEXT", "-t", "MODEL", "--repeats", "0", "-o", "OUT"), ("repeats must be at least 1, got 0",)),
        (("compare", "TEXT", "-t", "MODEL", "--limit", "much", "-o", "OUT"), ("--limit must be a number", "'much'")),
        (("train", "nowhere.txt", "-o", "OUT.model"), ("nowhere.txt", "No such file")),
        (("train", "TEXT", "-v", "100", "-o", "OUT.model"), ("vocab_size must be at least 259, got 100",)),
        (("train", "TEXT", "-v", "many", "-o", "OUT.model"), ("--vocab-size must be a whole number", "'many'")),
        (("train", "FOLDER", "-o", "OUT.model"), ("no file that matches --glob '**/*.txt'",)),
        (("train", "TEXT", "--memory", "4 elephants", "-o", "OUT.model"), ("--memory must be a number",)),
        (("train", "TEXT", "--normalization", "none", "-o", "OUT.model"), ("a .model always has normalization nfc",)),
        (("train", "TEXT", "--normalization", "nfkc", "-o", "OUT.model"), ("must be nfc or none, got 'nfkc'",)),
        (("train", "BROKEN", "-v", "259", "-o", "OUT.model"), ("not UTF-8: byte 0xff at offset 5",)),
        (("export", "-m", "MODEL", "--to", "word2vec", "OUT"), ("--to must be one of", "'word2vec'")),
        (("export", "-m", "MODEL", "--to", "bytepiece", "OUT.json"), ("end in .model",)),
    ],
)
def test_bad_input_is_one_sentence_and_begins_no_file(model, text, tmp_path, words, parts):
    (tmp_path / "broken.txt").write_bytes(b"x\nabc\xff\n")
    (tmp_path / "large.ids").write_text("5 6\n7 99999\n")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    names = {"MODEL": model, "TEXT": text, "BROKEN": tmp_path / "broken.txt", "LARGE": tmp_path / "large.ids"}
    names |= {"FOLDER": tmp_path / "folder", "TEXT/x": text / "x"}
    result = run(*(names.get(word, word.replace("OUT", str(tmp_path / "out"))) for word in words))
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("danlu: "), result.stderr
    for part in parts:
        assert part in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_ray_without_ray(text, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("train", text, "--ray", "auto", "-o", tmp_path / "out.model")
    assert result.exit_code == 2 and "--ray needs the package ray" in result.stderr


def test_a_reader_that_leaves_early_is_no_error(model, tmp_path):
    (tmp_path / "long.txt").write_text("the weather of the day\n" * 50_000)
    command = [sys.executable, "-c", "from danlu.cli import app; app()", "tokenizer", "encode", "-m", str(model)]
    with subprocess.Popen(
        [*command, str(tmp_path / "long.txt")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""


def test_help_has_an_example_for_every_command():
    for name in ("train", "encode", "decode", "inspect", "compare", "export"):
        assert f"Example: danlu tokenizer {name}" in good(name, "--help").stdout


def test_commands_import_nothing_heavy_before_they_run():
    code = "import danlu.cli.tokenizer, sys; print(*[m for m in ('numpy', 'torch', 'numba') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert loaded == []
