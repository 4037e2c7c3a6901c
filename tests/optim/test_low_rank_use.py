from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from danlu.optim.low_rank import LowRankOptimizer
from danlu.optim.low_rank_schemes import SCHEMES, additive_linear
from reference.low_rank import fill, give_gradient, one_matrix, sgd
from reference.tiny import tiny_llama

ALL = ("lora", "lora_symmetric", "additive", "random")


# Folding, clipping, closures, groups


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("scheme", ["lora", "additive"])
def test_folding_gives_the_same_training_and_leaves_no_gradient(scheme: str, clip: bool) -> None:
    weights = []
    for fold in (False, True):
        model = tiny_llama().double()
        optimizer = LowRankOptimizer(
            model, scheme=scheme, rank=2, fold_in_backward=fold, target_modules=["q_proj", "down_proj"],
            base_kwargs={"lr": 0.02},
        )  # fmt: skip
        for step in range(4):
            optimizer.zero_grad()
            for part in range(3):  # accumulation
                ids = torch.arange(10)[None] + 10 * step + part
                (model(input_ids=ids, labels=ids).loss / 3).backward()
                assert fold == all(site.weight.grad is None for site in optimizer.sites)
            if clip:
                assert optimizer.clip_grad_norm_(0.01) > 0.01
            optimizer.step()
            assert all(p.grad is None for p in model.parameters())
        weights.append([site.weight.detach().clone() for site in optimizer.sites])
    for plain, folded in zip(*weights, strict=True):
        torch.testing.assert_close(plain, folded, rtol=0, atol=1e-12)


def test_folding_keeps_one_gradient_alive_and_ends_on_demand() -> None:
    model = tiny_llama()
    optimizer = sgd(model, fold_in_backward=True)
    alive: list[int] = []
    probes = [
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in model.parameters()))
        )
        for p in model.parameters()
        if p.requires_grad
    ]
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(alive) == 14 and max(alive) == 0  # each is taken before the next hook looks
    for probe in probes:
        probe.remove()
    optimizer.remove_hooks()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(site.weight.grad is not None for site in optimizer.sites)


def test_steps_use_gradients_up() -> None:
    layer = one_matrix()
    optimizer = sgd(layer)
    give_gradient(layer.weight)
    optimizer.clip_grad_norm_(1.0)
    optimizer.zero_grad()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert torch.equal(layer.weight, before)
    give_gradient(layer.weight)
    optimizer.step()
    moved = layer.weight.detach().clone()
    assert not torch.equal(moved, before)
    optimizer.step()
    assert torch.equal(layer.weight, moved)


def test_clipping_measures_the_projected_gradients() -> None:
    layer, other = one_matrix(), one_matrix(6, 10)
    optimizer = sgd(nn.ModuleList([layer, other]), alpha=8)
    fill(optimizer)
    expected = torch.zeros((), dtype=torch.float64)
    for site, seed in zip(optimizer.sites, (1, 2), strict=True):
        G = give_gradient(site.weight, seed)
        A, B = site.factors
        expected += (2 * B.T @ G).square().sum() + (2 * G @ A.T).square().sum()
    norm = optimizer.clip_grad_norm_(0.5)
    torch.testing.assert_close(norm, expected.sqrt())
    clipped = sum(p.grad.square().sum() for site in optimizer.sites for p in (site.A, site.B))
    torch.testing.assert_close(clipped.sqrt(), torch.tensor(0.5, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("resync", ["exact", "incremental"])
def test_a_closure_of_lbfgs_sees_the_weights_it_tries(resync: str) -> None:
    layer = one_matrix(6, 6)
    torch.manual_seed(2)
    x = torch.randn(40, 6, dtype=torch.float64)
    target = x @ (layer.weight.detach() + torch.randn(6, 1) @ torch.randn(1, 6)).T
    optimizer = LowRankOptimizer(
        layer, rank=2, alpha=2, base=torch.optim.LBFGS, resync=resync, scheme="lora_symmetric",
        base_kwargs={"lr": 1.0, "max_iter": 30, "line_search_fn": "strong_wolfe"},
    )  # fmt: skip
    A, B = (factor.clone() for factor in optimizer.sites[0].factors)
    start = layer.weight.detach().clone()
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        return loss

    first = optimizer.step(closure)
    # The same search on the factors themselves.
    A, B = A.requires_grad_(), B.requires_grad_()
    A0, B0 = A.detach().clone(), B.detach().clone()
    plain = torch.optim.LBFGS([A, B], lr=1.0, max_iter=30, line_search_fn="strong_wolfe")
    expected = []

    def reference() -> Tensor:
        plain.zero_grad()
        loss = (x @ (start - B0 @ A0 + B @ A).T - target).square().mean()
        loss.backward()
        expected.append(loss.item())
        return loss

    plain.step(reference)
    assert first.item() == losses[0] and len(losses) == len(expected) > 5
    torch.testing.assert_close(torch.tensor(losses[:12]), torch.tensor(expected[:12]), rtol=1e-5, atol=1e-12)


def test_plain_groups_train_beside_low_rank_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).double()
    reference = copy.deepcopy(model[1])
    optimizer = LowRankOptimizer(
        [
            {"params": [model[0].weight], "lr": 0.5},
            {"params": [model[0].bias, *model[1].parameters()], "low_rank": False},
        ],
        base=torch.optim.SGD,
        rank=2,
        base_kwargs={"lr": 0.1},
    )
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    model(torch.randn(3, 8, dtype=torch.float64)).square().sum().backward()
    G = model[1].weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(model[1].weight.detach(), reference.weight.detach() - 0.1 * G)
    from_model = LowRankOptimizer(model, rank=2, target_modules=["0"])
    assert not model[1].weight.requires_grad
    from_model.add_param_group({"params": list(model[1].parameters()), "low_rank": False})
    assert model[1].weight.requires_grad and not model[0].bias.requires_grad


def test_schedulers_act_on_the_base_optimiser() -> None:
    layer = one_matrix()
    optimizer = sgd(layer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    B = [optimizer.sites[0].factors.B.clone()]
    for _ in range(3):
        G = give_gradient(layer.weight)
        optimizer.step()
        schedule.step()
        B.append(optimizer.sites[0].factors.B.clone())
    assert optimizer.base.param_groups[0]["lr"] == 0.025 and optimizer.param_groups[0]["lr"] == 0.0125
    A = optimizer.sites[0]
    assert A.A.shape == (4, 8) and (B[1] - B[0]).norm() > 1.5 * (B[2] - B[1]).norm() > 0
    assert G.shape == layer.weight.shape


def test_gradient_scaling_works_on_the_full_gradients() -> None:
    weights = []
    for enabled in (False, True):
        torch.manual_seed(0)
        layer = one_matrix(dtype=torch.float32)
        optimizer = sgd(layer)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        for step in range(3):
            scaler.scale(layer(torch.ones(2, 8) * step).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append(layer.weight.detach())
    torch.testing.assert_close(*weights)


# Bad input


@pytest.mark.parametrize("options, message", [
    ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
    ({"rank": 2.0}, "rank must be an integer"),
    ({"alpha": 0}, "alpha must be positive, got 0"),
    ({"scheme": "dora"}, "scheme must be one of lora, lora_symmetric, additive, random, got 'dora'"),
    ({"resync": "never"}, "resync must be 'exact' or 'incremental', got 'never'"),
    ({"resync_every": 0}, "resync_every must be an integer of at least 1, got 0"),
    ({"resync_every": 4}, "resync_every must be None for resync='exact'"),
    ({"restart_every": 0}, "restart_every must be an integer of at least 1, got 0"),
    ({"scheme": "additive", "restart_every": 4}, "restart_every must be None for scheme='additive'"),
    ({"scheme": "additive", "rank": 3}, r"rank must divide both sizes of weight \(12, 8\).*divisor of 4"),
    ({"target_modules": ["q"]}, "got 'q', which matches nothing"),
    ({"target_modules": "bias"}, "got 'bias', which matches bias, which has ndim 1"),
    ({"base_kwargs": {"lr": -1}}, "Invalid learning rate"),
])  # fmt: skip
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRankOptimizer(nn.Linear(8, 12), fold_in_backward=True, **options)


def test_weights_that_cannot_be_trained_so_are_refused() -> None:
    frozen = one_matrix().requires_grad_(False)
    with pytest.raises(ValueError, match="weight must require gradients"):
        LowRankOptimizer(frozen)
    with pytest.raises(ValueError, match="param.0 must have at least 2 dimensions, got ndim 1"):
        LowRankOptimizer([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="gain must have at least 2 dimensions"):
        LowRankOptimizer([("gain", nn.Parameter(torch.zeros(3)))])
    quantised = nn.Linear(4, 4, bias=False)
    quantised.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match="uint8.*quantised.*use PEFT"):
        LowRankOptimizer(quantised)
    with pytest.raises(ValueError, match="meta device"):
        LowRankOptimizer(nn.Linear(4, 4, device="meta"))
    with pytest.raises(TypeError, match="complex64"):
        LowRankOptimizer([nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="needs a model to choose from"):
        LowRankOptimizer([nn.Parameter(torch.zeros(4, 4))], target_modules=["q"])
    with pytest.raises(ValueError, match="must have matrices to train, got LayerNorm"):
        LowRankOptimizer(nn.LayerNorm(4))
    pair = nn.ModuleList([one_matrix(), one_matrix()])
    pair[1].weight = nn.Parameter(pair[0].weight.data)
    with pytest.raises(ValueError, match="1.weight must not share memory with 0.weight"):
        LowRankOptimizer(pair, rank=2)
    table = nn.Embedding(5, 4, sparse=True)
    optimizer = sgd(table, target_modules="weight")
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="must be dense, got a sparse one"):
        optimizer.step()
    with pytest.raises(ValueError, match="got 'other'"):
        optimizer.delta("other")


def test_a_rank_beyond_the_matrix_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="danlu.low_rank"):
        LowRankOptimizer(one_matrix(6, 4), rank=5)
    assert "rank 5 exceeds what weight (6, 4) can have" in caplog.text


def test_exchanged_parameters_are_noticed() -> None:
    layer = one_matrix()
    optimizer = sgd(layer)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(6, 8))]
    with pytest.raises(RuntimeError, match="such as FSDP, exchanged the parameters"):
        optimizer.step()


def test_the_families_are_known_by_their_names() -> None:
    assert set(SCHEMES) == set(ALL)
    with pytest.raises(ValueError, match="r dividing both"):
        additive_linear(torch.zeros(1, 8), torch.zeros(3, 8), torch.zeros(12, 3))
