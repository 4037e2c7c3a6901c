"""Steps along the sign of a momentum: one formula, done in pieces, over lists, by compiled loops or by torch.compile.

    M      <- decay * M + g
    theta  <- keep * theta - rate * sign(look * M_before + g)      with look = decay this is sign(M)

Half-precision tensors are computed in float32 and rounded once, at random where a key for the noise is given.
"""

from __future__ import annotations

import functools
import logging
import math
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from danlu.kernels import signloops
from danlu.kernels.rounding import rounded

logger = logging.getLogger("danlu.kernels")

Coefficient = float | Tensor

#: Elements that are worked on at a time. On the CPU a piece of all operands stays in the second-level cache; elsewhere
#: it bounds the float32 copies of half-precision tensors.
_PIECE_CPU, _PIECE = 1 << 16, 1 << 22
_HALVES, _WIDE = (torch.bfloat16, torch.float16), (torch.float32, torch.float64)
_MASK = (1 << 64) - 1


@dataclass(slots=True)
class SignUpdate:
    """One parameter's part of a step; tensors are changed in place.

    Args:
        parameter: theta, any shape; none only feeds the momentum.
        momentum: M, the shape of theta.
        gradient: g, the shape of theta; none steps along sign(M) and leaves M.
        look: weight of M before the update in the sign.
        decay: factor of M, a number, or (rows, 1) for one per row, then theta is (rows, width).
        keep: factor of theta, likewise.
        rate: length of the step, likewise.
        noise: integers that the random rounding of half-precision tensors depends on; none rounds to nearest.
        count: which gradient of the window this is; the noise of M depends on it, that of theta does not.
    """

    parameter: Tensor | None
    momentum: Tensor
    gradient: Tensor | None
    look: Coefficient = 1.0
    decay: Coefficient = 1.0
    keep: Coefficient = 1.0
    rate: Coefficient = 0.0
    noise: tuple[int, ...] | None = None
    count: int = 0

    @property
    def tensors(self) -> list[Tensor]:
        """What takes part."""
        return [x for x in (self.parameter, self.momentum, self.gradient) if x is not None]

    @property
    def wide(self) -> bool:
        """Whether all tensors are of one type and need no copies in a wider one."""
        dtype = self.momentum.dtype
        return dtype in _WIDE and all(x.dtype == dtype for x in self.tensors)

    @property
    def by_row(self) -> bool:
        """Whether coefficients differ between rows."""
        return any(isinstance(x, Tensor) and x.ndim > 0 for x in (self.decay, self.rate))

    @property
    def looped(self) -> bool:
        """Whether the compiled loops take it."""
        first = self.momentum
        return (
            first.device.type == "cpu"
            and self.wide
            and all([x.is_contiguous() for x in self.tensors])
            and (first.ndim == 2 or not self.by_row)
        )


def apply(update: SignUpdate, *, loops: bool = True, compiled: bool = False) -> float | None:
    """Do one update.

    Args:
        update: what to do.
        loops: use the loops compiled for the CPU where they apply.
        compiled: use torch.compile where the loops do not apply.

    Returns:
        The sum of squares of the new theta where the loops had it for nothing, equal to ``sum_of_squares``; else none.
    """
    if loops and update.looped:
        return signloops.apply(update)
    function: Callable[..., None] = _piece
    if compiled and update.momentum.numel() > _SMALL and _compiles(update.momentum.device):
        operands = (update.parameter, update.momentum, update.gradient)
        kinds = tuple(None if x is None else x.dtype for x in operands)
        function = _compiled(kinds, update.by_row, update.noise is not None)
    same = update.look is update.decay or (not update.by_row and update.look == update.decay)
    start = 0
    for part, draw_m, draw_p in _drawn(update, loops and function is _piece):
        p, m, g, size = part.parameter, part.momentum, part.gradient, part.momentum.shape
        at_m, at_p = draw_m and draw_m(start, size), draw_p and draw_p(start, size)
        function(p, m, g, part.look, part.decay, part.keep, part.rate, same, at_m, at_p)
        start += m.numel()
    return None


def _drawn(update: SignUpdate, loops: bool) -> Iterator[tuple[SignUpdate, Any, Any]]:
    """The pieces of an update, each with what makes the draws for its momentum and its parameter."""
    makers: list[Any] = []
    for tensor, used, key in (
        (update.momentum, update.gradient is not None, (0, update.count)),
        (update.parameter, True, (1,)),
    ):
        if update.noise is None or not used or tensor is None or tensor.dtype not in _HALVES:
            makers.append(None)
        elif loops and tensor.device.type == "cpu":
            makers.append(functools.partial(_rounder, mixed(*update.noise, *key), tensor.dtype))
        else:
            makers.append(functools.partial(_draws, generator(tensor.device, *update.noise, *key)))
    for part in _pieces(update):
        yield part, *makers


def _rounder(key: int, dtype: torch.dtype, start: int, size: torch.Size) -> Callable[[Tensor], Tensor]:
    return lambda wide: signloops.round_(wide.contiguous(), dtype, start, key)


def _draws(source: torch.Generator, start: int, size: torch.Size) -> Tensor:
    return torch.rand(size, generator=source, device=source.device)


def apply_lists(updates: Sequence[SignUpdate]) -> None:
    """Do many updates by list operations; all of one device and type, wide, with plain numbers as coefficients."""
    fed: list[Any] = [u for u in updates if u.gradient is not None]
    stepped: list[Any] = [u for u in updates if u.parameter is not None]
    ahead = [u for u in fed if u.parameter is not None and u.look != u.decay]
    signs: dict[int, Tensor] = {}
    if ahead:
        sums = torch._foreach_mul([u.momentum for u in ahead], [u.look for u in ahead])
        torch._foreach_add_(sums, [u.gradient for u in ahead])
        torch._foreach_sign_(sums)
        signs = {id(u): x for u, x in zip(ahead, sums, strict=True)}
    if fed:
        torch._foreach_mul_([u.momentum for u in fed], [u.decay for u in fed])
        torch._foreach_add_([u.momentum for u in fed], [u.gradient for u in fed])
    behind = [u for u in stepped if id(u) not in signs]
    if behind:
        of_momentum = torch._foreach_sign([u.momentum for u in behind])
        signs |= {id(u): x for u, x in zip(behind, of_momentum, strict=True)}
    if stepped:
        steps = [signs[id(u)] for u in stepped]
        torch._foreach_mul_(steps, [u.rate for u in stepped])
        torch._foreach_mul_([u.parameter for u in stepped], [u.keep for u in stepped])
        torch._foreach_sub_([u.parameter for u in stepped], steps)


def is_finite(tensor: Tensor) -> Tensor | bool:
    """Whether no entry is NaN or infinite; a tensor of no dimensions unless it is known at once."""
    if tensor.numel() == 0:
        return True
    if signloops.takes(tensor):
        return signloops.is_finite(tensor)
    return torch.isfinite(torch.stack(tensor.aminmax())).all()


def sum_of_squares(tensor: Tensor) -> Tensor | float:
    """Sum of squares in float32 or better; a tensor of no dimensions unless it is known at once."""
    if tensor.numel() == 0:
        return 0.0
    if signloops.takes(tensor):
        return signloops.sum_of_squares(tensor)
    if tensor.device.type != "cpu":
        wide = torch.float32 if tensor.dtype in _HALVES else tensor.dtype
        return torch.linalg.vector_norm(tensor, dtype=wide).square()
    # Sums in float32 lose digits on the CPU, which adds up one by one.
    parts = tensor.view(-1).split(_PIECE_CPU) if tensor.is_contiguous() else (tensor,)
    return math.fsum(torch.linalg.vector_norm(part, dtype=torch.float64).item() ** 2 for part in parts)


def mixed(*key: int) -> int:
    """Sixty-four bits that depend on all integers of a key: the finaliser of splitmix64 after each."""
    state = 0
    for part in key:
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def generator(device: torch.device, *key: int) -> torch.Generator:
    """A random state that depends on the key alone, so that nothing is stored to draw the same again."""
    return torch.Generator(device).manual_seed(mixed(*key) >> 1)


def _piece(
    p: Any, m: Any, g: Any, look: Any, decay: Any, keep: Any, rate: Any, same: bool, at_m: Any, at_p: Any
) -> None:
    """The formula on one piece; also what torch.compile makes one kernel of."""
    wide = m.dtype if m.dtype == torch.float64 else torch.float32
    if p is not None and p.dtype == torch.float64:
        wide = torch.float64
    new = m.to(wide)
    direction = new
    if g is not None:
        before, feed = new, g.to(wide)
        if m.dtype == wide and p is None:
            m.mul_(decay).add_(feed)
            return
        new = before * decay + feed if m.dtype != wide or not same else m.mul_(decay).add_(feed)
        direction = new if same else before * look + feed
        if m.dtype == torch.float16:  # a saturated M keeps its sign, an infinite one would never change it
            new = new.clamp(-65504.0, 65504.0)
        if new is not m:
            m.copy_(new if at_m is None else at_m(new) if callable(at_m) else rounded(new, m.dtype, at_m))
            direction = m.to(wide) if same else direction
    if p is None:
        return
    step = torch.sign(direction).mul_(rate)
    if p.dtype == wide:
        p.mul_(keep).sub_(step)
    else:
        moved = p.to(wide) * keep - step
        p.copy_(moved if at_p is None else at_p(moved) if callable(at_p) else rounded(moved, p.dtype, at_p))


def _pieces(update: SignUpdate) -> Iterator[SignUpdate]:
    """Views of the parts of an update that are small enough."""
    tensors = (update.parameter, update.momentum, update.gradient)
    if update.momentum.numel() == 0:
        return
    size = _PIECE_CPU if update.momentum.device.type == "cpu" else _PIECE
    if update.momentum.numel() <= size or not all(x.is_contiguous() for x in update.tensors):
        yield update
        return
    if not update.by_row:
        for p, m, g in zip(*_split([None if x is None else x.view(-1) for x in tensors], size), strict=True):
            yield replace(update, parameter=p, momentum=m, gradient=g)
        return
    rows = max(1, size // update.momentum.shape[-1])
    coefficients = (update.look, update.decay, update.keep, update.rate)
    for p, m, g, look, decay, keep, rate in zip(*_split([*tensors, *coefficients], rows), strict=True):
        yield replace(update, parameter=p, momentum=m, gradient=g, look=look, decay=decay, keep=keep, rate=rate)


def _split(operands: Sequence[Any], size: int) -> list[list[Any]]:
    """Each tensor cut along its first dimension, and the others repeated as often."""
    cut = [x.split(size) if isinstance(x, Tensor) and x.ndim > 0 else None for x in operands]
    count = max(len(x) for x in cut if x is not None)
    return [[x] * count if parts is None else list(parts) for x, parts in zip(operands, cut, strict=True)]


#: Below this many elements the call of a compiled kernel costs more than it saves.
_SMALL = 1 << 12


@functools.cache
def _compiled(*kind: object) -> Callable[..., None]:
    """The formula compiled for one kind of operands.

    Each kind has a code object of its own: PyTorch allows a few compilations for one, and then runs it uncompiled.
    """
    code = _piece.__code__.replace(co_name=f"_piece_{abs(hash(kind)):x}")
    return torch.compile(types.FunctionType(code, _piece.__globals__), dynamic=True)


@functools.cache
def _compiles(device: torch.device) -> bool:
    """Whether torch.compile works on a device; where it does not, that is logged once."""
    trial = torch.zeros(_SMALL, device=device)
    try:
        _compiled((trial.dtype,) * 3, False, False)(
            trial, trial.clone(), trial.clone(), 0.5, 0.5, 1.0, 0.0, True, None, None
        )
    except Exception as error:  # the ways in which a compiler can be missing are many
        logger.warning("torch.compile does not work here, the plain step is used: %s", str(error).splitlines()[0])
        return False
    return True
