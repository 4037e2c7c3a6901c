from __future__ import annotations

import pytest
import torch

from danlu.lab.low_rank import Task, low_rank_optimiser, train, train_modules, train_naive
from danlu.optim.low_rank import LowRankOptimizer


def test_the_task_is_a_shift_of_rank_four_that_its_answer_solves() -> None:
    task = Task.draw(0)
    assert task.loss(task.weight) > 1e-3
    again = Task.draw(0)
    assert torch.equal(task.targets, again.targets) and not torch.equal(task.targets, Task.draw(1).targets)


def test_modules_and_optimiser_start_alike_and_stay_together() -> None:
    task = Task.draw(0)
    ours = train(
        task,
        lambda layer: LowRankOptimizer(layer, rank=4, alpha=4, base_kwargs={"lr": 1e-2}),
        steps=40,
    )
    theirs = train_modules(task, 4, 1e-2, steps=40)
    assert ours == pytest.approx(theirs, abs=1e-6) and ours[-1] < 0.5 * ours[0]
    assert train_modules(task, 1, 1e-2, steps=40)[-1] > theirs[-1]


def test_rounded_increments_fall_behind() -> None:
    task = Task.draw(0)
    ours = train(
        task,
        lambda layer: LowRankOptimizer(layer, rank=4, alpha=4, base_kwargs={"lr": 3e-3}),
        torch.bfloat16,
        steps=250,
    )
    naive = train_naive(task, 4, 3e-3, steps=250)
    assert naive[:3] == pytest.approx(ours[:3], rel=0.05) and naive[-1] > 1.2 * ours[-1]


def test_the_claim_names_its_source() -> None:
    assert "9590" in low_rank_optimiser.source and low_rank_optimiser.name == "low-rank-optimiser"
