"""The low-rank change of a set of weights: its factors, what gradients mean for them, and how weights follow them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from danlu.optim.low_rank_schemes import SCHEMES, Factors, Product
from danlu.optim.low_rank_sites import Layout, Site, check_weight


class LowRankChange:
    """Weights that are W0 plus a low-rank change, written into the weights themselves.

    Args:
        rank: r, at least 1.
        alpha: s = alpha / rank.
        scheme: name of a family in ``SCHEMES``.
        resync: "exact" or "incremental".
        resync_every: with "incremental", steps from one writing from W0 to the next, or none.
        restart_every: steps from one restart to the next; None is never, and every step for a scheme that says so.
        seed: of the factors and of stochastic rounding.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        rank: int,
        alpha: float,
        scheme: str,
        resync: str,
        resync_every: int | None,
        restart_every: int | None,
        seed: int,
    ):
        if scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
        if resync not in ("exact", "incremental"):
            raise ValueError(f"resync must be 'exact' or 'incremental', got {resync!r}")
        for name, value in (("rank", rank), ("resync_every", resync_every), ("restart_every", restart_every)):
            if (value is not None or name == "rank") and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if not alpha > 0:
            raise ValueError(f"alpha must be positive, got {alpha}")
        if resync_every and resync == "exact":
            raise ValueError("resync_every must be None for resync='exact', which writes from W0 at every step")
        self.scheme, self.exact, self.resync_every = SCHEMES[scheme], resync == "exact", resync_every
        if restart_every and not self.scheme.restarts:
            raise ValueError(
                f"restart_every must be None for scheme={scheme!r}, got {restart_every}: the same family would start "
                "again, which reaches nothing new"
            )
        self.restart_every = restart_every or (1 if self.scheme.redraws_every_step else None)
        self.rank, self.alpha, self.seed = rank, alpha, seed
        self.restarts = 0
        self.detached = False
        self._sites: dict[Tensor, Site] = {}

    @property
    def sites(self) -> tuple[Site, ...]:
        """All trained matrices, in the order in which they came."""
        return tuple(self._sites.values())

    def __contains__(self, weight: Tensor) -> bool:
        return weight in self._sites

    def __getitem__(self, weight: Tensor) -> Site:
        return self._sites[weight]

    def check(self, sites: Sequence[Site]) -> None:
        """Refuse weights that cannot be changed so, see ``check_weight``, and two parameters over one memory."""
        places = {site.weight.data_ptr(): site.name for site in self.sites}
        for site in sites:
            check_weight(site, self.rank)
            other = places.setdefault(site.weight.data_ptr(), site.name)
            if other != site.name:
                raise ValueError(
                    f"{site.name} must not share memory with {other}, which is another parameter: each would overwrite "
                    "the other's change; tie them by one nn.Parameter"
                )
            out, inp = site.shape[-2:]
            self.scheme.check(out, inp, self.rank, site.name)

    def adopt(self, sites: Sequence[Site]) -> None:
        """Give new sites their factors, and keep their W0 where that is wanted."""
        for site in sites:
            site.scale, site.index = self.alpha / self.rank, len(self._sites)
            self._start(site)
            if self.exact:
                site.kept = site.weight.detach().clone()
            elif self.resync_every:
                site.kept = site.weight.detach().to("cpu", copy=True)
            self._sites[site.weight] = site

    def _start(self, site: Site) -> None:
        """Fresh factors, the same in every process; the parameters stay the same objects."""
        generator = torch.Generator().manual_seed(self._draw(site, "start", self.restarts))
        drawn = self.scheme.start(site.shape, self.rank, generator, site.layout is Layout.EMBEDDING)
        (A, B), site.fixed = (Factors(*(x.to(site.weight.device, site.wide) for x in pair)) for pair in drawn)
        if site.weight in self._sites:
            site.A.data, site.B.data = A, B
        else:
            site.A, site.B = nn.Parameter(A), nn.Parameter(B)

    def _draw(self, site: Site, purpose: str, count: int) -> int:
        return random.Random(f"{self.seed}/{site.index}/{purpose}/{count}").getrandbits(63)

    @torch.no_grad()
    def project(self, weight: Tensor, gradient: Tensor) -> None:
        """Add the projections of one full gradient to the gradients of the factors."""
        site = self._sites[weight]
        if gradient.is_sparse:
            raise TypeError(f"the gradient of {site.name} must be dense, got a sparse one; build it with sparse=False")
        P, Q = self.scheme.frames(site.factors, site.fixed)
        gA, gB = torch.zeros_like(site.A), torch.empty_like(site.B)
        for rows in site.rows():
            G = site.matrix(gradient, rows)
            gA += P[..., rows, :].mT @ G
            gB[..., rows, :] = G @ Q.mT
        for factor, projected in ((site.A, gA), (site.B, gB)):
            projected *= site.scale
            factor.grad = projected if factor.grad is None else factor.grad.add_(projected)

    def drop_gradients(self) -> None:
        """Forget all projections."""
        for site in self.sites:
            site.A.grad = site.B.grad = None

    def snapshot(self) -> dict[Site, Factors]:
        """The factors that the weights are at, where the next writing needs them."""
        if self.exact:
            return {}
        return {site: Factors(*(factor.clone() for factor in site.factors)) for site in self.sites}

    def write(self, before: Mapping[Site, Factors], step: int, whole: bool = False) -> None:
        """Bring weights whose factors had gradients to the factors: from W0, or from the factors they are at.

        Args:
            before: what the weights are at, from ``snapshot``.
            step: seeds stochastic rounding.
            whole: write all weights, from W0.
        """
        for site in self.sites:
            moved = site.A.grad is not None or site.B.grad is not None
            if whole or (moved and self.exact):
                site.add(site.weight, site.kept, self.scheme.delta(site.factors, site.fixed))
            elif moved:
                change = self.scheme.increment(before[site], site.factors, site.fixed)
                site.add(site.weight, site.weight, change, self._draw(site, "round", step))

    def restart(self) -> None:
        """The change so far becomes part of W0, and fresh factors start."""
        self.restarts += 1
        for site in self.sites:
            if self.exact and site.kept is not None:
                # Not W, which is rounded to nearest: small changes would be lost at every restart.
                change = self.scheme.delta(site.factors, site.fixed)
                site.add(site.kept, site.kept, change, self._draw(site, "restart", self.restarts))
                site.weight.data.copy_(site.kept)
            elif site.kept is not None:
                site.kept.copy_(site.weight.detach())
            self._start(site)

    def delta(self, name: str) -> Tensor:
        """The change of one weight, see ``LowRankOptimizer.delta``."""
        for site in self.sites:
            if any(name in (use.name, use.module_name) for use in site.uses):
                left, right = self.scheme.delta(site.factors, site.fixed)
                return site.unmatrix(site.scale * left @ right)
        raise ValueError(f"name must be one of {', '.join(site.name for site in self.sites)}, got {name!r}")

    def detach(self) -> None:
        """Give the weights their values W0."""
        for site in self.sites:
            if site.kept is None and site.weight.element_size() == 2:
                raise ValueError(
                    f"resync must be 'exact', or resync_every set, to detach the change of {site.name}: no W0 is kept, "
                    f"and weights in {site.weight.dtype} do not tell it"
                )
        if self.detached:
            return
        for site in self.sites:
            if site.kept is None:
                left, right = self.scheme.delta(site.factors, site.fixed)
                site.add(site.weight, site.weight, Product(-left, right))
            else:
                site.weight.data.copy_(site.kept)
        self.detached = True

    def attach(self) -> None:
        """Bring weights that are at W0 to W0 plus the change."""
        for site in self.sites:
            source = site.weight if site.kept is None else site.kept
            seed = None if self.exact else self._draw(site, "attach", 0)
            site.add(site.weight, source, self.scheme.delta(site.factors, site.fixed), seed)
        self.detached = False

    def follow(self) -> None:
        """The model was moved: factors and W0 go where their weights are."""
        for site in self.sites:
            device = site.weight.device
            site.A.data, site.B.data = site.A.data.to(device), site.B.data.to(device)
            site.fixed = Factors(*(factor.to(device) for factor in site.fixed))
            if self.exact and site.kept is not None:
                site.kept = site.kept.to(device)

    def nbytes(self) -> dict[str, int]:
        """Bytes of the factors, of what is fixed, and of the copies of W0."""
        kinds: dict[str, list[Any]] = {
            "factors": [factor for site in self.sites for factor in (site.A, site.B)],
            "fixed factors": [factor for site in self.sites for factor in site.fixed],
            "copies of W0": [site.kept for site in self.sites if site.kept is not None],
        }
        return {kind: sum(tensor.nbytes for tensor in tensors) for kind, tensors in kinds.items()}
