"""Tiger on two processes: data parallel and sharded, folded and not, against one process on the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SETTING = '''
import os, sys
import torch
import torch.distributed as dist
from torch import nn

from danlu.optim.folding import fold_in_backward
from danlu.optim.groups import tiger_param_groups
from danlu.optim.tiger import Tiger

WINDOWS, MICRO, ROWS = 3, 2, 4


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    return model.double()


def batches(rank=0, world=1):
    """Token ids of micro-batches; ranks get their rows of the whole batch. Token 10 never appears."""
    drawn = torch.Generator().manual_seed(1)
    for _ in range(WINDOWS * MICRO):
        yield torch.randint(10, (ROWS,), generator=drawn).chunk(world)[rank]


def run(model, optimizer, rank=0, world=1, folded=False):
    for place, ids in enumerate(batches(rank, world), 1):
        model(ids).square().mean().backward()
        if folded and place % MICRO == 0 or not folded:
            optimizer.step()
        optimizer.zero_grad()


def start():
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def finish():
    """Leave without tearing down: gloo's threads abort a finished process now and then."""
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def whole(tensor):
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def keep(model, optimizer, rank, path):
    values = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        values[name] = whole(parameter)
        values[name + ".m"] = whole(optimizer.state[parameter]["momentum"])
    torch.save(values, f"{path}.{rank}")
'''

DATA_PARALLEL = """
from torch.nn.parallel import DistributedDataParallel
rank, world = start()
for folded in (False, True):
    model = DistributedDataParallel(build())
    optimizer = Tiger(tiger_param_groups(model), 0.02, accumulation_steps=1 if folded else MICRO)
    handle = fold_in_backward(optimizer, model) if folded else None
    assert model.require_backward_grad_sync != folded
    run(model, optimizer, rank, world, folded)
    keep(model, optimizer, rank, f"{sys.argv[1]}/{folded}")
# A rank whose gradients are not finite is left out, and both ranks stay alike.
model(torch.tensor([rank])).sum().mul(float("nan") if rank else 1.0).backward()
optimizer.step()
keep(model, optimizer, rank, f"{sys.argv[1]}/nan")
handle.remove()
assert model.require_backward_grad_sync
finish()
"""

SHARDED = """
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
rank, world = start()


def sharded():
    model = build()
    for layer in (model[1], model[4]):
        fully_shard(layer)
    return fully_shard(model)


for folded in (False, True):
    model = sharded()
    optimizer = Tiger(tiger_param_groups(model), 0.02, accumulation_steps=1 if folded else MICRO)
    handle = fold_in_backward(optimizer, model) if folded else None
    run(model, optimizer, rank, world, folded)
    keep(model, optimizer, rank, f"{sys.argv[1]}/{folded}")
    assert all(parameter.grad is None for parameter in model.parameters()) or not folded
options = StateDictOptions(full_state_dict=True, cpu_offload=True)
state = get_optimizer_state_dict(model, optimizer, options=options)
handle.remove()
again = Tiger(tiger_param_groups(model), 0.02)
set_optimizer_state_dict(model, again, state if rank == 0 else {}, options=StateDictOptions(
    full_state_dict=True, broadcast_from_rank0=True))
keep(model, again, rank, f"{sys.argv[1]}/loaded")
assert again.param_groups[0]["step"] == WINDOWS, again.param_groups[0]
# One not finite entry on one rank is the whole tensor's.
before = {name: whole(parameter).clone() for name, parameter in model.named_parameters()}
model(torch.tensor([rank])).sum().backward()
model[1].weight.grad.to_local().view(-1)[:1].mul_(float("nan") if rank else 1.0)
again.step()
torch.save([before["1.weight"], whole(model[1].weight)], f"{sys.argv[1]}/nan.{rank}")
finish()
"""


TRAINER = """
sys.path.insert(0, os.environ["TESTS"])
from reference.tiny import tiny_llama
from transformers import Trainer, TrainingArguments
from danlu.optim.folding import fold_in_trainer

ends = []
for folded in (False, True):
    model = tiny_llama().double()
    rows = torch.randint(257, (24, 12), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        output_dir=sys.argv[1], use_cpu=True, per_device_train_batch_size=2 // int(os.environ["WORLD_SIZE"]),
        report_to=[], disable_tqdm=True, gradient_accumulation_steps=3, max_steps=4, save_strategy="no",
        max_grad_norm=0.0, seed=3,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        optimizer_cls_and_kwargs=(Tiger, {"params": tiger_param_groups(model), "lr": 0.01}),
    )
    if folded:
        fold_in_trainer(trainer)
    trainer.train()
    ends.append(torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]))
torch.save(ends, f"{sys.argv[1]}/{os.environ['WORLD_SIZE']}.{os.environ['RANK']}")
if dist.is_initialized():
    finish()
"""


def launch(script: str, folder: Path, processes: int = 2) -> None:
    path = folder / "script.py"
    path.write_text(SETTING + script, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        processes,
        path,
        folder,
    ]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TESTS": str(Path(__file__).parents[1])}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def alone() -> dict[str, torch.Tensor]:
    """One process that has the whole batch."""
    names: dict = {}
    exec(compile(SETTING, "setting", "exec"), names)
    model = names["build"]()
    optimizer = names["Tiger"](names["tiger_param_groups"](model), 0.02, accumulation_steps=names["MICRO"])
    names["run"](model, optimizer)
    values = {}
    for name, parameter in model.named_parameters():
        values[name], values[name + ".m"] = parameter.detach(), optimizer.state[parameter]["momentum"]
    return values


def assert_all_near(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], atol=1e-12, rtol=0), name


def test_data_parallel_equals_one_process_on_the_whole_batch(tmp_path):
    launch(DATA_PARALLEL, tmp_path)
    expected = alone()
    for folded in (False, True):
        ranks = [torch.load(tmp_path / f"{folded}.{rank}") for rank in range(2)]
        assert_all_near(ranks[0], expected)
        assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in expected)
    ranks = [torch.load(tmp_path / f"nan.{rank}") for rank in range(2)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in expected)
    assert all(torch.isfinite(value).all() for value in ranks[0].values())
    assert not torch.equal(ranks[0]["4.weight"], torch.load(tmp_path / "True.0")["4.weight"])


def test_sharded_equals_one_process_on_the_whole_batch(tmp_path):
    launch(SHARDED, tmp_path)
    expected = alone()
    for folded in (False, True):
        assert_all_near(torch.load(tmp_path / f"{folded}.0"), expected)
    assert_all_near(torch.load(tmp_path / "loaded.1"), expected)
    before, after = torch.load(tmp_path / "nan.0")
    assert torch.allclose(after, 0.99 * before, atol=1e-14)


@pytest.mark.slow
def test_trainer_on_two_processes_equals_one_folded_or_not(tmp_path):
    ends = []
    for processes in (1, 2):
        launch(TRAINER, tmp_path, processes)
        ends += torch.load(tmp_path / f"{processes}.0")
    assert all(torch.allclose(end, ends[0], atol=1e-12, rtol=0) for end in ends[1:])


def test_flattened_parameters_are_refused():
    from danlu.optim.folding import fold_in_backward
    from danlu.optim.groups import tiger_param_groups
    from danlu.optim.tiger import Tiger

    class FullyShardedDataParallel(torch.nn.Linear):
        """Stands for the wrapper, which needs a process group."""

    model = torch.nn.Sequential(FullyShardedDataParallel(2, 2))
    with pytest.raises(ValueError, match=r"flattens parameters.*use fully_shard \(FSDP2\)"):
        tiger_param_groups(model)
    with pytest.raises(ValueError, match="flattens parameters"):
        fold_in_backward(Tiger(model.parameters()), model)
