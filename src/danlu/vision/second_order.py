"""Fill a feature map outwards from a visible block, by a second-order system: two neighbours give the next cell."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from danlu.vision.extrapolation import Extrapolator, Walk, least_squares

__all__ = ["QuadraticExtrapolator"]


class QuadraticExtrapolator(Extrapolator):
    r"""Features beyond a block by a second-order system: two visible neighbours give the next cell.

        z_xx = P z,  z_yy = Q z:   z(x+1, y) = (2I + P) z(x, y) - z(x-1, y),   the same along y with Q

    Its solutions solve the Laplace equation ``z_xx + S z_yy = 0`` with ``S = -P Q^-1``, and S = I for Q = -P. A step
    has no direction: the same matrix leads to both sides, and each undoes the other. One plane wave is continued
    exactly, for z(x+1) + z(x-1) = 2 cos(k) z(x) whatever its phase. Starts at P = Q = 0, a straight line through the
    last two cells.

    Args:
        channels: C of the map.
        isotropic: Q = -P, so that S = I. What then waves along one axis grows or decays exponentially along the other.
        steps: ``"recursive"``: the recursion above; ``"oneshot"``: its terms up to the first order in P; ``"exp"``: the
            exact solution of the system, whose recursion has 2 cosh(sqrt(P)) in place of 2I + P.
        order: as in :class:`LinearExtrapolator`.

    Raises:
        ValueError: an unknown option; in ``forward``, a block that is one cell wide where it has to be extended.

    Departures: the source names the second-order equation and then leaves it for the first-order one. Marching its
    five-point stencil outwards is an ill-posed problem, in which the finest wave grows 5.8 times per step; here the
    equation is split by a matrix for each axis instead, as the first-order system splits it. Without a max_norm:
    bounded steps need P with eigenvalues in -4..0, and an error in the last two cells still grows linearly.

    Source: Scientific Spaces archive 9359; arXiv:2211.13228
    """

    def __init__(self, channels: int, isotropic: bool = False, steps: str = "recursive", order: str = "xy") -> None:
        super().__init__(channels, steps, order)
        self.isotropic = isotropic
        self.p = self._matrix()
        self.q = None if isotropic else self._matrix()

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"{self.channels}, isotropic={self.isotropic}, steps={self.steps!r}, order={self.order!r}"

    def _q(self) -> Tensor:
        return -self.p if self.q is None else self.q

    def _walks(self, dtype: torch.dtype) -> tuple[Walk, Walk]:
        return self._axis(self.p.to(dtype)), self._axis(self._q().to(dtype))

    def _axis(self, generator: Tensor) -> Walk:
        if self.steps == "oneshot":
            return partial(_walk_series, generator)
        eye = torch.eye(self.channels, dtype=generator.dtype, device=generator.device)
        if self.steps == "recursive":
            return partial(_walk_second_order, 2 * eye + generator)
        # exp of [[0, I], [P, 0]] has cosh(sqrt(P)) in its upper left corner, without a square root of P.
        companion = torch.cat((torch.cat((torch.zeros_like(eye), eye), 1), torch.cat((generator, 0 * eye), 1)), 0)
        return partial(_walk_second_order, 2 * torch.linalg.matrix_exp(companion)[: self.channels, : self.channels])

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.p, self._q())]

    def anisotropy(self) -> Tensor:
        """S of ``z_xx + S z_yy = 0``, (channels, channels); the identity where isotropic."""
        return -torch.linalg.solve(self._q(), self.p, left=False)

    @torch.no_grad()
    def fit(self, maps: Tensor) -> QuadraticExtrapolator:
        """Set the matrices by least squares on all runs of three cells of whole maps.

        Args:
            maps: (batch, channels, height, width) with at least 3 rows and columns.

        Returns:
            The module itself.

        Raises:
            ValueError: another number of channels, a smaller map, or ``steps="exp"``.
        """
        bends, middles = [], []
        for axis in (2, 1):
            line = self._neighbours(maps, axis)
            if len(line) < 3:
                raise ValueError(f"maps must have at least 3 rows and columns, got {tuple(maps.shape[2:])}")
            bends.append((line[2:] + line[:-2] - 2 * line[1:-1]).reshape(-1, self.channels))
            middles.append(line[1:-1].reshape(-1, self.channels))
        if self.q is None:
            self.p.copy_(least_squares(torch.cat(middles), torch.cat((bends[0], -bends[1]))))
        else:
            self.p.copy_(least_squares(middles[0], bends[0]))
            self.q.copy_(least_squares(middles[1], bends[1]))
        return self


def _last_two(cells: Tensor, axis: int, forwards: bool) -> tuple[Tensor, Tensor]:
    if cells.shape[axis] < 2:
        raise ValueError(f"block must be at least 2 cells wide where it is extended, got {tuple(cells.shape[1:3])}")
    return (
        (cells.select(axis, -2), cells.select(axis, -1)) if forwards else (cells.select(axis, 1), cells.select(axis, 0))
    )


def _walk_second_order(double: Tensor, cells: Tensor, axis: int, forwards: bool, count: int) -> list[Tensor]:
    if not count:
        return []
    before, here = _last_two(cells, axis, forwards)
    found = []
    for _ in range(count):
        before, here = here, here @ double.mT - before
        found.append(here)
    return found


def _walk_series(generator: Tensor, cells: Tensor, axis: int, forwards: bool, count: int) -> list[Tensor]:
    """The recursion up to P: U_n(I + P/2) = (n + 1) I + n(n + 1)(n + 2)/6 P + ..., U_n of Chebyshev's second kind."""
    if not count:
        return []
    before, here = _last_two(cells, axis, forwards)
    bend_before, bend_here = before @ generator.mT, here @ generator.mT
    found = []
    for n in range(1, count + 1):
        line = (n + 1) * here - n * before
        found.append(line + n * (n + 1) / 6 * ((n + 2) * bend_here - (n - 1) * bend_before))
    return found
