"""``danlu sample`` as its user meets it: train, sample, sample again, and one sentence for every kind of bad input."""

from __future__ import annotations

import json

import pytest
from diffusers import DiffusionPipeline
from PIL import Image
from typer.testing import CliRunner

import danlu.cli
import danlu.training.diffusion_report

SMALL = [
    *("--set", "network.channels=[8]", "--set", "network.attention=none"),
    *("--set", "training.steps=2", "--set", "training.batch=4"),
]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(danlu.training.diffusion_report, "REFERENCE_STEPS", 6)
    monkeypatch.setattr(danlu.training.diffusion_report, "BUDGETS", (4, 6))


def run(*words):
    return CliRunner().invoke(danlu.cli.app, ["sample", *map(str, words)], env={"COLUMNS": "200"})


def refused(result, *parts):
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("danlu: "), result.stderr
    for part in parts:
        assert part in lines[0]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    result = run("digits", "--out", out, *SMALL, "--no-plot", "-n", 4, "--steps", 2)
    assert result.exit_code == 0, result.output
    return out


def test_trains_samples_and_writes_a_pipeline(tmp_path):
    out = tmp_path / "run"
    result = run("digits", "-o", out, *SMALL, "--count", 12, "--steps", 3, "--guidance", 2, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    summary = json.loads(result.stdout)
    assert summary["calls"] == 3 and summary["images"] == 12 and summary["classes"] == list("0123456789")
    assert summary["model"] == str(out / "model")
    assert json.loads((out / "samples.json").read_text()) == summary
    assert set(summary["errors"]) == {"ddim", "heun", "dpm++2m", "ipndm"}
    assert list(summary["errors"]["heun"]) == ["4", "6"]
    sheet = Image.open(out / "samples.png")
    assert sheet.size == (10 * 65 + 1, 2 * 65 + 1)  # ten classes in a row, 64 pixels and a line each
    assert Image.open(out / "solvers.png").format == "PNG"
    assert sorted(path.name for path in out.iterdir()) == [
        "model",
        "recipe.json",
        "samples.json",
        "samples.png",
        "solvers.png",
        "training.json",
    ]
    assert DiffusionPipeline.from_pretrained(out / "model").unet.config.num_class_embeds == 11


def test_a_trained_run_is_only_sampled(digits):
    before = (digits / "model" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    result = run(digits, "--class", 3, "--class", 5, "-n", 6, "--solver", "heun", "--steps", 2, "--no-plot")
    assert result.exit_code == 0, result.output
    assert "6 images by heun, 4 calls of the network" in result.stdout
    assert Image.open(digits / "samples.png").size == (2 * 65 + 1, 3 * 65 + 1)
    assert (digits / "model" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before


def test_equal_seeds_give_equal_pictures(digits):
    sheets = []
    for seed in (1, 1, 2):
        assert run(digits, "--seed", seed, "-n", 4, "--steps", 2, "--no-plot", "--scale", 1).exit_code == 0
        sheets.append((digits / "samples.png").read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]


def test_a_pipeline_of_the_host_is_sampled_into_a_folder_of_its_own(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(digits / "model", "-n", 2, "--steps", 2, "--no-plot", "--columns", 1, "--scale", 2)
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "runs" / "model-samples" / "samples.png").size == (18, 2 * 17 + 1)


def test_a_folder_of_images_is_learnt_by_class(tmp_path):
    for name, colour in (("dark", 30), ("light", 220)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (6, 5 + i), (colour, 0, 0)).save(tmp_path / "images" / name / f"{i}.png")
    images = tmp_path / "images"
    refused(run(images, "-o", tmp_path / "a", *SMALL), "1.png is 6 x 6", "0.png is 6 x 5", "--size N --resize")
    assert not (tmp_path / "a").exists()
    result = run(images, "-o", tmp_path / "a", *SMALL, "--size", 4, "--resize", "--no-plot", "-n", 2, "--steps", 2)
    assert result.exit_code == 0, result.output
    sheet = Image.open(tmp_path / "a" / "samples.png")
    assert sheet.mode == "RGB" and json.loads((tmp_path / "a" / "samples.json").read_text())["classes"] == [
        "dark",
        "light",
    ]


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch):
    import danlu.training.diffusion

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(danlu.training.diffusion, "trained_image_model", stop)
    result = run("digits", "-o", tmp_path / "a")
    assert result.exit_code == 130 and "the same command goes on from the last checkpoint" in result.stderr


def test_bad_input_is_one_sentence(digits, tmp_path):
    refused(run("nothing", "-o", tmp_path / "a"), "nothing is no file or folder, and not 'digits'")
    refused(run("digits", "--count", 0), "--count must be at least 1, got 0")
    refused(run("digits", "-o", tmp_path / "a", "--set", "training.setps=2"), "unknown key 'training.setps'", "'steps'")
    refused(run(digits, "--set", "training.steps=3"), "is trained already")
    refused(run("digits", "-o", digits, *SMALL, "--set", "training.seed=3"), "another recipe", "training.seed")
    refused(run(digits, "--class", "ten"), "class must be one of 0, 1", "got 'ten'")
    untrained = ("digits", "-o", tmp_path / "a")
    refused(run(*untrained, "--solver", "magic"), "--solver must be amed or one of ddim", "got 'magic'")
    refused(run(*untrained, "--spacing", "odd"), "--spacing must be one of uniform", "got 'odd'")
    refused(run(*untrained, "--solver", "amed", "--spacing", "logsnr"), "--spacing must be left out", "amed")
    assert not (tmp_path / "a").exists()
    refused(run(digits, "--device", "cuda:99"), "--device")
    (tmp_path / "bad.toml").write_text("[data\n")
    refused(run(tmp_path / "bad.toml", "-o", tmp_path / "a"), "bad.toml is not TOML")
    (tmp_path / "file").write_text("")
    refused(run("digits", "-o", tmp_path / "file"), "cannot write")


def test_a_missing_package_is_named_with_its_remedy(monkeypatch, tmp_path):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "PIL" else find(name))
    refused(run("digits", "-o", tmp_path / "a"), 'danlu sample needs PIL: pip install "danlu[diffusion]"')
