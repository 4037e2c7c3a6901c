"""Whole runs: equal curves, kills, full disks, other recipes, and everything that is refused before work begins."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from danlu.training.metrics import read_rows
from danlu.training.report import TrainingReport
from danlu.training.run import run_recipe
from danlu.training.trainer import checkpoints, find_nonfinite
from reference.training_support import values


@pytest.fixture(autouse=True)
def no_drawing(request, monkeypatch):
    """Drawing takes longer than training here; one test looks at the page."""
    if "report" not in request.node.name:
        monkeypatch.setattr(TrainingReport, "render", lambda self: "")


def losses(folder):
    return [(row["step"], row["loss"]) for row in read_rows(folder / "metrics.jsonl") if "loss" in row]


def test_two_runs_are_equal_and_leave_a_model_a_report_and_curves(recipe, tmp_path):
    made = recipe()
    reports = [run_recipe(made, tmp_path / name) for name in "ab"]
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert [step for step, _ in losses(tmp_path / "a")] == list(range(1, 9))
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in "ab")
    assert all(torch.equal(one[key], two[key]) for key in one)
    report = reports[0]
    assert report.last("loss") < report.curve("loss")[1][0]
    assert report.curve("validation_loss")[0] == [4, 8]
    for key in ("learning_rate", "tokens_per_second", "peak_bytes", "grad_norm"):
        assert len(report.curve(key)[0]) == 8
    page = (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 5
    assert "http" not in page.replace("http://www.w3.org", "")
    assert TrainingReport.from_json((tmp_path / "a" / "report.json").read_text()) == report
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / "model")
    assert len(tokenizer) == model.config.vocab_size
    assert [path.name for path in checkpoints(tmp_path / "a" / "checkpoints")] == ["checkpoint-6", "checkpoint-8"]


@pytest.mark.parametrize(
    "changes",
    [
        {"model__config__attention_dropout": 0.3},
        {"data__packing": "none", "data__length": 24},
        {"data__positions": {"kind": "subset", "max_length": 64}},
        {"data__streaming": True},
        {"optimizer": {"name": "muon"}, "training__accumulation": 2},
        {"optimizer": {"name": "tiger"}},
        {"optimizer": {"name": "tiger", "fold": True}, "training__max_grad_norm": 0, "training__accumulation": 2},
        {"optimizer": {"name": "lion"}, "schedule": {"kind": "piecewise", "knots": {"2": 1.0, "8": 0.0}}},
        {"model": {"path": "danlu-nano"}, "optimizer": {"name": "low_rank"}},
        {"model": {"path": "danlu-nano", "lora": {"rank": 2}}},
        {"model": {"path": "danlu-nano", "ladder": {"reduction": 4}}},
        {"model": {"path": "danlu-nano"}, "loss": {"name": "emo"}},
        {"tasks": [{"name": "other", "train": "text/1.txt"}]},
    ],
    ids=lambda changes: ",".join(changes)[:40],
)
def test_a_run_that_stopped_goes_on_as_if_it_had_not(recipe, tmp_path, changes, monkeypatch):
    made = recipe(**changes)
    run_recipe(made, tmp_path / "whole")

    class Killed(Exception):
        pass

    from danlu.training.metrics import Recorder

    kept = Recorder.on_step_end

    def stop(self, args, state, control, **more):
        kept(self, args, state, control, **more)
        if state.global_step == 5:
            raise Killed

    monkeypatch.setattr(Recorder, "on_step_end", stop)
    with pytest.raises(Killed):
        run_recipe(made, tmp_path / "cut")
    monkeypatch.undo()
    run_recipe(made, tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_killed_process_resumes_with_the_same_curve(recipe, corpus, tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(values(training__steps=40, name="killed")), encoding="utf-8")
    script = (
        "import json, sys; from pathlib import Path\n"
        "from danlu.training.recipe import parse_recipe\nfrom danlu.training.run import run_recipe\n"
        "run_recipe(parse_recipe(json.loads(Path(sys.argv[1]).read_text()), folder=Path(sys.argv[2])), sys.argv[3])"
    )
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(file), str(tmp_path), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < deadline and len(losses(out)) < 7:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 7 <= len(losses(out)) < 40
    made = recipe(training__steps=40, name="killed")
    run_recipe(made, out, resume=True)
    run_recipe(made, tmp_path / "whole")
    assert losses(out) == losses(tmp_path / "whole")


def test_a_kill_while_saving_leaves_the_checkpoint_before(recipe, tmp_path):
    made = recipe()
    run_recipe(made, tmp_path / "whole")
    out = tmp_path / "cut"
    run_recipe(made, out)
    newest = checkpoints(out / "checkpoints")[-1]
    half = out / "checkpoints" / ".saving" / "checkpoint-8"
    half.parent.mkdir()
    newest.rename(half)
    (half / "optimizer.pt").unlink()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    run_recipe(made, out, resume=True)
    assert losses(out) == losses(tmp_path / "whole")
    assert not half.parent.exists()


@pytest.mark.parametrize("place", ["safetensors", "torch"])
def test_a_full_disk_stops_the_run_and_keeps_the_old_checkpoint(recipe, tmp_path, monkeypatch, place):
    import transformers.trainer

    made, out = recipe(), tmp_path / "out"
    calls = []
    kept = torch.save if place == "torch" else transformers.trainer.Trainer.save_model

    def full(*arguments, **options):
        calls.append(1)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        return kept(*arguments, **options)

    if place == "torch":
        monkeypatch.setattr(transformers.trainer.torch, "save", full)
    else:
        calls += [1, 1, 1]
        monkeypatch.setattr(transformers.trainer.Trainer, "save_model", full)
    with pytest.raises(OSError, match=r"cannot save checkpoint 4 .*No space left.*checkpoint-2 is whole.*--resume"):
        run_recipe(made, out)
    monkeypatch.undo()
    assert [path.name for path in checkpoints(out / "checkpoints")] == ["checkpoint-2"]
    run_recipe(made, out, resume=True)
    run_recipe(made, tmp_path / "whole")
    assert losses(out) == losses(tmp_path / "whole")


def test_folders_of_other_runs_are_refused(recipe, tmp_path):
    out = tmp_path / "out"
    run_recipe(recipe(training__steps=2), out)
    with pytest.raises(ValueError, match="already holds a run: go on with --resume"):
        run_recipe(recipe(training__steps=2), out)
    with pytest.raises(ValueError, match="another recipe, which differs in optimizer.learning_rate, training.steps"):
        run_recipe(recipe(training__steps=3, optimizer__learning_rate=0.1), out, resume=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises((ValueError, OSError)):
        run_recipe(recipe(), tmp_path / "file")


def test_a_corpus_shorter_than_a_batch_is_refused(recipe, corpus, tmp_path):
    (corpus / "few.txt").write_text("one two three four five six seven eight nine ten\n" * 8)
    with pytest.raises(ValueError, match=r"data.train must hold at least one batch of 64 rows of 16 tokens, got \d+"):
        run_recipe(recipe(data__train="text/few.txt", training__batch=64), tmp_path / "out")
    with pytest.raises(ValueError, match="data source .*none.txt does not exist"):
        run_recipe(recipe(data__train="text/none.txt"), tmp_path / "other")


def test_a_first_loss_that_is_not_finite_names_the_tensor(recipe, tmp_path, monkeypatch):
    from danlu.training import run

    build = run.build_model

    def broken(*arguments):
        model, tokenizer = build(*arguments)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
        return model, tokenizer

    monkeypatch.setattr(run, "build_model", broken)
    words = r"finite at step 0, got nan: parameter model.layers.1.mlp.down_proj.weight has 1 of 512 entries"
    with pytest.raises(ValueError, match=words):
        run_recipe(recipe(), tmp_path / "out")


def test_the_first_output_that_overflows_is_named(recipe, tmp_path):
    from danlu.training.build import build_model

    model, _ = build_model(recipe(), tmp_path)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.fill_(3e38)
    found = find_nonfinite(model, {"input_ids": torch.arange(8)[None]})
    assert found == "the output of model.layers.0.self_attn.v_proj (Linear) is the first tensor that is not finite"


def test_models_that_cannot_be_built_are_named_by_their_key(recipe, tmp_path):
    with pytest.raises(ValueError, match="model.config .*no key 'hiden_size'"):
        run_recipe(recipe(model__config__hiden_size=3), tmp_path / "a")
    with pytest.raises(ValueError, match="model.config does not describe a causal language model"):
        run_recipe(recipe(model__config__model_type="lama"), tmp_path / "b")
    with pytest.raises(ValueError, match="tokenizer.path must hold a tokenizer"):
        run_recipe(recipe(tokenizer__path=str(tmp_path)), tmp_path / "c")
    with pytest.raises(ValueError, match="model.path must be a folder with a config.json"):
        run_recipe(recipe(model={"path": str(tmp_path)}, tokenizer=None), tmp_path / "d")
    with pytest.raises(ValueError, match="tokenizer has 2048 ids, more than the model's 100"):
        run_recipe(recipe(model__config__vocab_size=100), tmp_path / "e")


def test_a_tokenizer_is_trained_first_when_asked_for(recipe, tmp_path):
    run_recipe(recipe(tokenizer={"train": {"vocab_size": 400, "refine": 0}}, training__steps=2), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert tokenizer.decode(tokenizer("line 7 says 49")["input_ids"]) == "line 7 says 49"


@pytest.mark.parametrize("way", [[], ["--sharded"]], ids=["ddp", "fsdp2"])
def test_two_processes_have_the_losses_of_one(recipe, corpus, tmp_path, way):
    file = tmp_path / "recipe.toml"
    file.write_text(
        'name = "tiny"\n[model.config]\nmodel_type = "llama"\nhidden_size = 16\nintermediate_size = 32\n'
        "num_hidden_layers = 2\nnum_attention_heads = 2\nmax_position_embeddings = 64\ntie_word_embeddings = true\n"
        '[tokenizer]\npath = "danlu-nano"\n[data]\ntrain = "text"\nlength = 16\nheld_out = 0.05\n'
        '[optimizer]\nname = "adamw"\nlearning_rate = 3e-3\n'
        "[training]\nsteps = 8\nbatch = 4\nlog_every = 1\nsave_every = 2\nevaluate_every = 4\nevaluate_rows = 8\n"
    )

    def together(*more):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "danlu",
        ]
        done = subprocess.run(
            [*command, "train", str(file), "--out", str(tmp_path / "two"), *way, *more],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    from danlu.training.recipe import load_recipe

    together()
    run_recipe(load_recipe(file), tmp_path / "one")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [step for step, _ in one] == [step for step, _ in two]
    assert max(abs(a - b) for (_, a), (_, b) in zip(one, two, strict=True)) < 1e-5
    alone, shared = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert alone.keys() == shared.keys()
    assert max((alone[key] - shared[key]).abs().max().item() for key in alone) < 1e-4
    # Take the last steps away, as a kill would, and go on with both processes.
    (tmp_path / "two" / "checkpoints" / "checkpoint-8").rename(tmp_path / "gone")
    together("--resume")
    again = losses(tmp_path / "two")
    assert max(abs(a - b) for (_, a), (_, b) in zip(two, again, strict=True)) < 1e-5
