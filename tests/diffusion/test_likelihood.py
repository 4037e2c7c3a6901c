"""Likelihoods by the probability-flow ODE: against closed densities, NumPy and one hand-made step."""

import math

import numpy
import pytest
import torch

from danlu.diffusion.likelihood import bits_per_dim, log_likelihood
from danlu.diffusion.mixtures import GaussianMixture
from danlu.diffusion.processes import EDM, VE, VP, Cosine, RectifiedFlow, SubVP
from danlu.diffusion.targets import Denoiser
from reference import solvers as reference

pytest.importorskip("torchdiffeq")

PROCESSES = (VP(), SubVP(), VE(), EDM(), RectifiedFlow(), Cosine())
names = [type(process).__name__ for process in PROCESSES]
MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.3, 0.4]),
    torch.tensor([[2.0, 0.0], [-1.0, 1.0], [0.0, -2.0]]),
    torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.05], [0.05, 0.4]], [[0.2, 0.0], [0.0, 0.1]]]),
)
#: A mode, a saddle, and tails down to exp(-129).
POINTS = torch.tensor([[0.0, 0.0], [2.0, 0.0], [-1.0, 2.0], [4.0, -3.0], [-5.0, 5.0]], dtype=torch.float64)


def drawn(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian(dimensions: int = 4) -> GaussianMixture:
    root = drawn(dimensions, dimensions)
    covariance = root @ root.T / dimensions + 0.1 * torch.eye(dimensions, dtype=torch.float64)
    return GaussianMixture(torch.ones(1), drawn(1, dimensions, seed=1), covariance[None])


class Net(torch.nn.Module):
    """A small network whose Jacobian is not symmetric."""

    def __init__(self, dimensions: int = 3):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.first = torch.nn.Parameter(torch.randn(dimensions, 16, generator=generator, dtype=torch.float64))
        self.last = torch.nn.Parameter(torch.randn(16, dimensions, generator=generator, dtype=torch.float64) / 4)

    def forward(self, x, t):
        return torch.tanh(x @ self.first + t[:, None]) @ self.last


# Closed densities.


@pytest.mark.parametrize("process", PROCESSES, ids=names)
def test_gaussian_in_four_dimensions(process):
    data = gaussian()
    x = data.draw(8, 3)
    out = log_likelihood(
        data.denoiser(process), x, prior=lambda end: data.log_prob(end, process.t_max, process), progress=None
    )
    assert torch.allclose(out.log_prob, data.log_prob(x, out.t_min, process), rtol=0, atol=1e-4)
    assert out.standard_error is None and out.latents.shape == x.shape


@pytest.mark.parametrize("process", PROCESSES, ids=names)
def test_mixture_at_five_points_and_in_the_tails(process):
    out = log_likelihood(
        MIXTURE.denoiser(process), POINTS, prior=lambda end: MIXTURE.log_prob(end, process.t_max, process)
    )
    assert torch.allclose(out.log_prob, MIXTURE.log_prob(POINTS, out.t_min, process), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("process", "bias"), [(RectifiedFlow(), 1e-3), (Cosine(), 1e-3), (EDM(), 0.1), (VP(), 0.1)], ids=lambda v: str(v)
)
def test_normal_prior_is_exact_where_no_data_is_left(process, bias):
    out = log_likelihood(MIXTURE.denoiser(process), POINTS)
    assert torch.allclose(out.log_prob, MIXTURE.log_prob(POINTS, out.t_min, process), rtol=0, atol=bias)


def test_density_is_that_of_the_first_time():
    for process, expected in ((VP(), 1e-5), (EDM(), 0.002), (VE(), 0.0), (EDM(0.1, 80.0), 0.1)):
        assert log_likelihood(MIXTURE.denoiser(process), POINTS[:1], rtol=1e-2).t_min == pytest.approx(expected)
    points = POINTS[:4]
    out = log_likelihood(MIXTURE.denoiser(RectifiedFlow()), points, start=0.1)
    assert out.t_min == 0.1
    assert torch.allclose(out.log_prob, MIXTURE.log_prob(points, 0.1, RectifiedFlow()), rtol=0, atol=1e-3)
    assert float((out.log_prob - MIXTURE.log_prob(points, 0.0, RectifiedFlow())).abs().max()) > 0.1


def test_density_of_a_subspace_of_time_ends_at_a_given_prior():
    out = log_likelihood(
        MIXTURE.denoiser(VP()), POINTS, start=0.2, end=0.6, prior=lambda end: MIXTURE.log_prob(end, 0.6, VP())
    )
    assert torch.allclose(out.log_prob, MIXTURE.log_prob(POINTS, 0.2, VP()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", ["dopri8", "bosh3", "rk4", "heun3"])
def test_other_solvers(solver):
    fixed = dict(steps=40, spacing="logsnr") if solver in ("rk4", "heun3") else {}
    out = log_likelihood(
        MIXTURE.denoiser(VP()), POINTS[:3], solver=solver, prior=lambda end: MIXTURE.log_prob(end, 1.0, VP()), **fixed
    )
    assert torch.allclose(out.log_prob, MIXTURE.log_prob(POINTS[:3], 1e-5, VP()), rtol=0, atol=2e-3)
    if solver == "rk4":
        assert out.evaluations == 160


# A network, against NumPy.


@pytest.mark.parametrize("prediction", ["velocity", "epsilon"])
def test_network_against_a_loop_over_single_samples(prediction):
    net, process = Net(), VP()
    x = drawn(1, 3, seed=5)
    out = log_likelihood(net, x, process, prediction, start=0.2, rtol=1e-8, atol=1e-8)
    denoiser = Denoiser(net, process, prediction)

    def velocity(point, t):
        with torch.no_grad():
            return denoiser.velocity(torch.from_numpy(point)[None], t)[0].numpy()

    scale = float(process.sigma(1.0))

    def prior(point):
        return float(-0.5 * (point**2).sum() / scale**2 - 3 * math.log(scale * math.sqrt(2 * math.pi)))

    times = numpy.linspace(0.2, 1, 41)
    for row, value in zip(x.numpy(), out.log_prob, strict=True):
        assert abs(reference.log_likelihood(velocity, row, times, prior) - float(value)) < 1e-5


# One step by hand.


def test_two_euler_steps_with_the_same_probes():
    net, process = Net(), RectifiedFlow()
    x = drawn(4, 3, seed=5)
    options = dict(solver="euler", steps=2, start=0.2, end=1.0)
    exact = log_likelihood(net, x, process, "velocity", **options)
    one = log_likelihood(net, x, process, "velocity", divergence="hutchinson", seed=9, **options)
    many = log_likelihood(net, x, process, "velocity", divergence="hutchinson", probes=3, seed=9, **options)
    signs = 2.0 * torch.randint(0, 2, (3, 4, 3), generator=torch.Generator().manual_seed(9)).double() - 1
    first = 2.0 * torch.randint(0, 2, (1, 4, 3), generator=torch.Generator().manual_seed(9)).double() - 1
    state, trace, estimate, single = x, 0.0, 0.0, 0.0
    for t in (0.2, 0.6):
        times = torch.full((4,), t, dtype=torch.float64)
        jacobian = torch.func.vmap(torch.func.jacrev(lambda point, time: net(point[None], time[None])[0]))(state, times)
        trace = trace + 0.4 * jacobian.diagonal(dim1=1, dim2=2).sum(1)
        estimate = estimate + 0.4 * torch.einsum("pbi,bij,pbj->bp", signs, jacobian, signs)
        single = single + 0.4 * torch.einsum("pbi,bij,pbj->bp", first, jacobian, first)
        state = state + 0.4 * net(state, times)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(state).sum(1)
    assert torch.allclose(exact.log_prob, prior + trace, rtol=0, atol=1e-9)
    assert torch.allclose(exact.latents, state, rtol=0, atol=1e-9)
    assert torch.allclose(one.log_prob, prior + single[:, 0], rtol=0, atol=1e-9) and one.standard_error is None
    assert torch.allclose(many.log_prob, prior + estimate.mean(1), rtol=0, atol=1e-9)
    assert torch.allclose(many.standard_error, estimate.std(1) / 3**0.5, rtol=0, atol=1e-9)
    assert exact.evaluations == one.evaluations == 2


def test_probes_agree_with_the_exact_divergence_within_their_error():
    options = dict(start=0.05, solver="rk4", steps=12, spacing="uniform")
    net, x = Net(), drawn(3, 3, seed=5)
    exact = log_likelihood(net, x, VP(), "velocity", **options)
    out = log_likelihood(net, x, VP(), "velocity", divergence="hutchinson", probes=400, seed=1, **options)
    assert bool((out.standard_error > 1e-3).all())
    assert bool(((out.log_prob - exact.log_prob).abs() < 3 * out.standard_error).all())


def test_many_dimensions_take_probes_by_default():
    x = drawn(2, 65, seed=5, dtype=torch.float32)
    with pytest.raises(ValueError, match="give a seed: the divergence is estimated"):
        log_likelihood(lambda x, t: 0.3 * x, x, EDM(), "sample")
    out = log_likelihood(lambda x, t: 0.3 * x, x, EDM(), "sample", probes=2, seed=0)
    assert out.standard_error is not None and out.log_prob.dtype == torch.float32
    # The Jacobian is a multiple of one: every probe is exact.
    exact = log_likelihood(lambda x, t: 0.3 * x, x, EDM(), "sample", divergence="exact")
    assert torch.allclose(out.log_prob, exact.log_prob, rtol=1e-4)


# The batch.


def test_batch_mates_change_a_result_within_the_tolerance_only():
    process, saddle = VP(), POINTS[:1]
    crowd = torch.cat([saddle, MIXTURE.draw(1023, 1)])
    truth = MIXTURE.log_prob(saddle, 1e-5, process)
    options = dict(rtol=1e-5, atol=1e-5, prior=lambda end: MIXTURE.log_prob(end, 1.0, process))
    for batch in (saddle, crowd):
        # An error norm over the whole batch gives 6e-3 in the crowd.
        assert float((log_likelihood(MIXTURE.denoiser(process), batch, **options).log_prob[:1] - truth).abs()) < 1e-3


def test_no_call_is_beyond_the_last_time():
    times = []

    def slow(x, t):
        times.append(float(t.max()))
        return 1e-4 * x

    log_likelihood(slow, POINTS, RectifiedFlow(), "velocity", end=0.9)
    log_likelihood(slow, POINTS, VP(), "velocity", end=0.9)
    assert max(times) <= 0.9


def test_evaluations_are_the_real_calls():
    calls = []

    def model(x, t):
        calls.append(float(t[0]))
        return MIXTURE.denoise(x, t, VP())

    out = log_likelihood(model, POINTS, VP(), "sample")
    assert out.evaluations == len(calls)
    assert min(calls) == pytest.approx(1e-5) and max(calls) == pytest.approx(1.0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(context):
    net = Net()
    expected = log_likelihood(net, drawn(2, 3), VP(), "velocity", start=0.1).log_prob
    with context():
        out = log_likelihood(net, drawn(2, 3), VP(), "velocity", start=0.1)
    assert torch.equal(out.log_prob, expected) and not out.log_prob.requires_grad


def test_gradient_by_data_and_weights():
    net = Net()
    options = dict(solver="rk4", steps=3, spacing="uniform", start=0.1)
    assert torch.autograd.gradcheck(
        lambda x: log_likelihood(net, x, VP(), "velocity", gradient=True, **options).log_prob,
        (drawn(2, 3, seed=5).requires_grad_(),),
    )
    x = drawn(2, 3, seed=5)
    log_likelihood(net, x, VP(), "velocity", gradient=True, **options).log_prob.sum().backward()
    step = torch.zeros_like(net.first)
    step[1, 2] = 1e-5
    with torch.no_grad():
        net.first += step
        up = log_likelihood(net, x, VP(), "velocity", **options).log_prob.sum()
        net.first -= 2 * step
        down = log_likelihood(net, x, VP(), "velocity", **options).log_prob.sum()
    assert float(net.first.grad[1, 2]) == pytest.approx(float(up - down) / 2e-5, rel=1e-5)


def test_gradient_of_a_gaussian_is_its_score():
    data, process = gaussian(2), RectifiedFlow()
    x = data.draw(3, 1).requires_grad_()
    log_likelihood(data.denoiser(process), x, gradient=True).log_prob.sum().backward()
    assert torch.allclose(x.grad, data.score(x.detach(), 1e-5, process), rtol=0, atol=5e-3)


# Hosts and types.


def unet() -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=4,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()

    class Host(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = model

        def forward(self, x, t):
            return self.unet(x, 999 * t).sample

    return Host()


def test_diffusers_unet():
    model, x = unet(), drawn(2, 1, 4, 4, dtype=torch.float32)
    options = dict(solver="euler", steps=1, start=0.3, spacing="uniform")
    exact = log_likelihood(model, x, VP(), "epsilon", **options)
    probed = log_likelihood(model, x, VP(), "epsilon", divergence="hutchinson", probes=24, seed=0, **options)
    assert exact.log_prob.dtype == torch.float32 and exact.latents.shape == x.shape
    assert bool(((probed.log_prob - exact.log_prob).abs() < 4 * probed.standard_error).all())
    # One step by hand, with finite differences of the velocity.
    denoiser = Denoiser(model, VP(), "epsilon")
    with torch.no_grad():
        steps = 1e-2 * torch.eye(16).reshape(16, 1, 4, 4)
        ends = [denoiser.velocity(x[:1] + sign * steps, 0.3) for sign in (1, -1)]
        trace = (ends[0] - ends[1]).flatten(1).diagonal().sum() / 2e-2
        latent = x[:1] + 0.7 * denoiser.velocity(x[:1], 0.3)
    scale = float(VP().sigma(1.0))
    expected = torch.distributions.Normal(0.0, scale).log_prob(latent).sum() + 0.7 * trace
    assert float(exact.log_prob[0]) == pytest.approx(float(expected), abs=1e-2)


def test_bfloat16_module():
    model, x = unet(), drawn(2, 1, 4, 4, dtype=torch.float32)
    options = dict(solver="euler", steps=1, start=0.3, spacing="uniform", divergence="hutchinson", seed=0)
    full = log_likelihood(model, x, VP(), "epsilon", **options)
    half = log_likelihood(model.to(torch.bfloat16), x, VP(), "epsilon", **options)
    assert half.log_prob.dtype == half.latents.dtype == torch.float32
    assert torch.allclose(half.log_prob, full.log_prob, atol=0.5)


def test_float32_samples():
    data, process = gaussian(), RectifiedFlow()
    x = data.draw(8, 3)
    out = log_likelihood(data.denoiser(process), x.float())
    assert out.log_prob.dtype == torch.float32
    assert torch.allclose(out.log_prob.double(), data.log_prob(x, 1e-5, process), rtol=0, atol=1e-3)


def test_a_model_that_ignores_its_input():
    shift = torch.tensor([1.0, -2.0], dtype=torch.float64)
    out = log_likelihood(lambda x, t: shift.expand_as(x), POINTS, RectifiedFlow(), "velocity", start=0.0)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(POINTS + shift).sum(1)
    assert torch.allclose(out.log_prob, expected.double(), rtol=0, atol=1e-6)


# Errors.


def test_a_model_that_breaks_is_named_by_its_time():
    def model(x, t):
        return torch.where(t[:, None] > 0.5, math.inf, x)

    with pytest.raises(FloatingPointError, match="output of call .* is not finite in 5 of 5 samples, t = "):
        log_likelihood(model, POINTS, VP(), "velocity")
    with pytest.raises(FloatingPointError, match="no step is small enough at t = "):
        log_likelihood(lambda x, t: x**2, 10 + POINTS**2, RectifiedFlow(), "velocity", rtol=1e-2, atol=1e-2)


def test_bad_arguments():
    denoiser = MIXTURE.denoiser(VP())
    for arguments, message in (
        (dict(solver="rk45"), "solver must be one of dopri5, "),
        (dict(solver="rk4"), "give steps"),
        (dict(steps=4), "steps and spacing must not be given: 'dopri5' chooses"),
        (dict(divergence="trace"), "divergence must be 'exact' or 'hutchinson'"),
        (dict(probes=2), "probes must not be given with exact"),
        (dict(probes=0), "probes must be an integer of at least 1"),
        (dict(rtol=0), "rtol and atol must be above 0"),
        (dict(start=2.0), "start and end must be in 0..1 for VP"),
        (dict(prior=lambda end: end), r"prior must return shape \(5,\)"),
        (dict(process=VP()), "must not be given with a Denoiser"),
    ):
        with pytest.raises(ValueError, match=message):
            log_likelihood(denoiser, POINTS, **arguments)
    with pytest.raises(ValueError, match="kind 'epsilon' determines nothing where alpha is 0"):
        log_likelihood(lambda x, t: x, POINTS, RectifiedFlow(), "epsilon")
    with pytest.raises(ValueError, match="x must be finite"):
        log_likelihood(denoiser, POINTS * math.nan)
    with pytest.raises(ValueError, match=r"x must be \(batch, ...\)"):
        log_likelihood(denoiser, POINTS[:, 0])
    with pytest.raises(TypeError, match="x must be a floating point tensor, got torch.int64"):
        log_likelihood(denoiser, torch.ones(2, 2, dtype=torch.long))


# Bits.


def test_bits_per_dim_of_uniform_bytes_is_eight():
    # Uniform on -1..1 in 12 dimensions: density 2^-12.
    assert bits_per_dim(torch.tensor([-12 * math.log(2)]), 12).item() == pytest.approx(8)
    assert bits_per_dim(torch.zeros(1), 12, low=0, high=1).item() == pytest.approx(8)
    assert bits_per_dim(torch.zeros(1), 64, levels=17, low=0, high=1).item() == pytest.approx(math.log2(17))
    assert bits_per_dim(torch.tensor([-30.0]), 10).item() == pytest.approx(3 / math.log(2) + 7)
    for arguments, message in (
        (dict(dimensions=0), "dimensions must be at least 1"),
        (dict(dimensions=2, levels=1), "levels at least 2"),
        (dict(dimensions=2, low=1.0), "high must be above low"),
    ):
        with pytest.raises(ValueError, match=message):
            bits_per_dim(torch.zeros(1), **arguments)
