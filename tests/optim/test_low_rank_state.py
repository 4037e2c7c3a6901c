from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from danlu.optim.low_rank import LowRankOptimizer
from reference.low_rank import fill, give_gradient, one_matrix, sgd

# Half precision


def test_half_precision_weights_are_the_rounded_sum_and_never_drift() -> None:
    layer = one_matrix(64, 64, torch.bfloat16)
    start = layer.weight.detach().clone()
    optimizer = LowRankOptimizer(layer, rank=4, base_kwargs={"lr": 1e-5, "weight_decay": 0.0})
    assert optimizer.sites[0].A.dtype == torch.float32
    for step in range(60):
        give_gradient(layer.weight, step)
        optimizer.step()
    change = optimizer.delta("weight")
    assert change.abs().max() < 2e-3  # much of it below half a step of the weights
    assert torch.equal(layer.weight, (start.float() + change).bfloat16())
    assert all(torch.isfinite(factor).all() for factor in optimizer.sites[0].factors)


def test_increments_into_half_precision_are_right_on_average() -> None:
    layer = one_matrix(64, 64, torch.bfloat16)
    start = layer.weight.detach().clone()
    optimizer = LowRankOptimizer(layer, rank=4, resync="incremental", base_kwargs={"lr": 1e-4, "weight_decay": 0.0})
    assert optimizer.state_bytes()["copies of W0"] == 0
    for step in range(200):
        give_gradient(layer.weight, step % 2)
        optimizer.step()
    change, moved = optimizer.delta("weight"), layer.weight.detach().float() - start.float()
    assert ((moved - change) * change).sum().abs() < 0.1 * (change * change).sum()
    naive = start.clone()
    for _ in range(200):
        naive += (change / 200).bfloat16()
    assert ((naive.float() - start.float() - change) * change).sum().abs() > 0.3 * (change * change).sum()


def test_resynchronisation_ends_the_drift_and_keeps_its_copy_on_the_host() -> None:
    layer = one_matrix(64, 64, torch.bfloat16)
    start = layer.weight.detach().clone()
    optimizer = LowRankOptimizer(layer, rank=4, resync="incremental", resync_every=5, base_kwargs={"lr": 1e-4})
    for step in range(10):
        give_gradient(layer.weight, step)
        optimizer.step()
        exact = (start.float() + optimizer.delta("weight")).bfloat16()
        assert torch.equal(layer.weight, exact) == (step % 5 == 4)
    optimizer.detach_delta()
    assert torch.equal(layer.weight, start)


@pytest.mark.parametrize("scheme", ["lora", "lora_symmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_detaching_restores_the_bits_and_attaching_returns_them(scheme: str, dtype: torch.dtype) -> None:
    layer = one_matrix(dtype=dtype)
    start = layer.weight.detach().clone()
    optimizer = sgd(layer, scheme=scheme)
    for step in range(5):
        give_gradient(layer.weight, step)
        optimizer.step()
    trained = layer.weight.detach().clone()
    assert not torch.equal(trained, start)
    optimizer.detach_delta()
    optimizer.detach_delta()
    assert torch.equal(layer.weight, start)
    with pytest.raises(RuntimeError, match="call attach_delta"):
        optimizer.step()
    optimizer.attach_delta()
    assert torch.equal(layer.weight, trained)
    optimizer.step()


def test_detaching_without_a_copy_subtracts_or_is_refused() -> None:
    layer = one_matrix()
    start = layer.weight.detach().clone()
    optimizer = sgd(layer, resync="incremental")
    fill(optimizer)
    optimizer.detach_delta()
    torch.testing.assert_close(layer.weight.detach(), start, rtol=0, atol=1e-14)
    half = sgd(one_matrix(dtype=torch.bfloat16), resync="incremental")
    with pytest.raises(ValueError, match="resync must be 'exact'"):
        half.detach_delta()


# Restarts


@pytest.mark.parametrize("resync", ["exact", "incremental"])
def test_restarts_go_beyond_the_rank(resync: str) -> None:
    layer = one_matrix(16, 16)
    start = layer.weight.detach().clone()
    optimizer = LowRankOptimizer(layer, rank=1, restart_every=4, resync=resync, base_kwargs={"lr": 0.05})
    for step in range(12):
        if step % 4 == 0 and step:
            assert not optimizer.base.state and optimizer.delta("weight").abs().max() == 0
        give_gradient(layer.weight, step // 4)
        optimizer.step()
    values = torch.linalg.svdvals(layer.weight.detach() - start)
    assert values[2] > 1e-3 and values[3] < 1e-10


def test_restarts_of_half_precision_weights_keep_small_changes_on_average() -> None:
    layer = one_matrix(64, 64, torch.bfloat16)
    layer.weight.data.fill_(1.0)
    optimizer = LowRankOptimizer(
        layer, rank=1, alpha=1, restart_every=1, base=torch.optim.SGD, base_kwargs={"lr": 4e-3}
    )
    expected = torch.zeros(64, 64)
    for _ in range(50):
        layer.weight.grad = torch.ones_like(layer.weight)
        A = optimizer.sites[0].factors.A.clone()
        expected -= 4e-3 * torch.ones(64, 64) @ A.T @ A
        optimizer.step()
        assert torch.equal(layer.weight, optimizer.sites[0].kept)
    moved = layer.weight.detach().float() - 1.0
    assert expected.abs().mean() > 1e-3
    share = (moved * expected).sum() / expected.square().sum()
    assert abs(share - 1) < 0.1


# State


@pytest.mark.parametrize("options", [
    {}, {"resync": "incremental"}, {"scheme": "lora_symmetric"}, {"scheme": "additive"},
    {"scheme": "random", "restart_every": 2}, {"restart_every": 2}, {"resync": "incremental", "resync_every": 3},
    {"fold_in_backward": True},
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_has_the_same_bits(options: dict, dtype: torch.dtype) -> None:
    def build(seed: int) -> tuple[nn.Module, LowRankOptimizer]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).to(dtype)
        groups = [
            {"params": [model[0].weight, model[2].weight]},
            {"params": [model[0].bias], "low_rank": False, "lr": 0.1},
        ]
        return model, LowRankOptimizer(groups, rank=2, base_kwargs={"lr": 0.01}, seed=7, **options)

    def train(model: nn.Module, optimizer: LowRankOptimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).to(dtype)
            model(x).float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = build(4)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(3, 7))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, resumed = build(5)  # other weights: W0 too comes from the state
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.steps == 3
    train(again, resumed, range(3, 7))
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
    ours, theirs = resumed.state_dict(), optimizer.state_dict()
    assert ours["low_rank"] == theirs["low_rank"] and ours["param_groups"] == theirs["param_groups"]
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=0)


def test_an_exact_state_brings_the_weights_along_and_is_not_shared() -> None:
    layer, other = one_matrix(), one_matrix()
    optimizer, loaded = (sgd(one, base_kwargs={"lr": lr, "momentum": 0.9}) for one, lr in ((layer, 0.1), (other, 9.0)))
    give_gradient(layer.weight)
    optimizer.step()
    loaded.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.weight, layer.weight) and loaded.param_groups[0]["lr"] == 0.1
    site = optimizer.sites[0]
    moments = optimizer.base.state[site.B]["momentum_buffer"]
    before = [tensor.clone() for tensor in (layer.weight.detach(), site.factors.B, moments)]
    give_gradient(other.weight, 9)
    loaded.step()
    for tensor, kept in zip((layer.weight, site.factors.B, moments), before, strict=True):
        assert torch.equal(tensor, kept)
    assert not optimizer.state


def test_a_matrix_that_was_never_used_has_no_moments_to_load() -> None:
    pair = nn.ModuleList([one_matrix(), one_matrix()])
    optimizer, loaded = (
        LowRankOptimizer(modules, rank=2) for modules in (pair, nn.ModuleList([one_matrix() for _ in "ab"]))
    )
    give_gradient(pair[1].weight)
    optimizer.step()
    loaded.load_state_dict(optimizer.state_dict())
    unused, used = loaded.sites
    assert unused.A not in loaded.base.state or not loaded.base.state[unused.A]
    torch.testing.assert_close(
        loaded.base.state[used.B]["exp_avg"], optimizer.base.state[optimizer.sites[1].B]["exp_avg"], rtol=0, atol=0
    )


def test_a_foreign_state_is_refused() -> None:
    optimizer = sgd(one_matrix())
    with pytest.raises(ValueError, match="without the key 'low_rank'"):
        optimizer.load_state_dict(torch.optim.SGD(one_matrix().parameters(), 0.1).state_dict())
    with pytest.raises(ValueError, match="scheme='lora', got 'additive'"):
        optimizer.load_state_dict(sgd(one_matrix(), scheme="additive").state_dict())
    with pytest.raises(ValueError, match=r"factors of weight \(12, 8\)"):
        optimizer.load_state_dict(sgd(one_matrix(6, 8)).state_dict())
    with pytest.raises(ValueError, match="other numbers of parameters"):
        optimizer.load_state_dict(sgd(nn.ModuleList([one_matrix(), one_matrix()])).state_dict())


def test_bytes_are_counted() -> None:
    layer = one_matrix(64, 32, torch.bfloat16)
    optimizer = LowRankOptimizer(layer, rank=4)
    give_gradient(layer.weight)
    optimizer.step()
    numbers = 4 * (64 + 32)
    held = optimizer.state_bytes()
    assert held["factors"] == 4 * numbers and held["copies of W0"] == 2 * 64 * 32 and held["fixed factors"] == 0
    assert 8 * numbers <= held["base"] <= 8 * numbers + 16
    assert sgd(one_matrix(), scheme="lora_symmetric").state_bytes()["fixed factors"] == 8 * 4 * 20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second kind of device")
@pytest.mark.parametrize("fold", [False, True])
def test_factors_follow_a_model_that_moves(fold: bool) -> None:
    layer = one_matrix(dtype=torch.float32)
    optimizer = LowRankOptimizer(layer, rank=2, fold_in_backward=fold)
    layer(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    layer.to("cuda")
    layer(torch.ones(1, 8, device="cuda")).sum().backward()
    optimizer.step()
    site = optimizer.sites[0]
    assert site.A.device.type == site.kept.device.type == "cuda"
    assert optimizer.base.state[site.A]["exp_avg"].device.type == "cuda"
