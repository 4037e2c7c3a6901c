"""Gaussian mixtures under a diffusion process: density, score, denoiser and velocity in closed form.

They are the ground truth that solvers, likelihoods and trained models are compared with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from danlu.diffusion.process import Process, Time, per_sample
from danlu.diffusion.targets import Denoiser


class GaussianMixture:
    """A mixture of Gaussians, at any time of a process.

    Args:
        weights: of the components (components,), positive; normalised here.
        means: (components, dimensions).
        covariances: (components, dimensions, dimensions), or variances (components, dimensions), or one variance for
            each component (components,); positive (semi)definite.
        dtype: of everything computed.

    Raises:
        ValueError: shapes that do not fit, weights that are not positive, variances below 0.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor, dtype: torch.dtype = torch.float64) -> None:
        weights, means, covariances = (torch.as_tensor(value, dtype=dtype) for value in (weights, means, covariances))
        if means.dim() != 2 or weights.shape != means.shape[:1]:
            raise ValueError(
                "weights must be (components,) and means (components, dimensions), got shapes "
                f"{tuple(weights.shape)} and {tuple(means.shape)}"
            )
        if not bool((weights > 0).all()):
            raise ValueError(f"weights must be positive, got {weights.tolist()}")
        count, self.dimensions = means.shape
        if covariances.shape not in ((count,), (count, self.dimensions), (count, self.dimensions, self.dimensions)):
            raise ValueError(
                f"covariances must be ({count},), ({count}, {self.dimensions}) or ({count}, {self.dimensions}, "
                f"{self.dimensions}), got {tuple(covariances.shape)}"
            )
        self.log_weights = (weights / weights.sum()).log()
        self.means = means
        self.axes: Tensor | None = None
        if covariances.dim() == 3:
            covariances, self.axes = torch.linalg.eigh(covariances)
        self.variances = covariances if covariances.dim() == 2 else covariances[:, None].expand(means.shape)
        if bool((self.variances < -1e-12 * self.variances.abs().max()).any()):
            raise ValueError(f"covariances must not have negative eigenvalues, got {float(self.variances.min()):g}")
        self.variances = self.variances.clamp_min(0)

    def draw(self, count: int, seed: int | torch.Generator) -> Tensor:
        """Draw samples of the data.

        Args:
            count: how many.
            seed: a seed or a generator on the CPU.

        Returns:
            Samples (count, dimensions).
        """
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        chosen = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=generator)
        noise = torch.randn(count, self.dimensions, generator=generator, dtype=self.means.dtype)
        return self.means[chosen] + self._turned_back(self.variances[chosen].sqrt() * noise, chosen)

    def log_prob(self, x: Tensor, t: Time, process: Process) -> Tensor:
        """Log density of ``x`` (batch, dimensions) at time ``t`` in nats: (batch,)."""
        log_joint, _, _ = self._parts(x, t, process)
        return log_joint.logsumexp(1)

    def denoise(self, x: Tensor, t: Time, process: Process) -> Tensor:
        """Posterior mean ``E[x_0 | x_t = x]``: (batch, dimensions)."""
        log_joint, whitened, _ = self._parts(x, t, process)
        alpha = per_sample(process.alpha(t), x)
        pulled = self._turned_back(
            alpha[..., None] * self.variances * whitened if alpha.dim() else alpha * self.variances * whitened
        )
        return (log_joint.softmax(1)[..., None] * (self.means + pulled)).sum(1)

    def score(self, x: Tensor, t: Time, process: Process) -> Tensor:
        """Gradient of the log density at ``x``: (batch, dimensions)."""
        log_joint, whitened, _ = self._parts(x, t, process)
        return -(log_joint.softmax(1)[..., None] * self._turned_back(whitened)).sum(1)

    def epsilon(self, x: Tensor, t: Time, process: Process) -> Tensor:
        """Expected noise in ``x``: (batch, dimensions)."""
        return -per_sample(process.sigma(t), x) * self.score(x, t, process)

    def velocity(self, x: Tensor, t: Time, process: Process) -> Tensor:
        """Right side of the probability-flow ODE at ``x``: (batch, dimensions)."""
        alpha_prime, sigma_prime = per_sample(process.alpha_prime(t), x), per_sample(process.sigma_prime(t), x)
        return alpha_prime * self.denoise(x, t, process) + sigma_prime * self.epsilon(x, t, process)

    def posterior_variance(self, x: Tensor, t: Time, process: Process) -> Tensor:
        """Trace of ``Cov(x_0 | x_t = x)``: (batch,). It is what no model can predict."""
        log_joint, whitened, variances = self._parts(x, t, process)
        alpha, sigma = per_sample(process.alpha(t), x), per_sample(process.sigma(t), x)
        if alpha.dim():
            alpha, sigma = alpha[..., None], sigma[..., None]
        means = self.means + self._turned_back(alpha * self.variances * whitened)
        inside = (self.variances * sigma**2 / variances).sum(-1)
        share = log_joint.softmax(1)
        mean = (share[..., None] * means).sum(1, keepdim=True)
        return (share * (inside + (means - mean).square().sum(-1))).sum(1)

    def denoiser(self, process: Process) -> Denoiser:
        """The exact model of this mixture under a process; it predicts the data."""
        return Denoiser(lambda x, t: self.denoise(x, t, process), process, "sample")

    def _parts(self, x: Tensor, t: Time, process: Process) -> tuple[Tensor, Tensor, Tensor]:
        """Log joint (batch, components); offset over variance, and variance, in each component's own axes."""
        if x.dim() != 2 or x.shape[1] != self.dimensions:
            raise ValueError(f"x must be (batch, {self.dimensions}), got {tuple(x.shape)}")
        alpha, sigma = per_sample(process.alpha(t), x), per_sample(process.sigma(t), x)
        if alpha.dim():
            alpha, sigma = alpha[..., None], sigma[..., None]
        offset = x[:, None] - alpha * self.means
        if self.axes is not None:
            offset = torch.einsum("bkd,kde->bke", offset, self.axes)
        variances = alpha**2 * self.variances + sigma**2
        whitened = offset / variances
        log_density = -0.5 * (whitened * offset + variances.log() + math.log(2 * math.pi)).sum(-1)
        return self.log_weights + log_density, whitened, variances

    def _turned_back(self, values: Tensor, chosen: Tensor | None = None) -> Tensor:
        """From each component's own axes to the common ones."""
        if self.axes is None:
            return values
        if chosen is not None:
            return torch.einsum("be,bde->bd", values, self.axes[chosen])
        return torch.einsum("bke,kde->bkd", values, self.axes)
