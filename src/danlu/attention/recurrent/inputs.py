"""What all recurrent mixers do with positions, padding and number types."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def token_marks(
    x: Tensor, hidden_size: int, positions: Tensor | None, mask: Tensor | None, cache: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Where a recurrence starts anew and which of its steps it leaves out.

    Args:
        x: input of the mixer, (batch, length, hidden_size).
        hidden_size: what the mixer expects.
        positions: int64 (length,), (1, length) or (batch, length), or None.
        mask: bool (batch, past + length), True where there is a token, or None.
        cache: the mixer's cache layer, or None.

    Returns:
        ``reset`` and ``hold`` for :func:`danlu.kernels.scan.linear_scan`, each None where it would be False throughout.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x.ndim != 3 or x.shape[-1] != hidden_size:
        raise ValueError(f"x must be (batch, length, {hidden_size}), got {tuple(x.shape)}")
    batch, length, _ = x.shape
    if cache is not None and cache.state is not None and len(cache.state[0]) != batch:
        raise ValueError(f"cache must hold {batch} rows as x has, got {len(cache.state[0])}; start from a fresh one")
    hold = None
    if mask is not None:
        past = 0 if cache is None else cache.get_seq_length()
        if mask.dtype != torch.bool or mask.shape != (batch, past + length):
            raise ValueError(
                f"mask must be bool ({batch}, {past + length}), True where there is a token, got {mask.dtype} "
                f"{tuple(mask.shape)}; a recurrent mixer takes no mask of pairs of tokens"
            )
        hold = ~mask[:, past:]
    reset = None
    if positions is not None:
        if positions.shape not in ((length,), (1, length), (batch, length)):
            raise ValueError(f"positions must be ({length},) or ({batch}, {length}), got {tuple(positions.shape)}")
        reset = (positions == 0).expand(batch, length)
        if hold is not None:
            reset = reset & ~hold  # the position of padding says nothing
    return reset, hold


def seen_from_the_end(reset: Tensor | None) -> Tensor | None:
    """Marks of first steps, turned into marks of last steps: where a recurrence that runs backwards starts anew."""
    return None if reset is None else torch.cat((reset[:, 1:], torch.zeros_like(reset[:, :1])), 1)


def refuse_nan(parameter: Tensor, name: str) -> None:
    """Stop before a parameter that is not a number spoils every state.

    Raises:
        ValueError: there is a NaN. Off the CPU and in compiled code it is an error of the device, so as not to wait.
    """
    if parameter.device.type == "cpu" and not torch.compiler.is_compiling():
        if parameter.isnan().any():
            raise ValueError(
                f"{name} must be a number in every channel, got NaN in {int(parameter.isnan().sum())} of "
                f"{parameter.numel()}; training has diverged: go back to an earlier checkpoint, lower the learning rate"
            )
    else:
        torch._assert_async(~parameter.isnan().any(), f"{name} holds NaN")


def wide_type(x: Tensor) -> torch.dtype:
    """The type that states are computed in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def uniform(count: int, generator: torch.Generator | None) -> Tensor:
    """Draws from [0, 1) in float64, on the generator's device."""
    device = "cpu" if generator is None else generator.device
    return torch.rand(count, dtype=torch.float64, generator=generator, device=device)
