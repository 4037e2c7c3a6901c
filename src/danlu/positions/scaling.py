"""Rescaling of rotary frequencies: position interpolation, the NTK family, YaRN and a new base.

Notation: d is the number of rotated dims, pair i = 0..d/2-1 turns by theta_i per position, s = L_test / L_train is the
stretch factor. A method is a vector g of factors, theta'_i = g_i * theta_i, plus a scale m on cos and sin (so logits
grow by m**2). Every method with a factor is the identity at s = 1.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .rotary import inverse_frequencies

METHODS = ("none", "pi", "ntk-old", "ntk", "ntk-fixed", "ntk-mixed", "yarn", "yarn-turns", "abf")

# A float32 table of a host model is off by about 1e-7; llama3 or YaRN scaling moves entries by tens of percent.
_GEOMETRIC_TOLERANCE = 1e-4


def rope_inv_freq(
    method: str,
    dim: int,
    base: float = 10000.0,
    **options: Any,
) -> tuple[Tensor, float]:
    """Rotary frequencies of a plain table (theta_i = base**(-2i/dim)) after a rescaling.

    Args:
        method: One of `METHODS`.
        dim: Number of rotated dims, even, >= 2. With partial rotary this is not the head dim.
        base: Rotary base, > 1.
        **options: factor, trained_length, target_length and attention_factor as in `rescaled`; power, turns, beta_fast,
            beta_slow, truncate and new_base as in `frequency_factors`.

    Returns:
        (inv_freq, attention_scaling): float64 tensor (dim/2,) and the scale m of cos and sin (1.0 but for YaRN).

    Raises:
        ValueError: Unknown method, odd dim, or an option outside its range.

    Source: Scientific Spaces archive 9675, 9706, 9948; arXiv:2306.15595, arXiv:2309.00071.
    """
    return rescaled(inverse_frequencies(dim, base), method, **options)


def rescaled(
    inv_freq: Tensor | Sequence[float],
    method: str,
    *,
    factor: float | None = None,
    trained_length: int | None = None,
    target_length: int | None = None,
    attention_factor: float | None = None,
    **options: Any,
) -> tuple[Tensor, float]:
    """Apply a rescaling to any frequency table, for instance a host model's.

    Args:
        inv_freq: (d/2,) frequencies >= 0, radians per position.
        method: One of `METHODS`.
        factor: Stretch s >= 1. Give `factor` or `target_length`, not both.
        trained_length: Length the table was trained for, tokens.
        target_length: Length wanted, tokens; s = max(1, target_length / trained_length).
        attention_factor: Overrides the method's scale on cos and sin, > 0.
        **options: As in `frequency_factors`.

    Returns:
        (new_inv_freq, attention_scaling): float64 (d/2,) and the scale of cos and sin. The scale is this method's own;
        a host that already has one multiplies the two.

    Raises:
        ValueError: As in `frequency_factors`.

    Source: Scientific Spaces archive 9948; arXiv:2309.00071.
    """
    stretch = stretch_factor(method, factor, trained_length, target_length)
    table = _checked_table(inv_freq)
    g = frequency_factors(method, table, factor=stretch, trained_length=trained_length, **options)
    if attention_factor is None:
        return table * g, attention_scaling(method, stretch)
    if not (_is_number(attention_factor) and attention_factor > 0):
        raise ValueError(f"attention_factor must be a finite number > 0, got {attention_factor!r}")
    return table * g, float(attention_factor)


def frequency_factors(
    method: str,
    inv_freq: Tensor | Sequence[float],
    *,
    factor: float = 1.0,
    trained_length: int | None = None,
    power: float = 0.75,
    turns: float = 32.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    new_base: float | None = None,
) -> Tensor:
    """Per-frequency factors g of a rescaling, theta'_i = g_i * theta_i.

    pi, ntk-old, ntk, ntk-fixed and ntk-mixed read only the index, so they take any table. yarn-turns reads
    r_i = theta_i * trained_length / 2 pi, so it takes any table as well. yarn needs the (fractional) index at which a
    pair makes a given number of turns: exact on a geometric table, log-linear between neighbours on another decreasing
    one (a llama3-scaled table, say). abf needs the base, so a geometric table. Pairs with frequency 0 do not rotate;
    they are no digits of the position, are left out of d, and get g = 1.

    Args:
        method: One of `METHODS`.
        inv_freq: (d/2,) frequencies >= 0, radians per position.
        factor: Stretch s >= 1; s = 1 gives ones (except abf, which has no factor).
        trained_length: Tokens >= 1; needed by yarn and yarn-turns.
        power: ntk-mixed only, in (0, 1]; 1 is ntk-fixed, towards 0 it becomes pi.
        turns: yarn-turns only, > 1: pairs that make more turns than this in the trained length stay as they are.
        beta_fast: yarn only, turns where its ramp begins, > beta_slow.
        beta_slow: yarn only, turns where its ramp ends, > 0.
        truncate: yarn only: round the ramp's ends outwards to whole indices, as its authors' code does.
        new_base: abf only, > 1.

    Returns:
        float64 tensor (d/2,).

    Raises:
        ValueError: Unknown method, negative or non-finite table, option outside its range, or a table that the method
            cannot read (with the reason).

    Source: Scientific Spaces archive 9675 (pi, ntk), 9706 (ntk-fixed, ntk-mixed), 9948 (yarn-turns);
    arXiv:2309.00071 (yarn), arXiv:2309.16039 (abf).
    """
    check_method(method)
    table = _checked_table(inv_freq)
    if not (_is_number(factor) and factor >= 1):
        raise ValueError(f"factor must be a finite number >= 1 (target length / trained length), got {factor!r}")
    if not (_is_number(power) and 0 < power <= 1):
        raise ValueError(f"power must be in (0, 1], got {power!r}")
    if not (_is_number(turns) and turns > 1):
        raise ValueError(f"turns must be a finite number > 1, got {turns!r}")
    if not (_is_number(beta_fast) and _is_number(beta_slow) and beta_fast > beta_slow > 0):
        raise ValueError(f"beta_fast > beta_slow > 0 is required, got beta_fast={beta_fast!r}, beta_slow={beta_slow!r}")
    if method in ("yarn", "yarn-turns"):
        if isinstance(trained_length, bool) or not isinstance(trained_length, int) or trained_length < 1:
            raise ValueError(f"trained_length must be an integer >= 1 for {method}, got {trained_length!r}")
    g = torch.ones_like(table)
    rotating = table > 0
    theta = table[rotating]
    if method == "abf":
        g[rotating] = _new_base_factors(theta, new_base)
    elif method != "none" and factor > 1:
        g[rotating] = _stretch_factors(
            method, theta, float(factor), trained_length or 1, power, turns, beta_fast, beta_slow, truncate
        )
    return g


def _stretch_factors(
    method: str,
    theta: Tensor,
    s: float,
    trained_length: int,
    power: float,
    turns: float,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
) -> Tensor:
    pairs = theta.numel()
    i = torch.arange(pairs, dtype=torch.float64)
    if method == "pi":
        return torch.full_like(theta, 1 / s)
    if method == "ntk-old":
        return torch.exp(-math.log(s) * i / pairs)
    if method == "ntk-fixed":  # m = i + 1: the stretched radix also divides the lowest digit
        return torch.exp(-math.log(s) * (i + 1) / pairs)
    if method == "ntk-mixed":
        return torch.exp(-math.log(s) * ((i + 1) / pairs) ** power)
    if method == "yarn-turns":
        keep = ((theta * trained_length / (2 * math.pi) - 1) / (turns - 1)).clamp(0, 1)
        return keep + (1 - keep) / s
    if pairs < 2:
        raise ValueError(f"{method} needs at least 2 rotating pairs (dim >= 4), got {pairs}; use pi or ntk-fixed")
    if method == "ntk":
        return torch.exp(-math.log(s) * i / (pairs - 1))
    low = _index_at(theta, 2 * math.pi * beta_fast / trained_length)
    high = _index_at(theta, 2 * math.pi * beta_slow / trained_length)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    # The upper clamp is at d - 1, not d/2 - 1: kept as in the authors' code, checkpoints were tuned with it.
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    ramp = ((i - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return (1 - ramp) + ramp / s


def _new_base_factors(theta: Tensor, new_base: float | None) -> Tensor:
    if new_base is None or not (_is_number(new_base) and new_base > 1):
        raise ValueError(f"new_base must be a finite number > 1 for abf, got {new_base!r}")
    base = geometric_base(theta)
    if base is None:
        raise ValueError("abf needs a geometric frequency table, got one without a single base; use ntk or ntk-mixed")
    i = torch.arange(theta.numel(), dtype=torch.float64)
    return torch.exp(-math.log(new_base / base) * i / theta.numel())


def geometric_base(inv_freq: Tensor | Sequence[float]) -> float | None:
    """Base b of a table with theta_i = theta_0 * b**(-2i/d), or None where the table is not of that form.

    Args:
        inv_freq: (d/2,) frequencies > 0; theta_0 may differ from 1 (a linearly interpolated host).

    Returns:
        The base, or None for a table that is not geometric, has zeros, or has fewer than two pairs.
    """
    logs = _checked_table(inv_freq).log()
    pairs = logs.numel()
    if pairs < 2 or not bool(torch.isfinite(logs).all()):
        return None
    line = torch.lerp(logs[0], logs[-1], torch.arange(pairs, dtype=torch.float64) / (pairs - 1))
    if float((logs - line).abs().max()) > _GEOMETRIC_TOLERANCE:
        return None
    return math.exp(float(logs[0] - logs[-1]) * pairs / (pairs - 1))


def attention_scaling(method: str, factor: float) -> float:
    """Scale m that a method puts on cos and sin (logits grow by m**2): 1 + 0.1 ln s for YaRN, else 1.

    Args:
        method: One of `METHODS`.
        factor: Stretch s >= 1.

    Source: Scientific Spaces archive 9948; arXiv:2309.00071 (fitted, not derived).
    """
    check_method(method)
    return 1 + 0.1 * math.log(factor) if method in ("yarn", "yarn-turns") else 1.0


def stretch_factor(
    method: str, factor: float | None, trained_length: int | None = None, target_length: int | None = None
) -> float:
    """Stretch s from either a factor or a target length.

    Args:
        method: One of `METHODS`; none and abf need neither value.
        factor: s >= 1, or None.
        trained_length: Tokens >= 1; needed with `target_length`.
        target_length: Tokens >= 1, or None. A target inside the trained length gives s = 1.

    Returns:
        s >= 1.

    Raises:
        ValueError: Both or neither given, or a value outside its range.
    """
    check_method(method)
    if factor is not None and target_length is not None:
        raise ValueError(f"give factor or target_length, not both: got factor={factor!r}, {target_length=}")
    if factor is not None:
        if not (_is_number(factor) and factor >= 1):
            raise ValueError(f"factor must be a finite number >= 1 (target length / trained length), got {factor!r}")
        return float(factor)
    if target_length is not None:
        for name, value in (("target_length", target_length), ("trained_length", trained_length)):
            if value is None or not (_is_number(value) and value >= 1):
                raise ValueError(f"{name} must be a number >= 1 when target_length is given, got {value!r}")
        return max(1.0, target_length / trained_length)  # type: ignore[operator]
    if method in ("none", "abf"):
        return 1.0
    raise ValueError(f"{method} needs factor=, or target_length= together with trained_length=; got neither")


def check_method(method: str) -> None:
    """Raise ValueError for a name that is not in `METHODS`, naming the nearest one."""
    if method not in METHODS:
        near = difflib.get_close_matches(str(method), METHODS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}{hint}")


def _index_at(theta: Tensor, frequency: float) -> float:
    """Fractional index at which a decreasing table passes `frequency`, extrapolated beyond its ends."""
    logs, target = theta.log(), math.log(frequency)
    last = theta.numel() - 1
    if geometric_base(theta) is not None:
        return float((logs[0] - target) / (logs[0] - logs[last]) * last)
    if not bool((logs[1:] < logs[:-1]).all()):
        raise ValueError("yarn needs frequencies that decrease with the index; use yarn-turns, which takes any table")
    left = min(max(int((logs > target).sum()) - 1, 0), last - 1)
    return left + float((logs[left] - target) / (logs[left] - logs[left + 1]))


def _checked_table(inv_freq: Tensor | Sequence[float]) -> Tensor:
    table = torch.as_tensor(inv_freq).detach().to(device="cpu", dtype=torch.float64)
    if table.ndim != 1 or table.numel() == 0:
        raise ValueError(f"inv_freq must have shape (d/2,) with d >= 2, got {tuple(table.shape)}")
    if not bool(torch.isfinite(table).all()) or bool((table < 0).any()):
        raise ValueError("inv_freq must hold finite frequencies >= 0")
    return table


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
