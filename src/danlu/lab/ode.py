"""Claims on the probability-flow ODE: its discretisations and its likelihood."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from danlu.diffusion.likelihood import log_likelihood
from danlu.diffusion.mixtures import GaussianMixture
from danlu.diffusion.processes import EDM, VP, Cosine, Process, RectifiedFlow, SubVP
from danlu.diffusion.solvers import sample
from danlu.lab.claim import Cell, Check, Context, Evidence, Plot, Table
from danlu.lab.runner import claim

#: Order of convergence that each solver should show.
_ORDERS = {"euler": 1, "ddim": 1, "heun": 2, "dpm2": 2, "dpm++2m": 2}
_STEPS = (16, 32, 64, 128, 256)
_FINE = 2048
_PROCESSES: dict[str, Process] = {
    "VP": VP(),
    "sub-VP": SubVP(),
    "EDM": EDM(),
    "rectified flow": RectifiedFlow(),
    "cosine": Cosine(),
}
#: A saddle, a mode, and tails down to exp(-129).
_POINTS = torch.tensor([[0.0, 0.0], [2.0, 0.0], [-1.0, 2.0], [4.0, -3.0], [-5.0, 5.0]], dtype=torch.float64)


@claim(
    name="ddim-ode",
    title="DDIM is Euler's method for the probability-flow ODE",
    source="archives 9181, 9209, 9228 and 9280; arXiv:2010.02502",
    statement="Sampling without noise follows an ODE with the marginals of the diffusion; DDIM is its first-order "
    "discretisation, and methods of higher order need fewer steps.",
    measurement="Mixture of three anisotropic Gaussians in the plane with its exact score. DDIM against a hand-written "
    "Euler loop in x / alpha and sigma / alpha; then mean distance of the endpoint from the ODE's (2,048 steps of "
    "second order) on log-uniform grids from sigma 10 to 0.01, and the slope between 128 and 256 steps.",
    budget=25,
)
def ddim_ode(context: Context) -> Evidence:
    """Identity and orders of convergence."""
    identity = max(euler_difference(process) for process in (VP(), SubVP(), EDM()))
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(context.seeds[0]), dtype=torch.float64)
    exact = endpoint("dpm2", _FINE, noise)
    runs = [(solver, steps) for solver in _ORDERS for steps in _STEPS]
    errors = {
        (solver, steps): float((endpoint(solver, steps, noise) - exact).norm(dim=1).mean())
        for solver, steps in context.track(runs, description="solvers", total=len(runs))
    }
    slopes = {solver: math.log2(errors[solver, 128] / errors[solver, 256]) for solver in _ORDERS}
    checks = [
        Check(
            "DDIM equals Euler in x / alpha, sigma / alpha to 1e-10 on three processes",
            identity < 1e-10,
            f"{identity:.1e}",
        )
    ]
    checks += [
        Check(f"{solver}: slope {order} within 0.15", abs(slopes[solver] - order) < 0.15, f"{slopes[solver]:.3f}")
        for solver, order in _ORDERS.items()
    ]
    rows: list[tuple[Cell, ...]] = [
        (solver, *[errors[solver, steps] for steps in _STEPS], slope) for solver, slope in slopes.items()
    ]
    return Evidence(
        summary=f"DDIM is Euler to {identity:.0e}; slopes "
        + ", ".join(f"{solver} {slope:.2f}" for solver, slope in slopes.items())
        + ".",
        checks=tuple(checks),
        tables=(
            Table("Mean endpoint error", ("solver", *(f"{steps} steps" for steps in _STEPS), "slope"), tuple(rows)),
        ),
        plots=(
            Plot(
                "Solvers of the probability-flow ODE",
                "steps",
                "log10 of the mean endpoint error",
                _STEPS,
                {solver: tuple(math.log10(errors[solver, steps]) for steps in _STEPS) for solver in _ORDERS},
                log_x=True,
            ),
        ),
        notes=(
            "heun and dpm2 call the model twice in a step, the others once.",
            "With alpha = 1 and the noise as time, as here, euler and ddim are the same method.",
            "dpm++2m is diffusers' scheduler, which computes in float32.",
        ),
    )


@claim(
    name="ode-likelihood",
    title="The probability-flow ODE gives exact log-likelihoods",
    source="archives 9228 and 9280; arXiv:2011.13456",
    statement="The ODE is a continuous flow: the log-likelihood of a sample is that of its noise plus the integral of "
    "the divergence, which random probes estimate without bias.",
    measurement="Exact models of a 4-D Gaussian (16 samples) and of a mixture in the plane (5 points, tails down to "
    "exp(-129)) under five processes, dopri5 at its default tolerance, the exact density at the last time as prior; "
    "error against the closed density. Then 4,096 probes on the mixture under VP.",
    budget=30,
)
def ode_likelihood(context: Context) -> Evidence:
    """Errors against closed densities."""
    mixture, data = plane_mixture(), correlated_gaussian()
    x = data.draw(16, context.seeds[0])
    rows = []
    for name, process in context.track(_PROCESSES.items(), description="processes", total=len(_PROCESSES)):
        gaussian_error, calls = density_error(data, process, x)
        mixture_error, mixture_calls = density_error(mixture, process, _POINTS)
        normal_error, _ = density_error(mixture, process, _POINTS, exact_prior=False)
        rows.append((name, gaussian_error, calls, mixture_error, mixture_calls, normal_error))
    worst, worst_mixture = (max(row[place] for row in rows) for place in (1, 3))
    probed = log_likelihood(
        mixture.denoiser(VP()),
        _POINTS,
        divergence="hutchinson",
        probes=4096,
        seed=context.seeds[0],
        rtol=1e-5,
        atol=1e-5,
        prior=lambda end: mixture.log_prob(end, 1.0, VP()),
        progress=None,
    )
    truth = mixture.log_prob(_POINTS, probed.t_min, VP())
    standard_error = torch.as_tensor(probed.standard_error)
    distances = ((probed.log_prob - truth).abs() / standard_error).tolist()
    curves = {"dopri5": tolerance_curve(mixture), "rk4": step_curve(mixture)}
    calls_of_all = sorted({calls for curve in curves.values() for calls in curve})
    return Evidence(
        summary=f"Largest error {worst:.1e} nats on the Gaussian, {worst_mixture:.1e} at five points of the mixture; "
        f"4,096 probes within {max(distances):.1f} standard errors.",
        checks=(
            Check("4-D Gaussian: every error at most 1e-3 nats", worst <= 1e-3, f"{worst:.1e}"),
            Check("mixture, five points: every error at most 1e-3 nats", worst_mixture <= 1e-3, f"{worst_mixture:.1e}"),
            Check("4,096 probes within 3 standard errors at all points", max(distances) <= 3, f"{max(distances):.2f}"),
        ),
        tables=(
            Table(
                "Largest error in nats",
                ("process", "Gaussian", "calls", "mixture", "calls", "mixture, normal prior"),
                tuple(rows),
            ),
            Table(
                "Probes on the mixture under VP",
                ("log density", "mean of 4,096 probes", "standard error", "distance in standard errors"),
                tuple(
                    zip(*(value.tolist() for value in (truth, probed.log_prob, standard_error)), distances, strict=True)
                ),
            ),
        ),
        plots=(
            Plot(
                "Error at five points under VP",
                "calls of the model",
                "log10 of the largest error in nats",
                tuple(calls_of_all),
                {name: tuple(curve.get(calls) for calls in calls_of_all) for name, curve in curves.items()},
                log_x=True,
            ),
        ),
        notes=(
            "The last column has N(0, sigma^2 I) for the noise instead of the exact density: VP, sub-VP and EDM stop "
            "before the data is gone, and far from the origin that is the larger error.",
            "Densities are those at the first time of the integral: 1e-5, or sigma 0.002 for EDM.",
        ),
    )


def plane_mixture() -> GaussianMixture:
    """Three anisotropic Gaussians in the plane."""
    return GaussianMixture(
        torch.tensor([0.3, 0.3, 0.4]),
        torch.tensor([[2.0, 0.0], [-1.0, 1.0], [0.0, -2.0]]),
        torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.05], [0.05, 0.4]], [[0.2, 0.0], [0.0, 0.1]]]),
    )


def correlated_gaussian(dimensions: int = 4) -> GaussianMixture:
    """One Gaussian with a random mean and covariance."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
    covariance = root @ root.T / dimensions + 0.1 * torch.eye(dimensions, dtype=torch.float64)
    mean = torch.randn(1, dimensions, generator=generator, dtype=torch.float64)
    return GaussianMixture(torch.ones(1), mean, covariance[None])


def endpoint(solver: str, steps: int, noise: Tensor) -> Tensor:
    """Where a solver ends on the mixture from sigma 10 to 0.01, log-uniform."""
    times = torch.logspace(1, -2, steps + 1, dtype=torch.float64)
    model = plane_mixture().denoiser(EDM())
    return sample(model, solver=solver, times=times, noise=noise, progress=None).samples


def euler_difference(process: Process, steps: int = 12) -> float:
    """Largest difference between DDIM and Euler's method in ``x / alpha`` by the exact noise."""
    mixture = plane_mixture()
    times = process.time_of(torch.linspace(-2, 3, steps + 1, dtype=torch.float64))
    x = torch.randn(32, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * process.sigma(times[0])
    ddim = sample(mixture.denoiser(process), solver="ddim", times=times, start=x, progress=None).samples
    scaled = x / process.alpha(times[0])
    for t, u in zip(times[:-1], times[1:], strict=True):
        noise = mixture.epsilon(scaled * process.alpha(t), t, process)
        scaled = scaled + (process.noise_ratio(u) - process.noise_ratio(t)) * noise
    return float((ddim - scaled * process.alpha(times[-1])).abs().max())


def density_error(
    data: GaussianMixture, process: Process, x: Tensor, exact_prior: bool = True, **options: object
) -> tuple[float, int]:
    """Largest error of the ODE's log density of x in nats, and the calls it took."""
    prior = (lambda end: data.log_prob(end, process.t_max, process)) if exact_prior else None
    out = log_likelihood(data.denoiser(process), x, prior=prior, progress=None, **options)  # type: ignore[arg-type]
    return float((out.log_prob - data.log_prob(x, out.t_min, process)).abs().max()), out.evaluations


def tolerance_curve(data: GaussianMixture) -> dict[int, float]:
    """Log10 of the largest error by calls, for dopri5 at several tolerances."""
    runs = [
        density_error(data, VP(), _POINTS, rtol=tolerance, atol=tolerance)
        for tolerance in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
    ]
    return {calls: math.log10(error) for error, calls in runs}


def step_curve(data: GaussianMixture) -> dict[int, float]:
    """Log10 of the largest error by calls, for RK4 on log-uniform times."""
    runs = [
        density_error(data, VP(), _POINTS, solver="rk4", steps=steps, spacing="logsnr") for steps in (10, 20, 40, 80)
    ]
    return {calls: math.log10(error) for error, calls in runs}
