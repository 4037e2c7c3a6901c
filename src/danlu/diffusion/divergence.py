"""The ODE of a sample together with its log density: right side, divergence, and the variable to integrate in.

Source: Scientific Spaces archives 9228 and 9280; arXiv:1810.01367 (probes).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from danlu.diffusion.targets import Denoiser, components

logger = logging.getLogger("danlu.diffusion")

#: Up to how many dimensions the divergence is exact by default.
EXACT_UP_TO = 64
#: Vector-Jacobian products that share one pass backwards.
_AT_ONCE = 64


class DensityFlow:
    """Right side of the ODE of a sample and of its log density.

    The variable of the integral is time, or ``asinh(sigma / alpha)``: like sigma near the data, like its logarithm in
    the noise. Models are smooth in it where they are not in time: near its data a VP process has the noise ``sqrt(t)``,
    whose derivative is infinite.

    Args:
        denoiser: the model with its process.
        vectors: from `probe_vectors`.
        exact: whether they are the unit vectors.
        gradient: keep the graph.
        by_ratio: integrate over ``asinh(sigma / alpha)``.
        last: last time.
    """

    def __init__(
        self, denoiser: Denoiser, vectors: Tensor, exact: bool, gradient: bool, by_ratio: bool, last: float
    ) -> None:
        self.denoiser = denoiser
        self.vectors = vectors
        self.exact = exact
        self.gradient = gradient
        self.together = True
        self.by_ratio = by_ratio
        self.last = last
        #: Time of the latest call.
        self.reached = denoiser.process.t_min
        self.watch: Callable[[float], None] = lambda time: None

    def __call__(self, place: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Derivatives by the variable of the integral, of samples and of their log densities (batch, estimates)."""
        place = place.detach().cpu().double()
        t = self.denoiser.process.time_of(-place.sinh().log()) if self.by_ratio else place
        # Only the search for a first step may look beyond the last time.
        t = t.clamp(max=self.last)
        self.reached = float(t)
        self.watch(self.reached)
        x = state[0]
        with torch.enable_grad():
            x = x if self.gradient and x.requires_grad else x.detach().requires_grad_()
            of_x, of_output = self._factors(t)
            velocity = of_output * self.denoiser.predict(x, t)
            if of_x:
                velocity = of_x * x + velocity
            if not velocity.requires_grad:
                # A model that does not look at x moves all samples alike.
                return velocity, torch.zeros_like(state[1])
            divergence = self._divergence(velocity, x)
        if not self.gradient:
            velocity, divergence = velocity.detach(), divergence.detach()
        return velocity, divergence

    def _factors(self, t: Tensor) -> tuple[float, float]:
        """Factors of x and of the prediction in the right side: a conversion that costs backward passes little."""
        kind, process = self.denoiser.prediction, self.denoiser.process
        if kind == "velocity" and not self.by_ratio:
            return 0.0, 1.0
        alpha, sigma = process.alpha(t), process.sigma(t)
        alpha_prime, sigma_prime = process.alpha_prime(t), process.sigma_prime(t)
        turn = sigma_prime * alpha - alpha_prime * sigma
        rate = alpha * (alpha**2 + sigma**2).sqrt() / turn if self.by_ratio else 1.0
        if kind == "velocity":
            return 0.0, float(rate)
        p, q = components(process, t, kind)
        delta = alpha * q - sigma * p
        return float((alpha_prime * q - sigma_prime * p) / delta * rate), float(turn / delta * rate)

    def _divergence(self, velocity: Tensor, x: Tensor) -> Tensor:
        """Trace of the Jacobian of every sample, (batch, estimates)."""
        products = [self._products(velocity, x, chunk) * chunk for chunk in self.vectors.split(_AT_ONCE)]
        traces = torch.cat([product.flatten(2).sum(2) for product in products]).mT
        return traces.sum(1, keepdim=True) if self.exact else traces

    def _products(self, velocity: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
        """Vectors times the Jacobian (vectors, batch, ...)."""
        vectors = vectors.expand(-1, *x.shape)
        more = {"retain_graph": True, "create_graph": self.gradient}
        if self.together and len(vectors) > 1:
            try:
                return torch.autograd.grad(velocity, x, vectors, is_grads_batched=True, **more)[0]
            except RuntimeError as error:
                # Some operations, such as group norms, cannot go backwards for several vectors at once.
                logger.info("one pass backwards for each vector, not for several at once: %s", error)
                self.together = False
        rows = [torch.autograd.grad(velocity, x, vector, **more)[0] for vector in vectors]
        return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def probe_vectors(
    x: Tensor, divergence: str | None, probes: int, seed: int | torch.Generator | None
) -> tuple[Tensor, bool]:
    """What the Jacobians are multiplied with (vectors, batch or 1, ...), and whether these are the unit vectors.

    Raises:
        ValueError: an unknown divergence, probes below 1 or with an exact divergence, or no seed for them.
    """
    dimensions = x[0].numel()
    if divergence not in (None, "exact", "hutchinson"):
        raise ValueError(f"divergence must be 'exact' or 'hutchinson', got {divergence!r}")
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise ValueError(f"probes must be an integer of at least 1, got {probes!r}")
    if divergence == "exact" or (divergence is None and dimensions <= EXACT_UP_TO):
        if probes != 1:
            raise ValueError("probes must not be given with exact divergences: take divergence='hutchinson'")
        unit = torch.eye(dimensions, dtype=x.dtype, device=x.device)
        return unit.reshape(dimensions, 1, *x.shape[1:]), True
    if seed is None:
        raise ValueError("give a seed: the divergence is estimated by random probes")
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    signs = torch.randint(0, 2, (probes, *x.shape), generator=generator, device=generator.device)
    return (2 * signs - 1).to(device=x.device, dtype=x.dtype), False
