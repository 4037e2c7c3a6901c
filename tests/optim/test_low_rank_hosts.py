from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from danlu.optim.low_rank import LowRankOptimizer
from reference.tiny import tiny_llama


def rows(count: int = 24) -> list[dict[str, list[int]]]:
    drawn = torch.randint(257, (count, 10), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "labels": row} for row in drawn]


def trainer(folder: Path, steps: int, **options: Any) -> Trainer:
    settings = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 2, "save_steps": 3, "seed": 3,
        "gradient_accumulation_steps": 2, "max_grad_norm": 0.0, "use_cpu": True, "report_to": [], "logging_steps": 1,
        "lr_scheduler_type": "linear", "warmup_steps": 2, "disable_tqdm": True, **options.pop("arguments", {}),
    }  # fmt: skip
    model = tiny_llama(num_hidden_layers=1)
    optimizer = LowRankOptimizer(model, rank=4, base_kwargs={"lr": 0.02}, **options)

    def clip(optimizer: LowRankOptimizer, *_: object) -> None:
        optimizer.clip_grad_norm_(0.5)

    optimizer.register_step_pre_hook(clip)
    return Trainer(model, TrainingArguments(**settings), train_dataset=rows(), optimizers=(optimizer, None))


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", [
    {}, {"fold_in_backward": True, "resync": "incremental", "arguments": {"gradient_checkpointing": True}},
])  # fmt: skip
def test_the_trainer_trains_saves_and_resumes_with_the_same_bits(options: dict, tmp_path: Path) -> None:
    whole = trainer(tmp_path, 6, **copy.deepcopy(options))
    whole.train()
    assert len(losses(whole)) == 6 and losses(whole)[-1] < losses(whole)[0]
    saved = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert saved["low_rank"]["steps"] == 3
    again = trainer(tmp_path, 6, **copy.deepcopy(options))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(again) == losses(whole)
    for one, two in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert whole.optimizer.param_groups[0]["lr"] == 0.0  # the scheduler's end


def test_the_trainers_own_clipping_is_another_one(tmp_path: Path) -> None:
    weights = []
    for norm in (0.0, 1e-3):
        run = trainer(tmp_path, 2, arguments={"max_grad_norm": norm, "save_strategy": "no"})
        run.train()
        weights.append(run.model.model.layers[0].mlp.up_proj.weight.detach())
    assert not torch.allclose(*weights)


def test_accelerate_prepares_and_accumulates() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    plain, prepared = tiny_llama(num_hidden_layers=1), tiny_llama(num_hidden_layers=1)
    reference = LowRankOptimizer(plain, rank=2, base_kwargs={"lr": 0.02})
    model, optimizer = accelerator.prepare(prepared, LowRankOptimizer(prepared, rank=2, base_kwargs={"lr": 0.02}))
    for step in range(4):
        ids = torch.tensor([rows()[step]["input_ids"]])
        (plain(input_ids=ids, labels=ids).loss / 2).backward()
        if step % 2:
            reference.step()
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            optimizer.step()
            optimizer.zero_grad()
    for one, two in zip(plain.parameters(), prepared.parameters(), strict=True):
        assert torch.equal(one, two)


SCRIPT = """
import sys, torch, torch.distributed as dist
from torch import nn
from danlu.optim.low_rank import LowRankOptimizer

dist.init_process_group("gloo")
rank, folder = dist.get_rank(), sys.argv[1]

def build(**options):
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(8, 12), "b": nn.Linear(12, 4), "spare": nn.Linear(8, 12)}).double()
    groups = [{"params": [model[k].weight for k in model]}, {"params": [model["a"].bias], "low_rank": False}]
    return model, LowRankOptimizer(groups, rank=2, base_kwargs={"lr": 0.05}, **options)

class Run(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts
    def forward(self, x, spare):
        h = self.parts["a"](x).tanh()
        return self.parts["b"](h + self.parts["spare"](x) if spare else h).square().mean()

def train(run, optimizer, share):
    for step in range(5):
        x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        # From step 2 on one process alone uses the spare map.
        if share is None:
            loss = (run(x[:3], step > 1) + run(x[3:], False)) / 2
        else:
            loss = run(x[:3] if share == 0 else x[3:], step > 1 and share == 0)
        loss.backward()
        norm = optimizer.clip_grad_norm_(0.3)
        optimizer.step()
        optimizer.zero_grad()
    return norm

model, optimizer = build()
dist.barrier()
expected = train(Run(model), optimizer, None)
wanted = [p.detach() for p in model.parameters()]

for options, wrap in (({}, True), ({"fold_in_backward": True}, False), ({"fold_in_backward": True}, True)):
    model, optimizer = build(**options)
    run = Run(model)
    run = nn.parallel.DistributedDataParallel(run, find_unused_parameters=True) if wrap else run
    norm = train(run, optimizer, rank)
    torch.testing.assert_close(norm, expected, rtol=1e-10, atol=0)
    for got, want in zip(model.parameters(), wanted):
        torch.testing.assert_close(got.detach(), want, rtol=0, atol=1e-12)
    assert (model["spare"].weight - build()[0]["spare"].weight).abs().max() > 0.01

model, optimizer = build(fold_in_backward=True)
run = nn.parallel.DistributedDataParallel(Run(model), gradient_as_bucket_view=True)
run(torch.ones(1, 8, dtype=torch.float64), True).backward()
try:
    optimizer.step()
except RuntimeError as error:
    assert "such as DistributedDataParallel" in str(error), error
else:
    raise SystemExit("folding under DDP was not refused")

from torch.distributed.fsdp import fully_shard
sharded = nn.Sequential(nn.Linear(8, 8))
try:
    fully_shard(sharded)
    LowRankOptimizer(sharded)
except TypeError as error:
    assert "got a DTensor" in str(error), error
else:
    raise SystemExit("sharded weights were not refused")
open(f"{folder}/{rank}.done", "w").close()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in tmp_path.glob("*.done")} == {"0.done", "1.done"}


def test_a_parameter_that_became_frozen_is_left_alone() -> None:
    layer = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = LowRankOptimizer(layer, rank=2)
    layer[0].weight.requires_grad_(False)
    before = layer[0].weight.detach().clone()
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(layer[0].weight, before)
