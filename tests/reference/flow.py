"""Flows written out in NumPy: velocities by Bayes, quantile maps by bisection, and Runge-Kutta by hand."""

from __future__ import annotations

import math

import numpy as np

#: The one-dimensional mixture of the golden numbers.
WEIGHTS, MEANS, SPREADS = np.array([0.5, 0.3, 0.2]), np.array([-2.0, 0.5, 3.0]), np.array([0.4, 0.3, 0.5])


def normal_cdf(x):
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in np.ravel(x)]).reshape(np.shape(x))


def mixture_cdf(x):
    return sum(w * normal_cdf((x - m) / s) for w, m, s in zip(WEIGHTS, MEANS, SPREADS, strict=True))


def bisect(function, wanted, low, high):
    """Where an increasing function takes the wanted values."""
    low, high = np.full(np.shape(wanted), float(low)), np.full(np.shape(wanted), float(high))
    for _ in range(56):
        middle = (low + high) / 2
        below = function(middle) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def quantile_map(x1):
    """The increasing map that carries the standard Gaussian to the mixture."""
    return bisect(mixture_cdf, normal_cdf(np.asarray(x1, float)), -8, 8)


def gaussian_quantiles(count):
    """Centres of equal shares of the standard Gaussian."""
    return bisect(normal_cdf, (np.arange(count) + 0.5) / count, -8, 8)


def mixture_velocity(x, t, weights=WEIGHTS, means=MEANS, spreads=SPREADS):
    """``E[x1 - x0 | (1 - t) x0 + t x1 = x]`` for each x, from the joint Gaussian of every component."""
    answer = []
    for point in np.ravel(x):
        shares, values = [], []
        for w, m, s in zip(weights, means, spreads, strict=True):
            joint = np.array([[s**2, 0.0], [0.0, 1.0]])  # covariance of (x0, x1)
            row = np.array([1 - t, t])
            variance = row @ joint @ row
            offset = point - (1 - t) * m
            x0, x1 = np.array([m, 0.0]) + joint @ row / variance * offset
            shares.append(w * math.exp(-(offset**2) / (2 * variance)) / math.sqrt(variance))
            values.append(x1 - x0)
        answer.append(np.dot(shares, values) / np.sum(shares))
    return np.array(answer).reshape(np.shape(x))


def dataset_velocity(x, t, data, alpha, sigma, alpha_prime, sigma_prime, log_prior, weights=None):
    """Weighted derivatives of the trajectories from every sample through each x, with plain loops."""
    answer = np.zeros_like(x)
    for place, point in enumerate(x):
        logs, values = [], []
        for index, sample in enumerate(data):
            x1 = (point - alpha * sample) / sigma
            logs.append(log_prior(x1) + (0 if weights is None else math.log(weights[index])))
            values.append(alpha_prime * sample + sigma_prime * x1)
        logs = np.array(logs)
        shares = np.exp(logs - logs.max())
        answer[place] = np.tensordot(shares / shares.sum(), np.array(values), 1)
    return answer


def runge_kutta(velocity, x, steps):
    """From t = 1 to 0 by the classical rule."""
    h = -1 / steps
    for place in range(steps):
        t = 1 + place * h
        a = velocity(x, t)
        b = velocity(x + h / 2 * a, t + h / 2)
        c = velocity(x + h / 2 * b, t + h / 2)
        d = velocity(x + h * c, t + h)
        x = x + h * (a + 2 * b + 2 * c + d) / 6
    return x


def straight_velocity(x, t):
    """Velocity of the second rectified flow of the mixture: constant on the line from ``x1`` to its quantile."""
    x1 = bisect(lambda start: (1 - t) * quantile_map(start) + t * start, np.asarray(x, float), -7, 7)
    return x1 - quantile_map(x1)
