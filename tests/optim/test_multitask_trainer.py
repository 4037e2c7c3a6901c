"""Several losses in a real run of the host library's Trainer."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from danlu.optim.multitask import MultiTaskBackward
from danlu.optim.multitask_trainer import MultiTaskTrainer
from reference.tiny import tiny_llama

DATA = [{"input_ids": row, "labels": row} for row in torch.randint(0, 257, (8, 10), generator=torch.Generator())]


class Run(MultiTaskTrainer):
    """Next token as the main task, the current one and a constant one as auxiliary tasks that conflict with it."""

    def compute_losses(self, model, inputs):
        logits, ids = model(input_ids=inputs["input_ids"]).logits, inputs["input_ids"]
        targets = {"next": ids[:, 1:], "same": ids[:, :-1], "zero": 0 * ids[:, 1:]}
        flat = logits[:, :-1].flatten(0, 1)
        return {name: nn.functional.cross_entropy(flat, target.flatten()) for name, target in targets.items()}


def arguments(folder, **changes) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**settings, **changes})


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def test_a_run_logs_losses_weights_and_cosines_and_takes_the_combined_steps(tmp_path):
    model = tiny_llama().double()
    start = copy.deepcopy(model)
    trainer = Run(model=model, args=arguments(tmp_path, max_steps=1, per_device_train_batch_size=8), train_dataset=DATA)
    trainer.train()
    batch = {"input_ids": torch.stack([item["input_ids"] for item in DATA])}
    result = MultiTaskBackward(start.parameters()).backward(Run.compute_losses(None, start.train(), batch))
    expected = weights(start) - 0.1 * torch.cat([p.grad.flatten() for p in start.parameters()])
    torch.testing.assert_close(weights(model), expected, atol=1e-7, rtol=1e-6)
    logged = trainer.state.log_history[0]
    for index, name in enumerate(("next", "same", "zero")):
        assert logged[f"{name}_loss"] == pytest.approx(float(result.losses[index]), rel=1e-4)
        assert logged[f"{name}_weight"] == pytest.approx(float(result.weights[index]), abs=1e-4)
        if index:
            assert logged[f"{name}_cosine"] == pytest.approx(float(result.cosines[0, index]), abs=1e-4)
    assert logged["loss"] == pytest.approx(logged["next_loss"], rel=1e-3)


def test_accumulated_batches_take_the_steps_of_whole_ones(tmp_path):
    ends = []
    for size, parts in ((4, 1), (2, 2), (1, 4)):
        model = tiny_llama().double()
        args = arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=parts)
        trainer = Run(model=model, args=args, train_dataset=DATA)
        trainer.train()
        ends.append(weights(model))
        assert trainer.state.log_history[0]["next_loss"] == pytest.approx(
            trainer.state.log_history[0]["loss"], rel=1e-3
        )
    torch.testing.assert_close(ends[1], ends[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ends[2], ends[0], atol=1e-6, rtol=1e-5)


def test_heads_by_name_the_optimiser_as_metric_and_evaluation(tmp_path):
    trainer = Run(
        model=tiny_llama(),
        args=arguments(tmp_path, optim="adamw_torch", learning_rate=1e-3),
        train_dataset=DATA,
        eval_dataset=DATA,
        combine={"metric": "optimizer", "drift": 0.1},
        heads=["lm_head"],
    )
    trainer.train()
    assert len(trainer.multitask.heads) == 1
    assert isinstance(trainer.multitask.metric, torch.optim.AdamW)
    assert trainer.evaluate()["eval_loss"] > 0


def test_auxiliary_losses_do_not_rise_in_a_run(tmp_path):
    seen = {}

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "same_loss" in logs:
                seen.setdefault("rows", []).append((logs["next_loss"], logs["same_loss"], logs["zero_loss"]))

    args = arguments(tmp_path, per_device_train_batch_size=8, max_steps=12, learning_rate=0.02)
    Run(model=tiny_llama(), args=args, train_dataset=DATA, callbacks=[Watch()]).train()
    rows = torch.tensor(seen["rows"])
    assert rows[-1, 0] < rows[0, 0]
    assert (rows[1:, 1:] - rows[:-1, 1:]).max() < 0.01


def test_a_trainer_without_losses_says_what_to_write(tmp_path):
    trainer = MultiTaskTrainer(model=tiny_llama(), args=arguments(tmp_path), train_dataset=DATA)
    with pytest.raises(NotImplementedError, match="write compute_losses"):
        trainer.train()


def test_wrong_options_show_at_once(tmp_path):
    with pytest.raises(ValueError, match="method must be one of"):
        Run(model=tiny_llama(), args=arguments(tmp_path), combine={"method": "best"})
    with pytest.raises(ValueError, match="heads must match names of trainable parameters, got 'classifier'"):
        Run(model=tiny_llama(), args=arguments(tmp_path), heads=["classifier"])


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from test_multitask_trainer import DATA, Run, arguments, weights
from reference.tiny import tiny_llama

model = tiny_llama().double()
args = arguments("out", max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, ddp_backend="gloo")
trainer = Run(model=model, args=args, train_dataset=DATA, combine={"method": "min_norm"})
trainer.train()
if trainer.args.process_index == 0:
    torch.save(weights(model), "weights.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()  # left to the exit of the process, its threads may abort it
"""


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    done = subprocess.run(
        [*command, str(here)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model = tiny_llama().double()
    args = arguments(tmp_path, max_steps=2, per_device_train_batch_size=8)
    Run(model=model, args=args, train_dataset=DATA, combine={"method": "min_norm"}).train()
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    torch.testing.assert_close(found, weights(model), atol=1e-6, rtol=1e-5)
