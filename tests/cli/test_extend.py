"""``danlu extend`` as its user meets it: a table, a report, and one sentence for every kind of bad input."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import danlu.context.memory
from danlu.cli import app
from danlu.cli.extend import usage_lines
from danlu.cli.inputs import parse_lengths, start_token
from danlu.context.report import LengthReport
from reference.tiny import byte_tokenizer, tiny_llama

TEXT = "".join(f"line {i} of a text that says little\n" for i in range(60))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def run(*words, **options):
    return CliRunner().invoke(app, ["extend", *map(str, words)], env={"COLUMNS": "200"}, **options)


def refused(result, *parts):
    """One sentence on stderr, exit code 2, nothing on stdout."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("danlu: "), result.stderr
    for part in parts:
        assert part in lines[0]


def test_table_report_and_usage(model, text, tmp_path):
    out = tmp_path / "out"
    methods = "plain,window,ntk-mixed,rerope:window=8+logn"
    result = run(
        "-m", model, "-t", text, "-l", "1x,4x,400", "--methods", methods, "--windows", 2, "--trials", 1, "-o", out
    )
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    for word in (
        *methods.split(","),
        "32",
        "128",
        "400",
        "needle@400",
        "prefill tok/s",
        "Best at 400 tokens",
        "Use it:",
    ):
        assert word in result.stdout
    assert "no needles at 32, 128" in result.stdout
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json", "report.png"]
    report = LengthReport.load(out / "report.json")
    assert report.lengths == (32, 128, 400) and report.stacks == tuple(methods.split(","))
    assert report.text == "text.txt" and report.model == str(model)
    assert {row.length for row in report.needles} == {400}
    assert report.bytes_per_token == 1


def test_printed_python_runs(model, text, tmp_path):
    words = ("-t", text, "-l", "64", "--methods", "rerope+logn", "--no-needle", "--windows", 1, "-o", tmp_path / "o")
    result = run("-m", model, *words)
    lines = [line.strip() for line in result.stdout.split("Use it:")[1].strip().splitlines()[:3]]
    assert lines[2] == "danlu.extend(model, danlu.ReRoPE(window=16), danlu.LogN(trained_length=32, clip=True))"
    space: dict = {}
    exec("\n".join(lines), space)
    ids = torch.arange(64)[None]
    with danlu.extended(tiny_llama(), "rerope+logn") as expected, torch.no_grad():
        assert torch.allclose(space["model"](input_ids=ids).logits, expected(input_ids=ids).logits, atol=1e-5)


def test_usage_without_a_method(model, text, tmp_path):
    run("-m", model, "-t", text, "-l", 64, "--methods", "plain", "--no-needle", "--windows", 1, "-o", tmp_path)
    report = LengthReport.load(tmp_path / "report.json")
    assert usage_lines(report, None)[2].startswith("# nothing to extend")
    assert usage_lines(report, None)[1].endswith("from_pretrained(danlu.nano_path())")


def test_json_and_standard_input(model, tmp_path):
    words = ("-m", model, "-t", "-", "-l", 64, "--methods", "plain", "--windows", 1, "-o", tmp_path, "--json")
    result = run(*words, input=TEXT)
    data = json.loads(result.stdout)
    assert data["text"] == "standard input" and data["lengths"] == [64] and data["needles"] == []


def test_default_lengths_are_cut_to_the_text(model, text, tmp_path):
    text.write_text(TEXT[:200])
    result = run("-m", model, "-t", text, "--methods", "plain", "--no-needle", "-o", tmp_path / "o")
    assert "left out lengths 256, 512: the text has only 200 tokens" in result.stdout
    assert LengthReport.load(tmp_path / "o" / "report.json").lengths == (32, 64, 128)


def test_save_config_runs_without_danlu(model, text, tmp_path):
    words = ("--methods", "plain,pi,rerope", "--no-needle", "--windows", 2, "-o", tmp_path / "o")
    result = run("-m", model, "-t", text, "-l", "1x,4x", *words, "--save-config", tmp_path / "c")
    assert result.exit_code == 0, result.stderr
    assert "pi for 128 tokens" in result.stdout
    host = AutoModelForCausalLM.from_pretrained(model, config=AutoConfig.from_pretrained(tmp_path / "c"))
    ids = torch.arange(128)[None]
    with danlu.extended(tiny_llama(), danlu.PositionInterpolation(factor=4)) as expected, torch.no_grad():
        assert torch.allclose(host(input_ids=ids).logits, expected(input_ids=ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--methods", "plain,reropee"], ["unknown method 'reropee'", "did you mean 'rerope'"]),
        (["--methods", "rerope:windwo=3"], ["did you mean 'window'"]),
        (["--methods", "rerope:window=0"], ["window", "got 0"]),
        (["--methods", "rerope:window=32"], ["window must be in 1..31", "got 32"]),
        (["--methods", "pi:factor=0.5"], ["factor", "0.5"]),
        (["--methods", "pi:factor=nan"], ["factor", "nan"]),
        (["--methods", "plain,plain"], ["twice"]),
        (["--lengths", "0.5x"], ["at least 1x, got 0.5x"]),
        (["--lengths", "nan"], ["such as 1x,2x,4096, got 'nan'"]),
        (["--lengths", "-4"], ["got '-4'"]),
        (["--lengths", "9000"], ["tokens, but length 9000 needs at least 9016"]),
        (["--windows", "0"], ["windows must be >= 1, got 0"]),
        (["--targets", "64"], ["targets must be in 1..31, got 64"]),
        (["--dtype", "int8"], ["--dtype must be auto, float32, bfloat16, float16, got 'int8'"]),
        (["--device", "toaster"], ["--device must be", "'toaster'"]),
        (["--trained-length", "0"], ["trained_length must be >= 2, got 0"]),
        (["--methods", "rerope", "--save-config", "x"], ["--save-config needs a method"]),
        (["--text", "missing.txt"], ["missing.txt"]),
        (["--model", "./missing"], ["./missing does not exist"]),
    ],
)
def test_bad_input(model, text, tmp_path, monkeypatch, words, parts):
    monkeypatch.chdir(tmp_path)
    base = ["-m", model, "-l", "1x,2x", "--methods", "plain", "--no-needle"]
    base += [] if "--text" in words else ["-t", text]
    before = sorted(tmp_path.rglob("*"))
    refused(run(*base, *words), *parts)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"\x89PNG\r\n\x1a\n", "byte 0x89 at offset 0"),
        (b"ab\0c", "zero byte at offset 2"),
    ],
)
def test_bad_texts(model, tmp_path, content, part):
    (tmp_path / "bad").write_bytes(content)
    refused(run("-m", model, "-t", tmp_path / "bad", "-o", tmp_path / "o"), part, "bad")
    assert not (tmp_path / "o").exists()


def test_truncated_checkpoint(model, text, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model.iterdir():
        content = path.read_bytes()
        (broken / path.name).write_bytes(content[: len(content) // 2] if path.suffix == ".safetensors" else content)
    refused(run("-m", broken, "-t", text, "-o", tmp_path / "o"), "truncated or damaged", str(broken))
    assert not (tmp_path / "o").exists()


def test_folder_without_a_model(text, tmp_path):
    refused(run("-m", tmp_path, "-t", text), "config.json")


def test_model_without_rotary_positions(text, tmp_path):
    folder = tmp_path / "gpt2"
    config = GPT2Config(vocab_size=257, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    refused(run("-m", folder, "-t", text, "-l", "1x", "--methods", "plain,rerope", "-o", tmp_path / "o"), "rotary")
    assert not (tmp_path / "o").exists()


def test_more_memory_than_there_is(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(danlu.context.memory, "available_bytes", lambda device: 10_000)
    refused(run("-m", model, "-t", text, "-l", "1x,8x", "-o", tmp_path / "o"), "length 256 needs about", "9.8 KiB")
    assert not (tmp_path / "o").exists()


def test_out_that_is_a_file(model, text, tmp_path):
    refused(run("-m", model, "-t", text, "-o", text), "--out must be a folder")


def test_debug_shows_the_traceback(model, text):
    result = CliRunner().invoke(app, ["--debug", "extend", "-m", str(model), "-t", str(text), "--lengths", "0.5x"])
    assert isinstance(result.exception, ValueError)


def test_unknown_command_names_the_nearest():
    result = CliRunner().invoke(app, ["extent"])
    assert result.exit_code == 2 and "'extend'" in result.output


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from danlu.cli import app; app(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numba'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"}
    )
    assert done.returncode == 0, done.stderr
    assert "extend" in done.stdout and "lab" in done.stdout


def test_every_option_is_documented():
    page = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    for parameter in typer.main.get_command(danlu.cli.extend.app).params:
        assert f"`{parameter.opts[0]}" in page, f"docs/cli.md lacks {parameter.opts[0]}"


def test_lengths():
    assert parse_lengths("1x, 2.5x,100 ,32", 32) == [32, 80, 100]


def test_start_token_only_where_the_tokenizer_adds_it():
    class Adds:
        bos_token_id = 7

        def __call__(self, text):
            return {"input_ids": [7, 1]}

    assert start_token(byte_tokenizer()) is None
    assert start_token(Adds()) == 7


def test_no_progress_bar_outside_a_terminal(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    result = run("-m", model, "-t", text, "-l", "64", "--methods", "plain", "--no-needle", "-o", tmp_path / "o")
    assert result.exit_code == 0 and "%" not in result.stderr
