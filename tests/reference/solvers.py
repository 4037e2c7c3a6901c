"""Diffusion solvers written out in NumPy, in the coordinates of their papers. Shares no code with danlu."""

from __future__ import annotations

import numpy


def euler_ratio(eps, x, alphas, sigmas):
    """Euler for d(x / alpha) = eps d(sigma / alpha); ``eps(x, place)``."""
    for i in range(len(alphas) - 1):
        scaled = x / alphas[i] + (sigmas[i + 1] / alphas[i + 1] - sigmas[i] / alphas[i]) * eps(x, i)
        x = alphas[i + 1] * scaled
    return x


def posterior(x, data, alpha_t, sigma_t, alpha_s, sigma_s):
    """Mean and variance of q(x_s | x_t, x_0) for s < t, by multiplying the two Gaussian densities."""
    ratio = alpha_t / alpha_s
    step_variance = sigma_t**2 - ratio**2 * sigma_s**2
    precision = ratio**2 / step_variance + 1 / sigma_s**2
    mean = (ratio * x / step_variance + alpha_s * data / sigma_s**2) / precision
    return mean, 1 / precision


def edm_heun(denoise, x, sigmas):
    """Algorithm 1 of arXiv:2206.00364 without churn; ``denoise(x, sigma)``."""
    for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        slope = (x - denoise(x, now)) / now
        moved = x + (then - now) * slope
        if then > 0:
            moved = x + (then - now) * (slope + (moved - denoise(moved, then)) / then) / 2
        x = moved
    return x


def dpm_solver_2(denoise, x, sigmas, r=0.5):
    """DPM-Solver-2 on alpha = 1 with its middle at place r of the log signal-to-noise ratio."""
    for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        middle = numpy.exp(r * numpy.log(then) + (1 - r) * numpy.log(now))
        slope = (x - denoise(x, now)) / now
        half = x + (middle - now) * slope
        slope_middle = (half - denoise(half, middle)) / middle
        x = x + (then - now) * (slope_middle / (2 * r) + (1 - 1 / (2 * r)) * slope)
    return x


def ipndm(denoise, x, sigmas, order=4):
    """iPNDM as published for alpha = 1: coefficients of equal steps, lower orders first."""
    slopes: list = []
    for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        slopes.append((x - denoise(x, now)) / now)
        available = min(order, len(slopes))
        if available == 1:
            direction = slopes[-1]
        elif available == 2:
            direction = (3 * slopes[-1] - slopes[-2]) / 2
        elif available == 3:
            direction = (23 * slopes[-1] - 16 * slopes[-2] + 5 * slopes[-3]) / 12
        else:
            direction = (55 * slopes[-1] - 59 * slopes[-2] + 37 * slopes[-3] - 9 * slopes[-4]) / 24
        x = x + (then - now) * direction
    return x


def dpm_plus_plus_2m(denoise, x, sigmas):
    """DPM-Solver++(2M), midpoint form, on alpha = 1 without a lower-order last step."""
    previous = step_before = None
    for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        step = numpy.log(now / then)
        data = denoise(x, now)
        used = data if previous is None else data + (data - previous) * step / (2 * step_before)
        x = then / now * x + (1 - numpy.exp(-step)) * used
        previous, step_before = data, step
    return x


def log_likelihood(velocity, x, times, log_prior, shift=1e-5):
    """Log density of one sample by RK4, the divergence by central differences; ``velocity(x, t)``."""

    def slope(state, t):
        point, divergence = state[:-1], 0.0
        for axis in range(len(point)):
            step = numpy.zeros_like(point)
            step[axis] = shift
            divergence += (velocity(point + step, t) - velocity(point - step, t))[axis] / (2 * shift)
        return numpy.append(velocity(point, t), divergence)

    state = numpy.append(x, 0.0)
    for t, u in zip(times[:-1], times[1:], strict=True):
        h = u - t
        a = slope(state, t)
        b = slope(state + h / 2 * a, t + h / 2)
        c = slope(state + h / 2 * b, t + h / 2)
        state = state + h / 6 * (a + 2 * b + 2 * c + slope(state + h * c, u))
    return log_prior(state[:-1]) + state[-1]
