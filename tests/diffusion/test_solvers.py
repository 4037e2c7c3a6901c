"""Solvers: the formulas against NumPy, the identities between them, their orders, and what they ask of the model."""

import math

import numpy
import pytest
import torch

from danlu.diffusion.mixtures import GaussianMixture
from danlu.diffusion.multistep import IPNDM, HostScheduler
from danlu.diffusion.processes import EDM, VE, VP, Cosine, RectifiedFlow, SubVP
from danlu.diffusion.solvers import SOLVERS, endpoint_error, find_solver, sample
from danlu.diffusion.steps import DDIM, Euler, EulerMaruyama, Heun, Midpoint
from danlu.diffusion.targets import Denoiser, convert
from reference import solvers as reference

MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.3, 0.4]),
    torch.tensor([[2.0, 0.0], [-1.0, 1.0], [0.0, -2.0]]),
    torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.05], [0.05, 0.4]], [[0.2, 0.0], [0.0, 0.1]]]),
)
PROCESSES = (VP(), SubVP(), VE(), EDM(), RectifiedFlow(), Cosine())
names = [type(process).__name__ for process in PROCESSES]
DETERMINISTIC = [name for name in SOLVERS if name not in ("ancestral", "euler-maruyama")]


def drawn(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inner_times(process, count: int = 7) -> torch.Tensor:
    """Uneven times inside a process, where no coefficient is 0 or infinite."""
    width = process.t_max - process.t_min
    places = torch.linspace(0.9, 0.05, count, dtype=torch.float64) ** 1.3
    return process.t_min + width * places


def edm_denoise(x: numpy.ndarray, sigma: float) -> numpy.ndarray:
    return MIXTURE.denoise(torch.from_numpy(x), float(sigma), EDM()).numpy()


SIGMAS = torch.tensor([10.0, 6.0, 3.1, 1.4, 0.9, 0.3, 0.1, 0.01], dtype=torch.float64)


def on_edm(solver, steps: torch.Tensor = SIGMAS) -> tuple[torch.Tensor, numpy.ndarray]:
    start = 10 * drawn(5, 2)
    return sample(MIXTURE.denoiser(EDM()), solver=solver, times=steps, start=start).samples, start.numpy()


# Formulas.


@pytest.mark.parametrize("process", PROCESSES, ids=names)
def test_ddim_is_euler_in_the_ratio_coordinates(process):
    times = inner_times(process)
    start = drawn(4, 2) * process.sigma(times[0])
    out = sample(MIXTURE.denoiser(process), solver=DDIM(), times=times, start=start).samples

    def eps(x, place):
        return MIXTURE.epsilon(torch.from_numpy(x), times[place], process).numpy()

    expected = reference.euler_ratio(eps, start.numpy(), process.alpha(times).numpy(), process.sigma(times).numpy())
    assert numpy.abs(out.numpy() - expected).max() < 1e-10


@pytest.mark.parametrize("process", PROCESSES, ids=names)
def test_full_noise_ddim_draws_from_the_bayes_posterior(process):
    times = inner_times(process, 2)
    start = drawn(3, 2, seed=3)
    out = sample(MIXTURE.denoiser(process), solver="ancestral", times=times, start=start, seed=7).samples
    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    data = MIXTURE.denoise(start, times[0], process)
    alphas, sigmas = process.alpha(times), process.sigma(times)
    mean, variance = reference.posterior(start, data, alphas[0], sigmas[0], alphas[1], sigmas[1])
    assert torch.allclose(out, mean + variance.sqrt() * noise, rtol=0, atol=1e-10)


def test_between_ddim_and_ancestral_the_variance_is_the_papers():
    process, times = SubVP(), inner_times(SubVP(), 2)
    start, zero = drawn(3, 2, seed=3), torch.zeros(3, 2, dtype=torch.float64)
    (a_t, a_s), (s_t, s_s) = process.alpha(times), process.sigma(times)
    model = Denoiser(lambda x, t: zero, process, "sample")
    out = sample(model, solver=DDIM(eta=0.4), times=times, start=start, seed=7).samples
    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    share = 0.4 * s_s / s_t * (s_t**2 - (a_t / a_s) ** 2 * s_s**2).sqrt()
    assert torch.allclose(out, (s_s**2 - share**2).sqrt() * start / s_t + share * noise, rtol=0, atol=1e-10)


def test_euler_moves_by_the_velocity_in_the_process_time():
    process, times = VP(), inner_times(VP(), 3)
    x = start = drawn(4, 2)
    for t, u in ((times[0], times[1]), (times[1], times[2])):
        beta = 0.1 + 19.9 * t
        x = x + (u - t) * (-0.5 * beta * x - 0.5 * beta * MIXTURE.score(x, t, process))
    out = sample(MIXTURE.denoiser(process), solver="euler", times=times, start=start).samples
    assert torch.allclose(out, x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.7])
def test_euler_maruyama_is_the_family_with_the_same_marginals(scale):
    process, times = VP(), inner_times(VP(), 2)
    t, u = times
    start = drawn(4, 2)
    beta = 0.1 + 19.9 * t
    score = MIXTURE.score(start, t, process)
    drift = -0.5 * beta * start - (beta + scale**2 * beta) / 2 * score
    noise = torch.randn(4, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = start + (u - t) * drift + (scale**2 * beta * (t - u)).sqrt() * noise
    out = sample(MIXTURE.denoiser(process), solver=EulerMaruyama(scale), times=times, start=start, seed=5).samples
    assert torch.allclose(out, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("r", [0.5, 0.3, 0.8])
def test_midpoint_is_dpm_solver_2(r):
    out, start = on_edm(Midpoint(r))
    assert numpy.abs(out.numpy() - reference.dpm_solver_2(edm_denoise, start, SIGMAS.numpy(), r)).max() < 1e-10


def test_heun_is_edms_algorithm_and_the_midpoint_solver_at_the_end():
    out, start = on_edm("heun")
    assert numpy.abs(out.numpy() - reference.edm_heun(edm_denoise, start, SIGMAS.numpy())).max() < 1e-10
    assert torch.equal(out, on_edm(Midpoint(r=1.0))[0])


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_is_adams_bashforth_on_the_noise(order):
    out, start = on_edm(IPNDM(order))
    assert numpy.abs(out.numpy() - reference.ipndm(edm_denoise, start, SIGMAS.numpy(), order)).max() < 1e-10
    if order == 1:
        assert torch.allclose(out, on_edm("ddim")[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm2", "ipndm", "dpm++2m", "dpm++3m", "unipc"])
def test_ratio_solvers_give_every_process_the_same_samples(solver):
    results = []
    for process in (EDM(), VP(), SubVP(), VE(), Cosine()):
        times = process.time_of(-SIGMAS.log())
        start = process.alpha(times[0]) * 10 * drawn(5, 2)
        out = sample(MIXTURE.denoiser(process), solver=solver, times=times, start=start).samples
        results.append(out / process.alpha(times[-1]))
    tolerance = 2e-5 if solver.startswith("dpm+") else 1e-9
    for other in results[1:]:
        assert torch.allclose(results[0], other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("process", PROCESSES, ids=names)
@pytest.mark.parametrize("kind", ["epsilon", "v", "score", "velocity"])
def test_every_prediction_gives_the_same_samples(process, kind):
    times = inner_times(process, 5)

    def model(x, t):
        return convert(MIXTURE.denoise(x, t, process), x, t, process, "sample", kind)

    for solver in ("euler", "ddim", "heun", "ipndm"):
        options = dict(solver=solver, times=times, noise=drawn(3, 2))
        expected = sample(MIXTURE.denoiser(process), **options).samples
        assert torch.allclose(sample(model, process, kind, **options).samples, expected, rtol=0, atol=1e-9)


# Variance of linear solvers on Gaussian data, in closed form.

RECURSIONS = [
    (EulerMaruyama(1.0), 0.25390419),
    (EulerMaruyama(0.5**0.5), 0.25156059),
    (Euler(), 0.24791134),
    (DDIM(), 0.23635582),
    (DDIM(eta=1), 0.21944583),
]


@pytest.mark.parametrize(("solver", "expected"), RECURSIONS, ids=lambda value: str(value))
def test_variance_on_gaussian_data_follows_the_closed_recursion(solver, expected):
    process = VP()
    gaussian = GaussianMixture(torch.ones(1), torch.zeros(1, 1), torch.full((1, 1), 0.25))
    times = torch.linspace(1, 1e-3, 101, dtype=torch.float64)
    denoiser, one, variance = gaussian.denoiser(process), torch.ones(1, 1, dtype=torch.float64), 1.0
    noise = float(torch.randn(1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    for place in range(100):
        # A step is x -> a x + b z: two runs with the same known z give a and b.
        options = dict(solver=solver, times=times[place : place + 2], seed=1, progress=None)
        b_noise = float(sample(denoiser, start=0 * one, **options).samples)
        a = float(sample(denoiser, start=one, **options).samples) - b_noise
        variance = a * a * variance + (b_noise / noise) ** 2
    assert abs(variance - expected) < 1e-7


# Orders of convergence.


def slope(solver, coarse: int = 128) -> float:
    errors = []
    start = 10 * drawn(32, 2)
    denoiser = MIXTURE.denoiser(EDM())
    exact = sample(denoiser, solver="dpm2", times=log_grid(2048), start=start, progress=None).samples
    for steps in (coarse, 2 * coarse):
        out = sample(denoiser, solver=solver, times=log_grid(steps), start=start, progress=None).samples
        errors.append(float((out - exact).norm(dim=1).mean()))
    return math.log2(errors[0] / errors[1])


def log_grid(steps: int) -> torch.Tensor:
    grid = torch.logspace(1, -2, steps + 1, dtype=torch.float64)
    grid[0], grid[-1] = 10.0, 0.01
    return grid


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "order"),
    [("euler", 1), ("ddim", 1), ("heun", 2), ("dpm2", 2), (Midpoint(0.3), 2), ("dpm++2m", 2), (IPNDM(2), 2)],
    ids=str,
)
def test_order_of_convergence(solver, order):
    assert abs(slope(solver) - order) < 0.15


# diffusers.


def test_diffusers_ddim_scheduler_is_reproduced():
    diffusers = pytest.importorskip("diffusers")
    host = diffusers.DDIMScheduler(num_train_timesteps=1000, clip_sample=False, set_alpha_to_one=False)
    host.set_timesteps(10)
    table = host.alphas_cumprod.double()

    class Table(VP):
        """The scheduler's own table, at its whole steps."""

        def log_alpha(self, t):
            return 0.5 * table[(torch.as_tensor(t) * 1000).round().long()].log()

    def network(x, t):
        level = table[(t * 1000).round().long()][:, None].float()
        return (1 - level).sqrt() * x + 0.1 * level.sqrt() * torch.sin(3 * x)

    start = drawn(4, 6, dtype=torch.float32)
    x = start
    for t in host.timesteps:
        x = host.step(network(x, (t / 1000).expand(4)), t, x).prev_sample
    # With ``set_alpha_to_one`` off the scheduler's last step stays at its place, and nothing moves in it.
    times = host.timesteps.double() / 1000
    out = sample(network, Table(), "epsilon", solver="ddim", times=times, start=start).samples
    assert torch.allclose(out, x, rtol=0, atol=1e-6)


NATIVE = [
    ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"solver_order": 2, "solver_type": "heun"}),
    ("UniPCMultistepScheduler", {"solver_order": 2}),
    ("UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh1"}),
]


@pytest.mark.parametrize(("kind", "options"), NATIVE, ids=str)
@pytest.mark.parametrize("steps", [6, 20])
def test_host_scheduler_gives_what_diffusers_gives_natively(kind, options, steps):
    """A VP run of diffusers by its own loop, own coordinates and own sigmas, with predicted noise."""
    diffusers = pytest.importorskip("diffusers")
    host = getattr(diffusers, kind)(final_sigmas_type="sigma_min", **options)
    host.set_timesteps(steps)
    sigmas = host.sigmas.double()
    start = drawn(4, 3, dtype=torch.float32)
    host_model = GaussianMixture(torch.tensor([0.4, 0.6]), drawn(2, 3, seed=4), torch.tensor([0.2, 0.5]))
    x = start
    for place, t in enumerate(host.timesteps):
        ratio = float(sigmas[place])
        level = EDM().sigma(ratio)
        eps = host_model.epsilon(x.double() * (1 + ratio**2) ** 0.5, level, EDM()).float()
        x = host.step(eps, t, x).prev_sample
    process = VP(0.1, 25.0)
    times = process.time_of(-sigmas.log())
    out = sample(
        lambda y, t: host_model.denoise(y, t, process).to(y.dtype),
        process,
        "sample",
        solver=HostScheduler(kind, options),
        times=times,
        start=start,
    )
    assert out.evaluations == steps
    assert torch.allclose(out.samples, x, rtol=0, atol=2e-5)


def test_host_dpm_plus_plus_is_the_papers_formula():
    out, start = on_edm(HostScheduler(options={"lower_order_final": False}))
    assert numpy.abs(out.numpy() - reference.dpm_plus_plus_2m(edm_denoise, start, SIGMAS.numpy())).max() < 2e-5


def test_host_scheduler_refuses_what_it_cannot_run():
    with pytest.raises(ValueError, match="scheduler must be one of DPMSolverMultistepScheduler"):
        HostScheduler("PNDMScheduler")
    with pytest.raises(ValueError, match="options must not hold 'prediction_type'"):
        HostScheduler(options={"prediction_type": "epsilon"})
    with pytest.raises(ValueError, match="options must be options of UniPCMultistepScheduler, got colour"):
        on_edm(HostScheduler("UniPCMultistepScheduler", {"colour": 1}))


def test_stochastic_host_scheduler_takes_the_seed():
    solver = HostScheduler(options={"algorithm_type": "sde-dpmsolver++"})
    options = dict(solver=solver, steps=5, noise=drawn(4, 2))
    first, again, other = (sample(MIXTURE.denoiser(VP()), seed=seed, **options).samples for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


# The ends, where alpha or sigma is 0.


@pytest.mark.parametrize("process", [RectifiedFlow(), Cosine()], ids=["RectifiedFlow", "Cosine"])
@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "euler-maruyama"])
@pytest.mark.parametrize("kind", ["v", "sample", "velocity"])
def test_runs_from_pure_noise_to_pure_data(process, solver, kind):
    def model(x, t):
        data = MIXTURE.denoise(x, t, process)
        noise = (x - process.alpha(t)[:, None] * data) / process.sigma(t)[:, None]
        p, q = {
            "v": (-process.sigma(t), process.alpha(t)),
            "sample": (torch.ones_like(t), torch.zeros_like(t)),
            "velocity": (process.alpha_prime(t), process.sigma_prime(t)),
        }[kind]
        return p[:, None] * data + q[:, None] * noise

    out = sample(model, process, kind, solver=solver, steps=12, noise=drawn(400, 2), seed=1, denoise=True)
    calls = 2 * 12 - 2 if find_solver(solver).calls == 2 else 12
    assert out.evaluations == calls
    assert float(out.times[0]) == 1.0 and float(out.times[-1]) == 0.0
    expected = MIXTURE.draw(4000, 5)
    assert torch.allclose(out.samples.mean(0), expected.mean(0), atol=0.2)
    assert torch.allclose(out.samples.std(0), expected.std(0), atol=0.15)


def test_noise_prediction_at_pure_noise_is_refused():
    with pytest.raises(ValueError, match="kind 'epsilon' determines nothing where alpha is 0"):
        sample(lambda x, t: x, RectifiedFlow(), "epsilon", steps=4, noise=drawn(2, 2))


def test_the_sde_that_is_infinite_is_refused():
    with pytest.raises(ValueError, match="times must not hold 1 for EulerMaruyama"):
        sample(MIXTURE.denoiser(RectifiedFlow()), solver="euler-maruyama", steps=4, noise=drawn(2, 2), seed=0)


# The run.


class Counting:
    """A model that counts its calls."""

    def __init__(self, process):
        self.process, self.calls, self.times = process, 0, []

    def __call__(self, x, t):
        assert t.shape == x.shape[:1] and t.dtype == x.dtype
        self.calls += 1
        self.times.append(float(t[0]))
        return MIXTURE.denoise(x, t, self.process).to(x.dtype)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("denoise", [False, True])
def test_evaluations_are_the_real_calls(solver, denoise):
    model = Counting(VP())
    out = sample(model, VP(), "sample", solver=solver, steps=5, shape=(3, 2), seed=0, denoise=denoise)
    assert out.evaluations == model.calls == 5 * find_solver(solver).calls + denoise
    assert out.samples.shape == (3, 2) and out.samples.dtype == torch.float32
    if denoise:
        assert model.times[-1] == pytest.approx(1e-3)


def test_analytic_first_step_saves_a_call_and_is_exact_for_unit_data():
    gaussian = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1, 2))
    for process in PROCESSES:
        for solver in ("ddim", "euler", "dpm2", "unipc"):
            options = dict(solver=solver, steps=4, noise=drawn(3, 2))
            plain = sample(Denoiser(lambda x, t, p=process: gaussian.denoise(x, t, p), process, "sample"), **options)
            saved = sample(
                Denoiser(lambda x, t, p=process: gaussian.denoise(x, t, p), process, "sample"),
                analytic_first=True,
                **options,
            )
            assert saved.evaluations == plain.evaluations - 1
            assert torch.allclose(saved.samples, plain.samples, rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_a_sample_does_not_depend_on_its_batch_mates(solver):
    noise = drawn(5, 2)
    denoiser = MIXTURE.denoiser(VP())
    together = sample(denoiser, solver=solver, steps=6, noise=noise).samples
    alone = torch.cat([sample(denoiser, solver=solver, steps=6, noise=row[None]).samples for row in noise])
    assert torch.allclose(together, alone, rtol=0, atol=1e-6 if solver.startswith("dpm+") else 1e-12)


def test_any_rank_of_tensors():
    noise = drawn(2, 3, 4, 5, dtype=torch.float32)
    for solver in SOLVERS:
        out = sample(lambda x, t: 0.3 * x, EDM(), "sample", solver=solver, steps=4, noise=noise, seed=0)
        assert out.samples.shape == noise.shape
    flat = sample(lambda x, t: 0.3 * x, EDM(), "sample", solver="unipc", steps=4, noise=noise.flatten(1)).samples
    whole = sample(lambda x, t: 0.3 * x, EDM(), "sample", solver="unipc", steps=4, noise=noise).samples
    assert torch.allclose(flat, whole.flatten(1), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_half_precision_module_keeps_the_state_in_float32(dtype):
    seen = {}

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, x, t):
            seen["x"], seen["t"] = x.dtype, t.dtype
            return self.layer(x)

    torch.manual_seed(0)
    net = Net()
    full = sample(net, VP(), "v", steps=8, noise=drawn(4, 2)).samples
    out = sample(net.to(dtype), VP(), "v", steps=8, noise=drawn(4, 2, dtype=torch.float32)).samples
    assert (seen["x"], seen["t"], out.dtype) == (dtype, torch.float32, torch.float32)
    assert full.dtype == torch.float64 and not out.requires_grad
    assert torch.allclose(out.double(), full, atol=0.05)


def test_trajectory_callback_and_start():
    seen = []
    out = sample(
        MIXTURE.denoiser(EDM()),
        solver="heun",
        steps=4,
        noise=drawn(3, 2),
        trajectory=True,
        callback=lambda step, time, x: seen.append((step, time, x)),
    )
    assert out.trajectory.shape == (5, 3, 2)
    assert torch.equal(out.trajectory[0], 80 * drawn(3, 2)) and torch.equal(out.trajectory[-1], out.samples)
    assert [step for step, _, _ in seen] == [1, 2, 3, 4]
    assert [time for _, time, _ in seen] == out.times[1:].tolist()
    half = sample(MIXTURE.denoiser(EDM()), solver="heun", times=out.times[2:], start=out.trajectory[2])
    assert torch.equal(half.samples, out.samples)


def test_gradient_runs_through_the_solver():
    noise = drawn(2, 2).requires_grad_()
    denoiser = MIXTURE.denoiser(VP())
    assert torch.autograd.gradcheck(
        lambda n: sample(denoiser, solver="heun", steps=3, noise=n, gradient=True, progress=None).samples, (noise,)
    )
    assert not sample(denoiser, steps=3, noise=noise).samples.requires_grad


def test_seeds():
    denoiser = MIXTURE.denoiser(VP())
    first, again, other = (
        sample(denoiser, solver="ancestral", steps=4, shape=(3, 2), seed=seed).samples
        for seed in (3, torch.Generator().manual_seed(3), 4)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(ValueError, match="give a seed: this solver draws noise"):
        sample(denoiser, solver="ancestral", steps=4, noise=drawn(2, 2))
    with pytest.raises(ValueError, match="give a seed, or the noise itself"):
        sample(denoiser, steps=4, shape=(2, 2))


def test_a_model_that_breaks_is_named_by_step_and_time():
    def model(x, t):
        out = torch.zeros_like(x)
        if float(t[0]) < 0.6:
            out[1] = math.nan
        return out

    times = torch.tensor([1.0, 0.75, 0.5, 0.25])
    with pytest.raises(
        FloatingPointError, match=r"model's output of call 3 is not finite in 1 of 4 samples at step 3 of 3, t = 0.5"
    ):
        sample(model, VP(), "sample", times=times, noise=drawn(4, 2))
    with pytest.raises(FloatingPointError, match="the sample is not finite in 2 of 2 samples at step 1 of 2"):
        sample(
            lambda x, t: 3e38 * torch.ones_like(x),
            EDM(),
            "velocity",
            solver="euler",
            steps=2,
            noise=drawn(2, 2).float(),
        )
    with pytest.raises(TypeError, match="model must return a tensor, got tuple: wrap it"):
        sample(lambda x, t: (x,), VP(), steps=2, noise=drawn(2, 2))
    with pytest.raises(ValueError, match=r"model must return the shape of its input \(2, 2\), got \(2, 1\)"):
        sample(lambda x, t: x[:, :1], VP(), "velocity", solver="euler", steps=2, noise=drawn(2, 2))


def test_bad_arguments():
    denoiser = MIXTURE.denoiser(VP())
    noise = drawn(2, 2)
    for arguments, message in (
        (dict(noise=noise), "give either steps or times"),
        (dict(steps=2, times=torch.tensor([1.0, 0.5]), noise=noise), "give either steps or times"),
        (dict(times=torch.tensor([1.0, 0.5]), spacing="logsnr", noise=noise), "spacing goes with steps"),
        (dict(times=torch.tensor([0.5, 1.0]), noise=noise), "times must descend strictly"),
        (dict(steps=2), "give exactly one of shape, noise and start"),
        (dict(steps=2, shape=(2, 2), noise=noise, seed=0), "give exactly one of shape, noise and start"),
        (dict(steps=2, shape=(2, 0), seed=0), "shape must be"),
        (dict(steps=2, noise=noise[:, 0]), r"noise must be \(batch, ...\)"),
        (dict(steps=2, noise=noise, solver="rk45"), "solver must be one of ddim, "),
        (dict(steps=2, noise=noise, prediction="v"), "must not be given with a Denoiser"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(denoiser, **arguments)
    with pytest.raises(ValueError, match="give the process"):
        sample(lambda x, t: x, steps=2, noise=noise)
    with pytest.raises(TypeError, match="solver must be a name or a Solver"):
        sample(denoiser, steps=2, noise=noise, solver=DDIM)
    with pytest.raises(TypeError, match="noise must be a floating point tensor, got torch.int64"):
        sample(denoiser, steps=2, noise=torch.ones(2, 2, dtype=torch.long))
    for make, message in (
        (lambda: DDIM(eta=1.5), "eta must be in 0..1"),
        (lambda: EulerMaruyama(-1), "noise_scale must be"),
        (lambda: Midpoint(0), "r must be above 0"),
        (lambda: IPNDM(5), "order must be in 1..4"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_endpoint_error_counts_and_measures():
    denoiser = MIXTURE.denoiser(EDM())
    noise = drawn(20, 2)
    exact = sample(denoiser, solver="dpm2", steps=300, spacing="logsnr", noise=noise, progress=None).samples
    errors = endpoint_error(denoiser, {"a": "ddim", "b": Heun()}, (1, 10, 41), noise, exact, spacing="logsnr")
    assert set(errors["a"]) == {1, 10, 41} and set(errors["b"]) == {10, 40}
    out = sample(denoiser, solver="heun", steps=5, spacing="logsnr", noise=noise).samples
    assert errors["b"][10] == pytest.approx(float((out - exact).norm(dim=1).mean()))
    assert errors["a"][41] < errors["a"][10] and errors["b"][40] < errors["a"][41]
    with pytest.raises(ValueError, match="reference must have the shape of noise"):
        endpoint_error(denoiser, {"a": "ddim"}, (3,), noise, exact[:3])
    with pytest.raises(ValueError, match="evaluations must be at least 1"):
        endpoint_error(denoiser, {"a": "ddim"}, (0,), noise, exact)
