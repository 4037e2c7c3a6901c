"""Paths, the flow-matching loss, the exact velocity of a data set, and the golden numbers of a one-dimensional flow."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from danlu.diffusion.couplings import MinibatchOT
from danlu.diffusion.flow import RK4, ShiftedTimes, dataset_velocity, flow_matching_loss
from danlu.diffusion.losses import denoising_loss
from danlu.diffusion.mixtures import GaussianMixture
from danlu.diffusion.paths import AffinePath, CustomPath, LinearPath, ProcessPath, TrigonometricPath
from danlu.diffusion.processes import EDM, VE, VP, RectifiedFlow
from danlu.diffusion.solvers import sample
from danlu.diffusion.times import LogitNormalTimes, UniformTimes
from reference import flow as reference

PATHS = {
    "linear": LinearPath(),
    "arc": TrigonometricPath(),
    "vp": ProcessPath(VP()),
    "ve": ProcessPath(VE()),
    "edm": ProcessPath(EDM()),
    "affine": AffinePath(lambda x0, t: (1 - t) ** 2 * x0 * (1 + t * x0), lambda t: t**2 * (3 - 2 * t)),
    "custom": CustomPath(lambda x0, x1, t: (1 - t) * x0 + t * x1 + t * (1 - t) * torch.sin(3 * x0 + x1)),
}
EXACT = ("linear", "arc", "affine", "custom")


def samples(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype), torch.randn(
        shape, generator=generator, dtype=torch.float64
    ).to(dtype)


def line_mixture():
    return GaussianMixture(
        torch.tensor(reference.WEIGHTS), torch.tensor(reference.MEANS)[:, None], torch.tensor(reference.SPREADS**2)
    )


def line_velocity(x, t):
    return line_mixture().velocity(x, t, RectifiedFlow())


def column(values):
    return torch.as_tensor(values, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("name", PATHS)
def test_derivative_is_that_of_finite_differences(name):
    path, (x0, x1) = PATHS[name], samples(5, 2, 3)
    low, high = path.clock.t_min, path.clock.t_max
    t = low + torch.tensor([0.05, 0.3, 0.5, 0.8, 0.95], dtype=torch.float64) * (high - low)
    h = 1e-5 * t
    slope = (path.sample(x0, x1, t + h)[0] - path.sample(x0, x1, t - h)[0]) / (2 * h).view(-1, 1, 1)
    value, derivative = path.sample(x0, x1, t)
    assert value.shape == x0.shape
    assert torch.allclose(derivative, slope, rtol=1e-6, atol=1e-6)
    for place, time in enumerate(t):
        one = path.sample(x0[place : place + 1], x1[place : place + 1], float(time))
        assert torch.equal(one[0][0], value[place]) and torch.allclose(one[1][0], derivative[place], atol=1e-14)


@pytest.mark.parametrize("name", EXACT)
def test_ends_are_data_and_prior(name):
    x0, x1 = samples(4, 3)
    assert torch.allclose(PATHS[name].sample(x0, x1, 0.0)[0], x0, atol=1e-15)
    assert torch.allclose(PATHS[name].sample(x0, x1, 1.0)[0], x1, atol=1e-15)


def test_points_are_those_of_the_formulas():
    x0, x1 = samples(4, 3)
    x, v = LinearPath().sample(x0, x1, 0.25)
    assert torch.equal(x, 0.75 * x0 + 0.25 * x1) and torch.equal(v, x1 - x0)
    x, v = TrigonometricPath().sample(x0, x1, 1 / 3)
    assert torch.allclose(x, math.cos(math.pi / 6) * x0 + 0.5 * x1, atol=1e-15)
    assert torch.allclose(v, math.pi / 2 * (math.cos(math.pi / 6) * x1 - 0.5 * x0), atol=1e-15)
    x, v = ProcessPath(EDM()).sample(x0, x1, 7.0)
    assert torch.allclose(x, x0 + 7 * x1) and torch.equal(v, x1)


def test_linear_paths_written_by_hand_are_the_linear_path():
    x0, x1 = samples(4, 2, 2)
    t = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)
    expected = LinearPath().sample(x0, x1, t)
    for path in (AffinePath(lambda x0, t: (1 - t) * x0, lambda t: t), CustomPath(lambda a, b, t: (1 - t) * a + t * b)):
        for got, wanted in zip(path.sample(x0, x1, t), expected, strict=True):
            assert torch.allclose(got, wanted, atol=1e-15)


def test_a_path_with_parameters_has_gradients():
    bend = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x0, x1 = samples(3, 2)
    path = CustomPath(lambda a, b, t: (1 - t) * a + t * b + bend * t * (1 - t))
    path.sample(x0, x1, 0.25)[1].sum().backward()
    assert bend.grad == pytest.approx(6 * 0.5)


def test_half_precision_is_widened():
    x0, x1 = samples(4, 3, dtype=torch.bfloat16)
    for name in PATHS:
        x, v = PATHS[name].sample(x0, x1, 0.5)
        assert x.dtype == v.dtype == torch.float32
        wide = PATHS[name].sample(x0.double(), x1.double(), 0.5)
        assert torch.allclose(x.double(), wide[0], rtol=1e-5, atol=1e-5)


def test_paths_refuse_what_they_cannot_be():
    x0, x1 = samples(4, 3)
    with pytest.raises(ValueError, match=r"s must be 0 at t = 0 and 1 at t = 1, got 0 and 0.841471"):
        AffinePath(lambda x0, t: (1 - t) * x0, torch.sin)
    with pytest.raises(ValueError, match="s must increase with time, but it does not after t = 0.568"):
        AffinePath(lambda x0, t: (1 - t) * x0, lambda t: t + 1.5 * torch.sin(math.pi * t))
    with pytest.raises(ValueError, match="s must return the shape of its times"):
        AffinePath(lambda x0, t: (1 - t) * x0, lambda t: t[:2])
    with pytest.raises(ValueError, match=r"mu\(x0, t\) must be x0 at t = 0, but differs by"):
        AffinePath(lambda x0, t: (1 - t) * 2 * x0, lambda t: t).sample(x0, x1, 0.5)
    with pytest.raises(ValueError, match=r"mu\(x0, t\) must be x1 \(0 for mu\) at t = 1"):
        AffinePath(lambda x0, t: (1 - 0.5 * t) * x0, lambda t: t).sample(x0, x1, 0.5)
    with pytest.raises(ValueError, match="phi.* must be x0 at t = 0, but differs by .*from the data at 0"):
        CustomPath(lambda a, b, t: t * a + (1 - t) * b).sample(x0, x1, 0.5)
    with pytest.raises(ValueError, match=r"phi\(x0, x1, t\) must return the shape of x0 \(4, 3\)"):
        CustomPath(lambda a, b, t: a[:, :1]).sample(x0, x1, 0.5)
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="t must be in 0..1"):
            LinearPath().sample(x0, x1, bad)
    with pytest.raises(ValueError, match="one for each of the 4 samples"):
        LinearPath().sample(x0, x1, torch.zeros(3))
    with pytest.raises(ValueError, match=r"x1 must have the shape of x0 \(4, 3\), got \(3, 3\)"):
        LinearPath().sample(x0, x1[:3], 0.5)
    with pytest.raises(TypeError, match="x0 must be floating-point"):
        LinearPath().sample(x0.long(), x1, 0.5)
    with pytest.raises(TypeError, match="process must be a Process"):
        ProcessPath("vp")


def test_conditional_velocity_is_the_derivative_at_the_point_and_log_density_that_of_the_prior():
    x0, x1 = samples(6, 2)
    for name in ("linear", "arc", "vp", "affine"):
        path = PATHS[name]
        t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
        x, v = path.sample(x0, x1, t)
        assert torch.allclose(path.conditional_velocity(x, x0, t), v, atol=1e-12)
        assert torch.allclose(path.conditional_log_prob(x, x0, t), density_by_change(path, x0, x1, t), atol=1e-10)


def density_by_change(path, x0, x1, t):
    """Log density of x_t by the change of variables with an automatic Jacobian."""
    rows = []
    for a, b, time in zip(x0, x1, t, strict=True):
        jacobian = torch.func.jacrev(lambda b, a=a, time=time: path.sample(a[None], b[None], float(time))[0][0])(b)
        log_p1 = torch.distributions.Normal(0.0, 1.0).log_prob(b).sum()
        rows.append(log_p1 - torch.linalg.slogdet(jacobian)[1])
    return torch.stack(rows)


def test_uniform_prior_has_its_own_density():
    path = LinearPath()
    x0 = torch.zeros(3, 2, dtype=torch.float64)
    x = torch.tensor([[0.1, 0.1], [0.49, -0.49], [0.51, 0.0]], dtype=torch.float64)
    values = path.conditional_log_prob(x, x0, 0.5, square_log_prob)
    assert torch.allclose(values[:2], torch.zeros(2, dtype=torch.float64))  # 1/4 on an area of 4, scaled by 1/2 twice
    assert values[2] == -math.inf


def square_log_prob(x):
    """The uniform density of -1..1 in every direction."""
    inside = (x.flatten(1).abs() <= 1).all(1)
    return torch.where(inside, -x[0].numel() * math.log(2), -math.inf)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("name", ["linear", "arc", "vp"])
def test_velocity_of_a_data_set_is_the_mean_over_trajectories(name, chunk):
    data, x = samples(7, 2, 2)
    path, t = PATHS[name], 0.3
    weights = torch.linspace(1, 3, 7, dtype=torch.float64)
    process = path.process
    numbers = [
        float(f(torch.tensor(t, dtype=torch.float64)))
        for f in (process.alpha, process.sigma, process.alpha_prime, process.sigma_prime)
    ]
    for own in (None, weights):
        expected = reference.dataset_velocity(
            x.numpy(), t, data.numpy(), *numbers, lambda z: -0.5 * (z**2).sum(), None if own is None else own.numpy()
        )
        got = dataset_velocity(x, t, data, path, weights=own, chunk=chunk)
        assert np.allclose(got, expected, atol=1e-12)
    times = torch.full((7,), t)
    times[0] = 0.9
    mixed = dataset_velocity(x, times.double(), data, path, chunk=chunk)
    assert torch.allclose(mixed[1:], dataset_velocity(x, float(times[1]), data, path)[1:], atol=1e-12)
    assert torch.allclose(mixed[:1], dataset_velocity(x[:1], float(times[0]), data, path), atol=1e-12)


def test_velocity_of_a_data_set_is_that_of_a_mixture_without_width():
    data, x = samples(6, 3)
    for process in (RectifiedFlow(), VP(), VE()):
        points = GaussianMixture(torch.ones(6), data, torch.zeros(6))
        got = dataset_velocity(x, 0.4, data, ProcessPath(process), chunk=4)
        assert torch.allclose(got, points.velocity(x, 0.4, process), atol=1e-10)


def test_velocity_of_far_and_near_points_stays_finite():
    data, x = samples(50, 2)
    for t, scale in ((1e-3, 1.0), (0.5, 1e4), (1e-6, 10.0)):
        v = dataset_velocity(scale * x, t, data, chunk=16)
        nearest = data[torch.cdist(scale * x, (1 - t) * data).argmin(1)]
        assert torch.isfinite(v).all()
        if t < 1e-2:
            assert torch.allclose(v, (scale * x - nearest) / t, rtol=1e-3)


def test_flow_from_a_uniform_prior_is_the_quantile_map_to_the_data():
    data, weights = column([-1.0, 2.0]), torch.tensor([1.0, 3.0], dtype=torch.float64)
    x1 = torch.cat([torch.linspace(-0.95, -0.6, 8), torch.linspace(-0.4, 0.95, 8)]).double()[:, None]

    def velocity(x, t):
        return dataset_velocity(x, t, data, weights=weights, prior_log_prob=square_log_prob)

    end = sample(velocity, RectifiedFlow(), "velocity", solver="euler", times=torch.linspace(1, 1e-2, 800), start=x1)
    assert torch.allclose(end.samples, torch.where(x1 < -0.5, -1.0, 2.0).double(), atol=0.03)


def test_velocity_of_a_data_set_refuses_bad_input():
    data, x = samples(6, 3)
    with pytest.raises(ValueError, match="t must be above the first time"):
        dataset_velocity(x, 0.0, data)
    with pytest.raises(ValueError, match=r"no trajectory from data to prior reaches x\[2\]"):
        far = x.clamp(-0.1, 0.1)
        far[2] = 50
        dataset_velocity(far, 0.9, data.clamp(-0.1, 0.1), prior_log_prob=square_log_prob, chunk=2)
    with pytest.raises(ValueError, match=r"data must be \(count, ...\) with samples of shape \(3,\)"):
        dataset_velocity(x, 0.5, data[:, :2])
    with pytest.raises(ValueError, match="weights must be 6 positive numbers"):
        dataset_velocity(x, 0.5, data, weights=torch.zeros(6))
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        dataset_velocity(x, 0.5, data, chunk=0)
    with pytest.raises(ValueError, match=r"prior_log_prob must return shape \(36,\)"):
        dataset_velocity(x, 0.5, data, prior_log_prob=lambda z: z)
    with pytest.raises(ValueError, match="x0 must have the shape of x"):
        LinearPath().conditional_velocity(x, data[:2], 0.5)


@pytest.mark.parametrize("t", [0.02, 0.1, 0.5, 0.9, 0.98])
def test_best_velocity_of_the_straight_path_is_drift_and_score(t):
    x = torch.linspace(-4, 5, 40, dtype=torch.float64)[:, None]
    process, mixture = RectifiedFlow(), line_mixture()
    by_score = process.drift(t) * x - process.diffusion_squared(t) / 2 * mixture.score(x, t, process)
    expected = column(reference.mixture_velocity(x[:, 0].numpy(), t))
    assert torch.allclose(by_score, expected, atol=1e-10, rtol=1e-10)
    assert torch.allclose(line_velocity(x, t), expected, atol=1e-10, rtol=1e-10)


def test_one_step_of_an_independent_coupling_gives_the_mean_of_the_data():
    data, x1 = samples(30, 2)
    assert torch.allclose(x1 - dataset_velocity(x1, 1.0, data), data.mean(0).expand_as(x1), atol=1e-12)
    one = sample(line_velocity, RectifiedFlow(), "velocity", solver="euler", steps=1, noise=x1[:, :1]).samples
    mean = (reference.WEIGHTS * reference.MEANS).sum()
    assert torch.allclose(one, torch.full_like(one, mean), atol=1e-12)


def test_flow_in_one_dimension_is_the_quantile_map():
    x1 = column([-3.0, -1.0, 0.0, 0.5, 1.0, 3.0])
    golden = column([-3.11287, -2.190093, -0.548443, 0.606102, 2.591079, 4.235163])
    end = sample(line_velocity, RectifiedFlow(), "velocity", solver=RK4(), steps=200, noise=x1)
    assert end.evaluations == 800
    assert torch.allclose(end.samples, golden, atol=1e-5)
    assert np.allclose(end.samples[:, 0], reference.quantile_map(x1[:, 0].numpy()), atol=3e-7)
    by_hand = reference.runge_kutta(reference.mixture_velocity, x1[:, 0].numpy(), 50)
    coarse = sample(line_velocity, RectifiedFlow(), "velocity", solver=RK4(), steps=50, noise=x1)
    assert np.allclose(coarse.samples[:, 0], by_hand, atol=1e-12)


def test_runge_kutta_has_fourth_order():
    def velocity(x, t):
        return (x.sin() + 1) * (1 + t[:, None])

    x1 = column([0.3, 1.2])
    fine = sample(velocity, RectifiedFlow(), "velocity", solver=RK4(), steps=512, noise=x1).samples
    errors = [
        float(
            (sample(velocity, RectifiedFlow(), "velocity", solver=RK4(), steps=n, noise=x1).samples - fine).abs().max()
        )
        for n in (8, 16)
    ]
    assert 14 < errors[0] / errors[1] < 19


def test_errors_of_euler_steps_are_the_known_ones():
    x1 = column(reference.gaussian_quantiles(4000))
    truth = reference.quantile_map(x1[:, 0].numpy())
    errors = []
    for steps in (1, 2, 4, 8, 16, 32):
        end = sample(line_velocity, RectifiedFlow(), "velocity", solver="euler", steps=steps, noise=x1).samples
        errors.append(float(np.abs(np.sort(end[:, 0].numpy()) - truth).mean()))
    assert errors == pytest.approx([1.753, 0.947, 0.441, 0.224, 0.114, 0.0574], rel=5e-3)


@pytest.mark.parametrize("t, floor", [(0.2, 0.00245547), (0.5, 1.79839804), (0.8, 1.47039691)])
def test_the_loss_of_the_best_model_is_its_floor(t, floor):
    nodes = torch.linspace(-12, 12, 6001, dtype=torch.float64)[:, None]
    density = torch.exp(-0.5 * nodes[:, 0] ** 2) / math.sqrt(2 * math.pi)
    data = column([-1.0, 1.0])
    times = torch.full((len(nodes),), t, dtype=torch.float64)
    total = 0.0
    for value in (-1.0, 1.0):
        x0 = torch.full_like(nodes, value)
        loss = flow_matching_loss(lambda x, t: dataset_velocity(x, t, data), x0, nodes, times)
        total += float(torch.trapezoid(loss * density, nodes[:, 0])) / 2
    assert total == pytest.approx(floor, abs=1e-8)


class Small(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.layer = nn.Linear(4, 3, dtype=dtype)

    def forward(self, x, t, shift=0.0):
        return self.layer(torch.cat([x, t[:, None].to(x.dtype)], 1)) + shift


def test_loss_of_straight_and_diffusion_paths_is_that_of_denoising():
    model, (x0, noise) = Small(), samples(5, 3)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    for process in (RectifiedFlow(), VP()):
        ours = flow_matching_loss(model, x0, noise, t, path=ProcessPath(process))
        assert torch.allclose(ours, denoising_loss(model, x0, process, "velocity", t=t, noise=noise), atol=1e-14)
    drawn = flow_matching_loss(model, x0, seed=3)
    assert torch.equal(drawn, flow_matching_loss(model, x0, seed=3))
    assert not torch.equal(drawn, flow_matching_loss(model, x0, seed=4))


def test_loss_is_the_mean_square_with_weights_and_conditions():
    model, (x0, x1) = Small(), samples(5, 3)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    loss = flow_matching_loss(model, x0, x1, t, weighting=lambda t: 1 + t, condition={"shift": 0.5})
    x = torch.stack([(1 - s) * a + s * b for s, a, b in zip(t, x0, x1, strict=True)])
    by_hand = ((model.layer(torch.cat([x, t[:, None]], 1)) + 0.5 - (x1 - x0)) ** 2).mean(1) * (1 + t)
    assert torch.allclose(loss, by_hand, atol=1e-14)
    grads = torch.autograd.grad(loss.sum(), model.layer.weight)
    assert torch.allclose(grads[0], torch.autograd.grad(by_hand.sum(), model.layer.weight)[0], atol=1e-13)


def test_loss_takes_any_rank_and_couples_within_the_batch():
    x0, x1 = samples(6, 1, 2, 3, 2, dtype=torch.float32)
    loss = flow_matching_loss(lambda x, t: torch.zeros_like(x), x0, x1, seed=0)
    assert torch.allclose(loss, (x1 - x0).square().flatten(1).mean(1), rtol=1e-5)
    coupled = flow_matching_loss(lambda x, t: torch.zeros_like(x), x0, x1, seed=0, coupling=MinibatchOT())
    assert coupled.sum() < loss.sum()


def test_loss_of_a_bfloat16_network_is_in_float32_with_exact_times():
    seen = {}

    class Half(Small):
        def forward(self, x, t):
            seen.update(x=x.dtype, t=t)
            return super().forward(x, t)

    x0, x1 = samples(4, 3, dtype=torch.float32)
    t = torch.tensor([0.001, 0.333, 0.997, 0.9999])
    loss = flow_matching_loss(Half(torch.bfloat16), x0, x1, t)
    assert loss.dtype == torch.float32 and seen["x"] == torch.bfloat16
    assert seen["t"].dtype == torch.float32 and torch.equal(seen["t"], t)
    assert torch.allclose(loss, flow_matching_loss(Small(torch.float32), x0, x1, t), rtol=2) and loss.min() > 0


def test_loss_refuses_bad_input():
    x0, x1 = samples(4, 3)
    with pytest.raises(ValueError, match="seed must be a generator or a number"):
        flow_matching_loss(Small(), x0)
    with pytest.raises(ValueError, match="either t or times"):
        flow_matching_loss(Small(), x0, x1, torch.zeros(4), times=UniformTimes())
    with pytest.raises(ValueError, match="one time for each of the 4 samples"):
        flow_matching_loss(Small(), x0, x1, torch.zeros(3))
    with pytest.raises(ValueError, match="t must be in 0..1"):
        flow_matching_loss(Small(), x0, x1, torch.full((4,), 2.0))
    with pytest.raises(ValueError, match="x0 must be .batch"):
        flow_matching_loss(Small(), x0[:, 0], seed=0)
    with pytest.raises(ValueError, match="model must return the shape of x"):
        flow_matching_loss(lambda x, t: x[:, :1], x0, x1, seed=0)
    with pytest.raises(TypeError, match="wrap it in FlowNetwork"):
        flow_matching_loss(lambda x, t: (x,), x0, x1, seed=0)
    with pytest.raises(ValueError, match="weighting must return shape"):
        flow_matching_loss(Small(), x0, x1, seed=0, weighting=lambda t: t[:2])


def test_shifted_times_go_towards_the_prior():
    process = RectifiedFlow()
    plain = LogitNormalTimes()(1000, process, torch.Generator().manual_seed(0))
    shifted = ShiftedTimes(3, LogitNormalTimes())(1000, process, torch.Generator().manual_seed(0))
    odds = (shifted / (1 - shifted)) / (plain / (1 - plain))
    assert torch.allclose(odds, torch.full_like(odds, 3.0))
    with pytest.raises(ValueError, match="shift must be above 0"):
        ShiftedTimes(0)
    with pytest.raises(ValueError, match="need a path from 0 to 1, got 0.002 to 80"):
        ShiftedTimes(3)(4, EDM())


def test_the_network_is_told_the_shifted_time():
    seen = []

    def model(x, t):
        seen.append((x, t))
        return torch.zeros_like(x)

    x0, x1 = torch.zeros(64, 1, dtype=torch.float64), torch.ones(64, 1, dtype=torch.float64)
    flow_matching_loss(model, x0, x1, times=ShiftedTimes(5), seed=0)
    assert torch.allclose(seen[0][0][:, 0], seen[0][1], atol=1e-12)  # x_t = t here
    assert seen[0][1].mean() > 0.65
