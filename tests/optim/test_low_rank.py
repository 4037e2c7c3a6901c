from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from danlu.optim.low_rank import LowRankOptimizer
from danlu.optim.low_rank_schemes import additive_linear
from reference.low_rank import fill, give_gradient, one_matrix, sgd
from reference.tiny import tiny_llama

ALL = ("lora", "lora_symmetric", "additive", "random")


# The mathematics


@pytest.mark.parametrize("alpha", [4.0, 10.0])
def test_one_sgd_step_moves_the_weight_by_the_formula_of_the_source(alpha: float) -> None:
    layer = one_matrix()
    optimizer = sgd(layer, alpha=alpha)
    fill(optimizer)
    site, s, lr = optimizer.sites[0], alpha / 4, 0.1
    A, B = site.A.detach().clone(), site.B.detach().clone()
    before, G = layer.weight.detach().clone(), give_gradient(layer.weight)
    optimizer.step()
    first = -lr * s**2 * (B @ B.T @ G + G @ A.T @ A)
    second = lr**2 * s**3 * (G @ A.T) @ (B.T @ G)
    torch.testing.assert_close(layer.weight.detach() - before, first + second, rtol=0, atol=1e-13)


@pytest.mark.parametrize("scheme", ALL)
def test_projected_gradients_are_the_derivatives_of_the_change(scheme: str) -> None:
    layer = one_matrix()
    optimizer = sgd(layer, scheme=scheme, alpha=6)
    if scheme != "random":
        fill(optimizer)
    site, G = optimizer.sites[0], give_gradient(layer.weight)
    A, B = (factor.detach().clone().requires_grad_() for factor in (site.A, site.B))
    fixed = site.fixed
    if scheme == "additive":  # by its definition, entry by entry
        rows, columns = torch.arange(12) % 4, torch.arange(8) % 4
        change = A[rows] + B[:, columns]
    elif scheme == "random":
        change = fixed.B @ A + B @ fixed.A
    else:
        change = B @ A
    (1.5 * change * G).sum().backward()
    optimizer.clip_grad_norm_(1e9)
    torch.testing.assert_close(site.A.grad, A.grad, rtol=0, atol=1e-13)
    torch.testing.assert_close(site.B.grad, B.grad, rtol=0, atol=1e-13)


@pytest.mark.parametrize("resync", ["exact", "incremental"])
@pytest.mark.parametrize("scheme", ALL)
def test_the_weight_is_the_start_plus_the_change_of_bounded_rank(scheme: str, resync: str) -> None:
    layer = one_matrix(24, 16)
    start = layer.weight.detach().clone()
    options = {"restart_every": 100} if scheme == "random" else {}
    optimizer = LowRankOptimizer(layer, scheme=scheme, rank=2, resync=resync, base_kwargs={"lr": 0.01}, **options)
    for step in range(12):
        give_gradient(layer.weight, step)
        optimizer.step()
    change = layer.weight.detach() - start
    torch.testing.assert_close(change, optimizer.delta("weight"), rtol=0, atol=1e-12)
    rank = 2 if scheme == "lora" else 4
    values = torch.linalg.svdvals(change)
    assert values[rank - 1] > 1e-4 and values[rank] < 1e-10


def test_symmetric_start_leaves_the_weight_bit_equal_and_moves_both_factors() -> None:
    layer = one_matrix(dtype=torch.float32)
    start = layer.weight.detach().clone()
    optimizer = sgd(layer, scheme="lora_symmetric")
    assert torch.equal(layer.weight, start)
    A, B = optimizer.sites[0].factors
    A, B = A.clone(), B.clone()
    optimizer.change.attach()
    assert torch.equal(layer.weight, start)
    give_gradient(layer.weight)
    optimizer.step()
    now = optimizer.sites[0].factors
    assert (now.A - A).abs().max() > 0.01 and (now.B - B).abs().max() > 0.01
    torch.testing.assert_close(layer.weight.detach() - start, now.B @ now.A - B @ A, rtol=0, atol=1e-6)


def test_the_first_step_of_lora_moves_b_alone() -> None:
    layer = one_matrix()
    optimizer = sgd(layer)
    A = optimizer.sites[0].factors.A.clone()
    give_gradient(layer.weight)
    optimizer.step()
    assert torch.equal(optimizer.sites[0].factors.A, A) and optimizer.sites[0].factors.B.abs().max() > 0.01


def test_additive_change_has_a_cheap_forward_pass() -> None:
    A, B, x = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 8), (12, 4), (2, 5, 8)))
    dense = A[torch.arange(12) % 4] + B[:, torch.arange(8) % 4]
    torch.testing.assert_close(additive_linear(x, A, B), x @ dense.T, rtol=0, atol=1e-12)


def test_additive_rank_one_is_row_and_column_sums() -> None:
    layer = one_matrix()
    optimizer = sgd(layer, scheme="additive", rank=1, alpha=1)
    start, G = layer.weight.detach().clone(), give_gradient(layer.weight)
    optimizer.step()
    expected = -0.1 * (G.sum(0, keepdim=True) + G.sum(1, keepdim=True))
    torch.testing.assert_close(layer.weight.detach() - start, expected.expand(12, 8), rtol=0, atol=1e-13)


def test_moving_a_periodic_matrix_between_the_additive_factors_changes_nothing() -> None:
    layer = one_matrix()
    optimizer = sgd(layer, scheme="additive")
    fill(optimizer)
    before, K = optimizer.delta("weight"), torch.randn(4, 4, dtype=torch.float64)
    site = optimizer.sites[0]
    site.A.data += K.repeat(1, 2)
    site.B.data -= K.repeat(3, 1)
    torch.testing.assert_close(optimizer.delta("weight"), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3])
def test_random_projections_average_to_twice_the_gradient(rank: int) -> None:
    layer = one_matrix(5, 4)
    optimizer = sgd(layer, scheme="random", rank=rank, alpha=rank, resync="incremental", base_kwargs={"lr": 1.0})
    G = give_gradient(layer.weight)
    draws = []
    for _ in range(3000):
        before = layer.weight.detach().clone()
        layer.weight.grad = G.clone()
        optimizer.step()
        draws.append(layer.weight.detach() - before)
    moves = torch.stack(draws)
    error = moves.std(0) / len(moves) ** 0.5
    assert ((moves.mean(0) + 2 * G).abs() / error).max() < 3.5  # of 20 entries
    ratio = (moves.mean(0) * G).sum() / (-G * G).sum()
    assert abs(ratio - 2) < 3 * ((moves * G).sum((1, 2)).std() / (G * G).sum() / len(moves) ** 0.5)


def test_fresh_projections_every_step_forbid_moments() -> None:
    with pytest.raises(ValueError, match="needs base=torch.optim.SGD without momentum, got AdamW"):
        LowRankOptimizer(one_matrix(), scheme="random", rank=2)
    with pytest.raises(ValueError, match="without momentum"):
        sgd(one_matrix(), scheme="random", base_kwargs={"lr": 0.1, "momentum": 0.9})


# Layouts


class Experts(nn.Module):
    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.is_transposed = turned
        self.bank = nn.Parameter(torch.randn(3, 12, 8, dtype=torch.float64))


def layouts() -> dict[str, nn.Module]:
    from transformers.pytorch_utils import Conv1D

    convolution = nn.Conv2d(3, 8, (2, 3), dtype=torch.float64)
    last = nn.Conv2d(3, 8, (2, 3), dtype=torch.float64).to(memory_format=torch.channels_last)
    return {
        "linear": one_matrix(),
        "conv1d of gpt-2": Conv1D(12, 8).double(),
        "convolution": convolution,
        "channels last": last,
        "convolution of lines": nn.Conv1d(3, 8, 5, dtype=torch.float64),
        "embedding": nn.Embedding(12, 8, dtype=torch.float64),
        "bank": Experts(),
        "turned bank": Experts(turned=True),
    }


def as_matrices(name: str, weight: Tensor) -> Tensor:
    if name in ("conv1d of gpt-2", "embedding", "turned bank"):
        return weight.mT
    return weight.reshape(weight.shape[0], -1) if "conv" in name or name == "channels last" else weight


@pytest.mark.parametrize("block", [1 << 22, 17])
@pytest.mark.parametrize("name", list(layouts()))
def test_every_layout_steps_as_its_matrix(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("danlu.optim.low_rank_sites._BLOCK", block)  # few rows at a time give the same numbers
    holder = layouts()[name]
    weight = next(p for p in holder.parameters() if p.ndim > 1)
    optimizer = sgd(holder, target_modules=".*", alpha=8)
    fill(optimizer)
    start, G = as_matrices(name, weight.detach()).clone(), as_matrices(name, give_gradient(weight))
    A, B = (factor.clone() for factor in optimizer.sites[0].factors)
    assert A.shape == (*start.shape[:-2], 4, start.shape[-1]) and B.shape == (*start.shape[:-1], 4)
    optimizer.step()
    newA, newB = A - 0.2 * B.mT @ G, B - 0.2 * G @ A.mT
    torch.testing.assert_close(
        as_matrices(name, weight.detach()) - start, 2 * (newB @ newA - B @ A), rtol=0, atol=1e-12
    )
    change = optimizer.delta(optimizer.sites[0].name)
    assert change.shape == weight.shape
    torch.testing.assert_close(as_matrices(name, change), 2 * newB @ newA, rtol=0, atol=1e-12)


def test_a_bank_is_its_experts_one_by_one() -> None:
    bank = Experts()
    singles = [one_matrix() for _ in range(3)]
    together = sgd(bank, target_modules="bank")
    fill(together)
    apart = [sgd(single) for single in singles]
    for index, (single, optimizer) in enumerate(zip(singles, apart, strict=True)):
        single.weight.data.copy_(bank.bank[index])
        optimizer.sites[0].A.data.copy_(together.sites[0].A[index])
        optimizer.sites[0].B.data.copy_(together.sites[0].B[index])
    G = give_gradient(bank.bank)
    together.step()
    for index, (single, optimizer) in enumerate(zip(singles, apart, strict=True)):
        optimizer.sites[0].kept.copy_(
            single.weight.detach() - optimizer.sites[0].factors.B @ optimizer.sites[0].factors.A
        )
        single.weight.grad = G[index].clone()
        optimizer.step()
        torch.testing.assert_close(single.weight, bank.bank[index], rtol=0, atol=1e-12)


def test_tied_weights_have_one_state_and_get_the_sum_of_both_gradients() -> None:
    model = tiny_llama(tie_word_embeddings=True).double()
    optimizer = sgd(model, target_modules=["lm_head"])
    assert [site.name for site in optimizer.sites] == ["lm_head.weight"]
    assert torch.equal(optimizer.delta("model.embed_tokens"), optimizer.delta("lm_head.weight"))
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    G = model.lm_head.weight.grad.clone()
    A = optimizer.sites[0].factors.A.clone()
    optimizer.step()
    torch.testing.assert_close(optimizer.sites[0].factors.B, -0.1 * G @ A.T, rtol=0, atol=1e-13)


def test_targets_are_chosen_as_peft_chooses_them() -> None:
    model = tiny_llama()
    every = {site.name for site in LowRankOptimizer(tiny_llama()).sites}
    assert len(every) == 14 and not any("lm_head" in name or "embed" in name or "norm" in name for name in every)
    tied = {site.name for site in LowRankOptimizer(tiny_llama(tie_word_embeddings=True)).sites}
    assert tied == every
    ends = {site.name for site in LowRankOptimizer(tiny_llama(), target_modules=["q_proj", "mlp.up_proj.weight"]).sites}
    assert ends == {name for name in every if "q_proj" in name or "up_proj" in name}
    regular = {site.name for site in LowRankOptimizer(tiny_llama(), target_modules=r".*layers\.1.*proj").sites}
    assert regular == {name for name in every if "layers.1" in name}
    optimizer = LowRankOptimizer(model, target_modules=["q_proj"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {site.name for site in optimizer.sites}
    compiled = torch.compile(tiny_llama())
    assert {site.name for site in LowRankOptimizer(compiled).sites} == every
