"""Reflow, distillation and their measures."""

import copy
import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from danlu.diffusion.couplings import Pairs
from danlu.diffusion.flow import RK4, flow_matching_loss
from danlu.diffusion.flow_metrics import energy_distance, nfe_curve, straightness, transport_cost
from danlu.diffusion.mixtures import GaussianMixture
from danlu.diffusion.processes import RectifiedFlow
from danlu.diffusion.reflow import distill, distillation_loss, distilled_steps, mark_distilled, reflow
from danlu.diffusion.solvers import sample
from reference import flow as reference


def column(values):
    return torch.as_tensor(values, dtype=torch.float64)[:, None]


def first_flow(x, t):
    mixture = GaussianMixture(
        torch.tensor(reference.WEIGHTS), torch.tensor(reference.MEANS)[:, None], torch.tensor(reference.SPREADS**2)
    )
    return mixture.velocity(x, t, RectifiedFlow())


def second_flow(x, t):
    return column(reference.straight_velocity(x[:, 0].numpy(), float(t.flatten()[0])))


class Net(nn.Module):
    def __init__(self, seed=0, width=24):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x, t, push=None):
        out = self.layers(torch.cat([x, t[:, None].to(x.dtype)], 1))
        return out if push is None else out + push[:, None]


def blobs(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x1 = torch.randn(count, 2, generator=generator)
    return 0.5 * x1 + torch.tanh(2 * x1), x1


def test_second_flow_of_a_line_is_exact_in_one_step_and_straight():
    x1 = column(reference.gaussian_quantiles(5))
    target = column(reference.quantile_map(x1[:, 0].numpy()))
    one = sample(second_flow, RectifiedFlow(), "velocity", solver="euler", steps=1, noise=x1).samples
    assert torch.allclose(one, target, atol=1e-12)
    assert float(straightness(second_flow, x1, steps=1).max()) < 1e-20
    for t in (0.2, 0.7):
        times = torch.full((5,), t, dtype=torch.float64)
        assert float(flow_matching_loss(second_flow, target, x1, times).max()) < 1e-20


def test_first_flow_has_the_known_straightness_and_costs():
    x1 = column(reference.gaussian_quantiles(2000))
    x0 = sample(first_flow, RectifiedFlow(), "velocity", solver=RK4(), steps=25, noise=x1).samples
    # 0.934: by quadrature over quantiles; 0.941 is one draw of some ten thousand trajectories.
    values = straightness(first_flow, x1)
    assert values.shape == (2000,) and float(values.mean()) == pytest.approx(0.9340, abs=1e-3)
    assert float(transport_cost(x0, x1)) == pytest.approx(1.2747, abs=2e-3)
    shuffled = x0[torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    assert float(transport_cost(shuffled, x1)) == pytest.approx(5.032, abs=0.12)
    # Convex costs of other kinds fall as well.
    for cost in (lambda d: d.abs().sum(1), lambda d: (d**4).sum(1)):
        assert float(transport_cost(x0, x1, cost)) < float(transport_cost(shuffled, x1, cost))


def test_straightness_is_the_integral_along_the_trajectory():
    def velocity(x, t):
        return torch.stack([torch.ones_like(t), 2 * t], 1)

    # x_t ends at x1 - (1, 1); S = int (1 - 2t)^2 dt = 1/3.
    x1 = torch.randn(3, 2, dtype=torch.float64)
    assert torch.allclose(
        straightness(velocity, x1, steps=400), torch.full((3,), 1 / 3, dtype=torch.float64), atol=1e-4
    )


def test_distillation_in_one_step_is_the_loss_at_the_prior():
    net, (x0, x1) = Net().double(), (v.double() for v in blobs(6))
    ones = torch.ones(6, dtype=torch.float64)
    by_hand = (net(x1, ones) - (x1 - x0)).square().mean(1)
    assert torch.allclose(distillation_loss(net, x0, x1), by_hand, atol=1e-14)
    seen = {}

    def compare(prediction, data):
        seen.update(prediction=prediction, data=data)
        return (prediction - data).square().sum((1,), keepdim=True)

    value = distillation_loss(net, x0, x1, loss=compare)
    assert value.shape == (6,) and torch.equal(seen["data"], x0)
    assert torch.allclose(seen["prediction"], x1 - net(x1, ones), atol=1e-14)
    assert torch.allclose(value, 2 * by_hand, atol=1e-13)


def test_distillation_in_several_steps_is_told_the_times_of_the_grid_alone():
    x0, x1 = (v.double() for v in blobs(4000))
    times, points = [], []

    def model(x, t):
        times.append(t)
        points.append(x)
        return 0.3 * x

    loss = distillation_loss(model, x0, x1, 4, seed=0)
    t = times[0]
    assert torch.allclose(points[0], (1 - t[:, None]) * x0 + t[:, None] * x1, atol=1e-14)
    values, counts = t.unique(return_counts=True)
    assert values.tolist() == [0.25, 0.5, 0.75, 1.0] and counts.min() > 900
    assert torch.allclose(loss, (0.3 * points[0] - (x1 - x0)).square().mean(1), atol=1e-13)
    data = distillation_loss(model, x0, x1, 4, seed=0, loss=lambda a, b: (a - b).square().mean(1))
    assert torch.allclose(data, t**2 * loss, atol=1e-13)  # |x0_hat - x0| = t |v - (x1 - x0)|


def test_losses_refuse_bad_input():
    net, (x0, x1) = Net(), blobs(6)
    for steps in (0, 1.5, True):
        with pytest.raises(ValueError, match="steps must be an integer of at least 1"):
            distillation_loss(net, x0, x1, steps)
    with pytest.raises(ValueError, match="seed must be"):
        distillation_loss(net, x0, x1, 2)
    with pytest.raises(ValueError, match="loss must be 'l2' or a function"):
        distillation_loss(net, x0, x1, loss="lpips")
    with pytest.raises(ValueError, match="loss must return one value for each of the 6 samples"):
        distillation_loss(net, x0, x1, loss=lambda a, b: (a - b).square())
    with pytest.raises(ValueError, match="x1 must have the shape"):
        distillation_loss(net, x0, x1[:3])
    with pytest.raises(ValueError, match="steps must be"):
        distill(net, [], torch.optim.SGD(net.parameters(), 0.1), 0)
    with pytest.raises(ValueError, match="x1 must have the shape"):
        transport_cost(x0, x1[:3])
    with pytest.raises(ValueError, match=r"y must have samples of shape \(2,\)"):
        energy_distance(x0, x1[:, :1])


def test_reflow_steps_are_those_of_a_plain_loop():
    x0, x1 = blobs(24)
    ours, plain = Net(), Net()
    loader = DataLoader(Pairs(x0, x1), batch_size=8)
    losses = list(reflow(ours, loader, torch.optim.Adam(ours.parameters(), 1e-2), seed=5))
    optimiser, generator = torch.optim.Adam(plain.parameters(), 1e-2), torch.Generator().manual_seed(5)
    for first, loss in zip(range(0, 24, 8), losses, strict=True):
        expected = flow_matching_loss(plain, x0[first : first + 8], x1[first : first + 8], seed=generator).mean()
        assert float(loss) == float(expected) and not loss.requires_grad
        optimiser.zero_grad()
        expected.backward()
        optimiser.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


def test_reflow_makes_one_step_enough_and_distillation_fits_the_pairs():
    x0, x1 = blobs(512)
    net, generator = Net(), torch.Generator().manual_seed(0)
    loader = DataLoader(Pairs(x0, x1), batch_size=128, shuffle=True, generator=generator)
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    fresh_x0, fresh_x1 = blobs(256, seed=1)

    def error(samples):
        return (samples - fresh_x0).square().sum(1).mean()

    before = nfe_curve(net, fresh_x1, error, (1,))[1]
    for _ in range(60):
        losses = list(reflow(net, loader, optimiser, seed=generator))
    after = nfe_curve(net, fresh_x1, error, (1,))[1]
    assert after < before / 10 and len(losses) == 4
    for _ in range(60):
        list(distill(net, loader, optimiser))
    distilled = nfe_curve(net, fresh_x1, error, (1,))[1]
    assert distilled < after
    assert distilled_steps(net) == 1


def test_conditions_of_a_batch_reach_the_model():
    x0, x1 = blobs(8)
    net = Net()
    batch = (x0, x1, {"push": torch.arange(8.0)})
    (loss,) = reflow(net, [batch], torch.optim.SGD(net.parameters(), 0.0), seed=0)
    expected = flow_matching_loss(net, x0, x1, condition=batch[2], seed=0).mean()
    assert float(loss) == float(expected) != float(flow_matching_loss(net, x0, x1, seed=0).mean())


@pytest.fixture
def accelerate_state():
    """Accelerate keeps its state for the whole process: put it back for the tests that come after."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_gradients_are_accumulated_by_accelerate(accelerate_state):
    from accelerate import Accelerator

    x0, x1 = blobs(16)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = Net()
    optimiser = torch.optim.SGD(net.parameters(), 0.1)
    loader = DataLoader(Pairs(x0, x1), batch_size=4)
    model, wrapped, prepared = accelerator.prepare(net, optimiser, loader)
    losses = list(reflow(model, prepared, wrapped, seed=0, accelerator=accelerator))
    plain, generator = Net(), torch.Generator().manual_seed(0)
    descent = torch.optim.SGD(plain.parameters(), 0.1)
    for place in range(4):
        part = slice(4 * place, 4 * place + 4)
        loss = flow_matching_loss(plain, x0[part], x1[part], seed=generator).mean()
        assert float(losses[place]) == pytest.approx(float(loss), rel=1e-6)
        (loss / 2).backward()
        if place % 2:
            descent.step()
            descent.zero_grad()
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(net.parameters(), plain.parameters(), strict=True))
    list(distill(model, prepared, wrapped, 2, accelerator=accelerator))
    assert distilled_steps(net) == 2


@pytest.mark.parametrize("steps, asked, warns", [(1, 1, 0), (1, 2, 1), (4, 4, 0), (4, 2, 0), (4, 8, 1), (4, 3, 1)])
def test_a_distilled_model_warns_once_off_its_grid(steps, asked, warns, caplog):
    net = Net()
    assert distilled_steps(net) is None
    mark_distilled(net, 7)
    mark_distilled(net, steps)
    twin = copy.deepcopy(net)
    assert distilled_steps(twin) == steps
    x1 = torch.zeros(3, 2)
    with caplog.at_level(logging.WARNING, "danlu"):
        for _ in range(2):
            sample(twin, RectifiedFlow(), "velocity", solver="euler", steps=asked, noise=x1)
    assert len(caplog.records) == warns
    if warns:
        assert f"distilled for steps={steps} " in caplog.text
    caplog.clear()
    net(x1, t=torch.zeros(3))
    assert "t = 0," in caplog.text


def test_curve_counts_calls_and_energy_distance_is_the_double_sum():
    x, y = torch.randn(5, 2, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)

    def mean(a, b):
        return np.mean([[float((p - q).norm()) for q in b] for p in a])

    assert float(energy_distance(x, y)) == pytest.approx(2 * mean(x, y) - mean(x, x) - mean(y, y), abs=1e-12)
    assert abs(float(energy_distance(x, x))) < 1e-12
    curve = nfe_curve(Net().double(), x, lambda samples: samples.sum(), (1, 2), RK4())
    assert list(curve) == [4, 8]
