"""Low-rank families of a weight change: how a full gradient maps to the factors, and the factors to the weight.

A weight is read as (out, in); A is (rank, in), B is (out, rank), as in PEFT. Each change is a product of a tall and a
wide matrix, so that one routine writes them all, and each gradient of the factors is one product from the left and one
from the right with a pair of frames P (out, rank) and Q (rank, in):

    dL/dA = s P^T G,    dL/dB = s G Q^T

Leading dimensions (experts of a bank) are carried along.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """The trained pair: A (..., rank, in), B (..., out, rank)."""

    A: Tensor
    B: Tensor


class Product(NamedTuple):
    """left @ right: (..., out, k) times (..., k, in)."""

    left: Tensor
    right: Tensor


class LoRA:
    """W = W0 + s B A with B = 0 at the start: the change has rank at most r.

    Source: Scientific Spaces archive 9590; arXiv:2106.09685.
    """

    name = "lora"
    # Whether a restart reaches changes that the family cannot.
    restarts = True
    redraws_every_step = False

    def check(self, out: int, inp: int, rank: int, name: str) -> None:
        """Refuse a shape that the family cannot have."""

    def start(self, shape: torch.Size, rank: int, generator: torch.Generator, lookup: bool) -> tuple[Factors, Factors]:
        """The factors before the first step, and what stays fixed.

        Args:
            shape: (..., out, in) of the matrix.
            rank: r.
            generator: of the random factors, on the CPU.
            lookup: the weight is an embedding, whose A is the zero factor in PEFT.

        Returns:
            float32 factors on the CPU, and the fixed pair, which may be empty tensors.
        """
        *banks, out, inp = shape
        A, B = torch.zeros(*banks, rank, inp), torch.zeros(*banks, out, rank)
        if lookup:
            B.normal_(generator=generator)
        else:
            A.uniform_(-1 / math.sqrt(inp), 1 / math.sqrt(inp), generator=generator)
        return Factors(A, B), Factors(torch.empty(0), torch.empty(0))

    def frames(self, now: Factors, fixed: Factors) -> Product:
        """P and Q of the projection, from the factors of the forward pass that made the gradient."""
        return Product(now.B, now.A)

    def delta(self, now: Factors, fixed: Factors) -> Product:
        """The change since the start, without s."""
        return Product(now.B, now.A)

    def increment(self, old: Factors, now: Factors, fixed: Factors) -> Product:
        """The change from one pair of factors to the next, from their differences: products would cancel."""
        return Product(torch.cat((now.B - old.B, old.B), -1), torch.cat((now.A, now.A - old.A), -2))

    def export(self, now: Factors, fixed: Factors) -> Factors:
        """The same change as the product of a LoRA pair, of the smallest rank that always holds it."""
        return Factors(now.A, now.B)


class SymmetricLoRA(LoRA):
    """W = W0 - s B0 A0 + s B A with both factors random at the start: the change has rank at most 2 r."""

    name = "lora_symmetric"

    def start(self, shape: torch.Size, rank: int, generator: torch.Generator, lookup: bool) -> tuple[Factors, Factors]:
        """Both factors as PyTorch initialises linear maps; the fixed pair is a copy."""
        *banks, out, inp = shape
        A = torch.empty(*banks, rank, inp).uniform_(-1 / math.sqrt(inp), 1 / math.sqrt(inp), generator=generator)
        B = torch.empty(*banks, out, rank).uniform_(-1 / math.sqrt(rank), 1 / math.sqrt(rank), generator=generator)
        return Factors(A, B), Factors(A.clone(), B.clone())

    def delta(self, now: Factors, fixed: Factors) -> Product:
        """The increment from the start."""
        return self.increment(fixed, now, fixed)

    def export(self, now: Factors, fixed: Factors) -> Factors:
        """A pair of rank 2 r: [A; A0] and [B, -B0]."""
        return Factors(torch.cat((now.A, fixed.A), -2), torch.cat((now.B, -fixed.B), -1))


class RandomProjection(LoRA):
    """W = W0 + s (U A + B V) with U and V Gaussian, entries of variance 1/r, and A = B = 0 at the start.

    With U and V drawn anew every step and plain SGD a step is -lr s^2 (U U^T G + G V^T V), on average -2 lr s^2 G.
    The average is over draws: a single step has a noise of about (out + in)/r times its signal.

    Source: Scientific Spaces archive 9590, for r = 1; arXiv:2402.03293 is later work on the view. Departure: the pair
    may be kept for several steps, within which the base optimiser has moments.
    """

    name = "random"
    redraws_every_step = True

    def start(self, shape: torch.Size, rank: int, generator: torch.Generator, lookup: bool) -> tuple[Factors, Factors]:
        """Zero factors; the fixed pair holds V in the place of A and U in the place of B."""
        *banks, out, inp = shape
        V = torch.empty(*banks, rank, inp).normal_(0, 1 / math.sqrt(rank), generator=generator)
        U = torch.empty(*banks, out, rank).normal_(0, 1 / math.sqrt(rank), generator=generator)
        return Factors(torch.zeros_like(V), torch.zeros_like(U)), Factors(V, U)

    def frames(self, now: Factors, fixed: Factors) -> Product:
        """U and V."""
        return Product(fixed.B, fixed.A)

    def delta(self, now: Factors, fixed: Factors) -> Product:
        """[U, B] @ [A; V]."""
        U, V = self.frames(now, fixed)
        return Product(torch.cat((U, now.B), -1), torch.cat((now.A, V), -2))

    def increment(self, old: Factors, now: Factors, fixed: Factors) -> Product:
        """The family is linear: the increment is the change of the difference."""
        return self.delta(Factors(now.A - old.A, now.B - old.B), fixed)

    def export(self, now: Factors, fixed: Factors) -> Factors:
        """A pair of rank 2 r."""
        left, right = self.delta(now, fixed)
        return Factors(right, left)


class Additive(RandomProjection):
    """W[o, i] = W0[o, i] + s (A[o mod r, i] + B[o, i mod r]): rank up to 2 r, where r divides both sizes.

    The same as ``RandomProjection`` with identity matrices stacked in U and V. Moving a periodic r x r matrix from A to
    B changes nothing, so the family has r(out + in) - r^2 dimensions. PEFT's MiSS is the B half alone.

    Source: Scientific Spaces archive 9590.
    """

    name = "additive"
    restarts = False
    redraws_every_step = False

    def check(self, out: int, inp: int, rank: int, name: str) -> None:
        """Refuse a rank that does not divide both sizes."""
        if out % rank or inp % rank:
            raise ValueError(
                f"rank must divide both sizes of {name} {(out, inp)} for scheme='additive', got {rank}; choose a "
                f"divisor of {math.gcd(out, inp)}, or leave the matrix out with target_modules"
            )

    def start(self, shape: torch.Size, rank: int, generator: torch.Generator, lookup: bool) -> tuple[Factors, Factors]:
        """Zero factors, whose gradients are not zero; nothing fixed is kept."""
        *banks, out, inp = shape
        empty = torch.empty(0)
        return Factors(torch.zeros(*banks, rank, inp), torch.zeros(*banks, out, rank)), Factors(empty, empty)

    def frames(self, now: Factors, fixed: Factors) -> Product:
        """Stacked identities, made when they are needed."""
        *banks, rank, inp = now.A.shape
        out = now.B.shape[-2]
        eye = torch.eye(rank, dtype=now.A.dtype, device=now.A.device)
        left, right = eye.repeat(out // rank, 1), eye.repeat(1, inp // rank)
        return Product(left.expand(*banks, out, rank), right.expand(*banks, rank, inp))


SCHEMES: dict[str, LoRA] = {scheme.name: scheme for scheme in (LoRA(), SymmetricLoRA(), Additive(), RandomProjection())}


def additive_linear(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The additive change applied to inputs without its matrix, at r (in + out) multiplications a row.

    Args:
        x: (..., in).
        A: (r, in); the outputs of A repeat every r outputs.
        B: (out, r); the inputs of B are sums over every r-th input.

    Returns:
        (..., out), equal to ``x @ (U A + B V)^T`` with stacked identities U and V.

    Raises:
        ValueError: the rank of A and B differs, or does not divide both sizes.

    Source: Scientific Spaces archive 9590.
    """
    rank, inp = A.shape
    out = B.shape[0]
    if B.shape[1] != rank or out % rank or inp % rank:
        raise ValueError(f"A and B must be (r, in) and (out, r) with r dividing both, got {A.shape} and {B.shape}")
    tiled = (x @ A.mT).repeat(*[1] * (x.ndim - 1), out // rank)
    return tiled + x.unflatten(-1, (inp // rank, rank)).sum(-2) @ B.mT
