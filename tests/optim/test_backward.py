"""Gradients that are used up inside the backward pass."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from danlu.optim.backward import GradientConsumer


def collected(model: nn.Module, run) -> dict[str, list[torch.Tensor]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, list[torch.Tensor]] = {}
    consumer = GradientConsumer(
        model.parameters(), lambda parameter, gradient: found.setdefault(names[id(parameter)], []).append(gradient)
    )
    run()
    consumer.remove()
    return found


def test_each_gradient_is_handed_on_once_and_freed():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    found = collected(model, lambda: model(x).square().sum().backward())
    assert all(parameter.grad is None for parameter in model.parameters())
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert len(found[name]) == 1 and torch.equal(found[name][0], parameter.grad)


def test_uses_of_a_tied_parameter_are_summed_before():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    x = torch.randn(2, 4)
    found = collected(model, lambda: model(x).square().sum().backward())
    model(x).square().sum().backward()
    assert len(found["0.weight"]) == 1 and torch.allclose(found["0.weight"][0], first.weight.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_segments_give_the_same_sums(reentrant):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    x = torch.randn(2, 4, requires_grad=True)

    def run():
        y = checkpoint(model, x, use_reentrant=reentrant)
        y = checkpoint(model, y, use_reentrant=reentrant)
        y.square().sum().backward()

    found = collected(model, run)
    model(model(x)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(sum(found[name]), parameter.grad, atol=1e-6)


def test_at_most_one_gradient_is_alive():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    alive = []
    consumer = GradientConsumer(
        model.parameters(), lambda *_: alive.append(sum(p.grad is not None for p in model.parameters()))
    )
    model(torch.randn(2, 8)).sum().backward()
    assert alive == [0] * 8
    consumer.remove()
    model(torch.randn(2, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_would_be_lost_is_refused():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="must require gradients, got one that is frozen"):
        GradientConsumer(model.parameters(), lambda *_: None)
    model.weight.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"must have no gradient yet.*zero_grad"):
        GradientConsumer([model.weight], lambda *_: None)
