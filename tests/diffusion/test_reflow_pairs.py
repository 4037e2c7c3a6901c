"""The cache of pairs: the same after any stop, refused for another model, shared by processes."""

import json
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from danlu.diffusion.flow import RK4
from danlu.diffusion.mixtures import GaussianMixture
from danlu.diffusion.pair_cache import PairCache, generate_pairs, weights_hash
from danlu.diffusion.processes import VP, RectifiedFlow
from danlu.diffusion.solvers import sample
from danlu.diffusion.targets import Denoiser

SETTINGS = {"count": 23, "shape": (2,), "seed": 3, "steps": 3, "batch_size": 4, "shard_size": 6}


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layer = nn.Linear(3, 2)
        self.drop = nn.Dropout(0.5)
        self.calls, self.stop = 0, None

    def forward(self, x, t, push=None):
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        out = self.drop(self.layer(torch.cat([x, t[:, None]], 1)).sin())
        return out if push is None else out + push[:, None]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_pairs_are_starts_and_ends_of_the_flow(tmp_path):
    net = Net().train()
    cache = generate_pairs(net, tmp_path, **SETTINGS)
    assert net.training and net.drop.training
    assert len(cache) == 23 and len(contents(tmp_path)) == 5
    pairs = cache.load()
    ends = sample(net.eval(), RectifiedFlow(), "velocity", solver=RK4(), steps=3, noise=pairs.x1).samples
    assert torch.allclose(pairs.x0, ends, atol=1e-6) and not torch.equal(pairs.x0, pairs.x1)
    assert abs(float(pairs.x1.mean())) < 0.5 and 0.6 < float(pairs.x1.std()) < 1.4
    assert len(pairs.x1.unique(dim=0)) == 23
    for index in (0, 5, 6, 22, -1):
        x0, x1 = cache[index]
        assert torch.equal(x0, pairs.x0[index]) and torch.equal(x1, pairs.x1[index])
    with pytest.raises(IndexError, match="0..22"):
        cache[23]


@pytest.mark.parametrize("stop", [1, 9, 13, 30, 60])
def test_a_run_that_was_killed_and_resumed_gives_the_same_files(tmp_path, stop):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    generate_pairs(Net(), whole, **SETTINGS)
    net = Net()
    net.stop = stop
    with pytest.raises(KeyboardInterrupt):
        generate_pairs(net, resumed, **SETTINGS)
    done = contents(resumed)
    assert all(contents(whole)[name] == value for name, value in done.items()) and len(done) < 5
    with pytest.raises(ValueError, match="misses .* of 4 shards: run generate_pairs"):
        PairCache(resumed)
    fresh = Net()
    generate_pairs(fresh, resumed, **SETTINGS)
    assert contents(resumed) == contents(whole)
    assert fresh.calls == sum(12 * 2 if rows > 4 else 12 for rows in (6, 6, 6, 5)[len(done) - 1 :])
    again = Net()
    generate_pairs(again, resumed, **SETTINGS)
    assert again.calls == 0


def test_pairs_of_another_model_or_other_settings_are_refused(tmp_path):
    generate_pairs(Net(), tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match="made with weights of another model: give another folder"):
        generate_pairs(Net(1), tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match="weights of another model"):
        PairCache(tmp_path, Net(1))
    assert len(PairCache(tmp_path, Net())) == 23
    for name, value in (("seed", 4), ("steps", 4), ("count", 24), ("shard_size", 7), ("shape", (3,))):
        with pytest.raises(ValueError, match=f"made with {name} = "):
            generate_pairs(Net(), tmp_path, **{**SETTINGS, name: value})
    with pytest.raises(ValueError, match="made with solver = 'RK4.*', not 'Euler"):
        generate_pairs(Net(), tmp_path, **SETTINGS, solver="euler")
    with pytest.raises(ValueError, match="made with conditions = "):
        generate_pairs(Net(), tmp_path, **SETTINGS, condition={"push": torch.zeros(23)})
    manifest = json.loads((tmp_path / "pairs.json").read_text())
    (tmp_path / "pairs.json").write_text(json.dumps({**manifest, "format": 9}))
    with pytest.raises(ValueError, match="format 1, got 9"):
        PairCache(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no pairs.json"):
        PairCache(tmp_path / "nothing")


def test_the_hash_sees_every_weight_and_no_wrapper():
    net = Net()
    before = weights_hash(net)
    assert before == weights_hash(Net()) == weights_hash(nn.DataParallel(net))
    with torch.no_grad():
        net.layer.weight[1, 2] += 1e-7
    assert weights_hash(net) != before
    assert weights_hash(Net().bfloat16()) != before
    assert weights_hash(nn.BatchNorm1d(3)) != before


def test_processes_share_the_shards(tmp_path):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    generate_pairs(Net(), whole, **SETTINGS)
    met = []
    for rank in (0, 1):
        process = SimpleNamespace(process_index=rank, num_processes=2, wait_for_everyone=lambda: met.append(1))
        if rank == 0:  # alone it cannot finish: the other half is not there yet
            with pytest.raises(ValueError, match="misses 2 of 4 shards"):
                generate_pairs(Net(), shared, **SETTINGS, accelerator=process)
            assert sorted(contents(shared))[:3] == [
                "pairs-000000.safetensors",
                "pairs-000002.safetensors",
                "pairs.json",
            ]
        else:
            generate_pairs(Net(), shared, **SETTINGS, accelerator=process)
    assert contents(shared) == contents(whole) and len(met) == 4


def test_conditions_go_to_the_model_and_into_the_pairs(tmp_path):
    push = torch.arange(23.0)
    cache = generate_pairs(Net(), tmp_path, **SETTINGS, condition={"push": push})
    plain = generate_pairs(Net(), tmp_path / "plain", **SETTINGS)
    for index in (1, 7, 22):
        x0, x1, condition = cache[index]
        assert torch.equal(x1, plain[index][1]) and condition["push"] == index
        ends = sample(
            lambda x, t, index=index: Net().eval()(x, t, torch.tensor([float(index)])),
            RectifiedFlow(), "velocity", solver=RK4(), steps=3, noise=x1[None],
        )  # fmt: skip
        assert torch.allclose(x0, ends.samples[0], atol=1e-5)
    batch = next(iter(DataLoader(cache, batch_size=5)))
    assert batch[0].shape == (5, 2) and batch[2]["push"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="condition 'push' must have one entry for each of the 23 pairs, got 4"):
        generate_pairs(Net(), tmp_path, **SETTINGS, condition={"push": push[:4]})


def test_a_diffusion_model_and_another_prior_make_pairs(tmp_path):
    mixture = GaussianMixture(torch.ones(2), torch.tensor([[-2.0], [2.0]]), torch.tensor([0.1, 0.1]))
    denoiser = Denoiser(lambda x, t: mixture.epsilon(x.double(), t.double(), VP()).to(x), VP(), "epsilon")
    options = {"count": 40, "shape": (1,), "seed": 0, "steps": 40}
    with pytest.raises(ValueError, match="identity must be given for a model that is no module"):
        generate_pairs(denoiser, tmp_path, **options)
    pairs = generate_pairs(denoiser, tmp_path, **options, identity="two modes").load()
    assert torch.equal(pairs.x0.sign(), pairs.x1.sign()) and float((pairs.x0.abs() - 2).abs().mean()) < 0.4
    assert len(PairCache(tmp_path, "two modes")) == 40

    def flat(shape, generator):
        return 2 * torch.rand(shape, generator=generator) - 1

    pairs = generate_pairs(Net(), tmp_path / "flat", **SETTINGS, prior=flat).load()
    assert float(pairs.x1.abs().max()) <= 1
    assert json.loads((tmp_path / "flat" / "pairs.json").read_text())["prior"].endswith("flat")
    with pytest.raises(ValueError, match=r"prior must return floating-point samples of shape \(6, 2\)"):
        generate_pairs(Net(), tmp_path / "bad", **SETTINGS, prior=lambda shape, generator: torch.zeros(3, 2))


def test_numbers_out_of_range_are_refused(tmp_path):
    for name, value in (("count", 0), ("steps", 0), ("batch_size", 0), ("shard_size", 1.5), ("seed", -1)):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least"):
            generate_pairs(Net(), tmp_path, **{**SETTINGS, name: value})
    with pytest.raises(ValueError, match="solver must be one of"):
        generate_pairs(Net(), tmp_path, **SETTINGS, solver="rk9")
    assert not list(tmp_path.iterdir())
    broken = Net()
    broken.layer.bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        generate_pairs(broken, tmp_path, **SETTINGS)


def test_a_cache_can_be_sent_to_another_process_after_it_was_read(tmp_path):
    cache = generate_pairs(Net(), tmp_path, **SETTINGS)
    cache[0]
    twin = pickle.loads(pickle.dumps(cache))
    assert torch.equal(twin[7][0], cache[7][0])
    assert set(load_file(tmp_path / "pairs-000003.safetensors")) == {"x0", "x1"}


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch
from accelerate import Accelerator
from importlib import import_module
test = import_module("diffusion.test_reflow_pairs")
cache = test.generate_pairs(test.Net(), {folder!r}, **test.SETTINGS, accelerator=Accelerator(cpu=True))
assert len(cache) == 23
"""


@pytest.mark.slow
def test_two_real_processes_of_accelerate_make_the_pairs_of_one(tmp_path):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    generate_pairs(Net(), whole, **SETTINGS)
    script = tmp_path / "run.py"
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    script.write_text(SCRIPT.format(tests=tests, folder=str(shared)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert contents(shared) == contents(whole)
