"""What ``danlu.extend`` can do to a model, as small frozen values that can be compared, printed and parsed.

A *stack* is a tuple of methods that work together: at most one that changes the frequencies, one the attention pattern,
one the query scale. ``danlu.context.stacks`` checks, writes and reads stacks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

Stack = tuple["Method", ...]


@dataclass(frozen=True)
class Method:
    """Base of all methods.

    Options that are ``None`` are chosen from the model by ``resolve``: windows from the trained length, factors from
    the length that is to be read.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    role: ClassVar[str]  # "frequencies", "pattern", "query scale" or "key norm": one of each at most in a stack

    def __str__(self) -> str:
        options = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return ":".join([self.name, *options])

    @property
    def label(self) -> str:
        """Title with the options that differ from their defaults, for tables and plots."""
        options = ", ".join(str(self).split(":")[1:])
        return f"{self.title} ({options})" if options else self.title

    def resolve(self, trained_length: int, target_length: int | None = None) -> Method:
        """Return the method with every ``None`` option filled in; ValueError when it does not fit the model."""
        return self


def _whole(name: str, value: object, low: int, high: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if not low <= value <= high:
        limits = f"at least {low}" if high == math.inf else f"in {low}..{high}"
        raise ValueError(f"{name} must be {limits}, got {value}")


def _real(name: str, value: object, low: float, *, strict: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < low or (strict and value == low):
        raise ValueError(f"{name} must be finite and {'above' if strict else 'at least'} {low:g}, got {value}")


# --- frequencies ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FrequencyMethod(Method):
    """Rescales the rotary frequencies for texts ``factor`` times as long as the trained length.

    Args:
        factor: longest text over trained length, at least 1. ``None``: taken from the length that is to be read.
    """

    role: ClassVar[str] = "frequencies"
    rescaling: ClassVar[str]  # the name in danlu.positions.scaling
    factor: float | None = None

    def __post_init__(self) -> None:
        if self.factor is not None:
            _real("factor", self.factor, 1)

    def options(self) -> dict[str, Any]:
        """Options of ``danlu.positions.scaling.rescaled`` beside factor and trained length."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "factor"}

    def resolve(self, trained_length: int, target_length: int | None = None) -> FrequencyMethod:
        """Fill in the factor from ``target_length / trained_length``, at least 1."""
        if self.factor is not None:
            return self
        if target_length is None:
            raise ValueError(
                f"{type(self).__name__} needs factor, the longest text over the trained length of {trained_length}; "
                f"for texts of {8 * trained_length} tokens write {type(self).__name__}(factor=8)"
            )
        return replace(self, factor=max(1.0, target_length / trained_length))


@dataclass(frozen=True)
class PositionInterpolation(FrequencyMethod):
    """Position interpolation: every frequency divided by the factor. Source: archive 9675; arXiv:2306.15595."""

    name: ClassVar[str] = "pi"
    title: ClassVar[str] = "PI"
    rescaling: ClassVar[str] = "pi"


@dataclass(frozen=True)
class NTKOld(FrequencyMethod):
    """NTK scaling in its first form: base times factor. Source: archive 9675, 9706."""

    name: ClassVar[str] = "ntk-old"
    title: ClassVar[str] = "NTK-old"
    rescaling: ClassVar[str] = "ntk-old"


@dataclass(frozen=True)
class NTK(FrequencyMethod):
    """NTK-aware scaling: highest frequency kept, lowest interpolated. Source: archive 9675, 9706."""

    name: ClassVar[str] = "ntk"
    title: ClassVar[str] = "NTK"
    rescaling: ClassVar[str] = "ntk"


@dataclass(frozen=True)
class NTKFixed(FrequencyMethod):
    """NTK with the radix argument done fully. Source: archive 9706."""

    name: ClassVar[str] = "ntk-fixed"
    title: ClassVar[str] = "NTK-fixed"
    rescaling: ClassVar[str] = "ntk-fixed"


@dataclass(frozen=True)
class NTKMixed(FrequencyMethod):
    """NTK with a mixed radix: low digits carry more of the stretch. Source: archive 9706.

    Args:
        factor: as in ``FrequencyMethod``.
        power: shape of the stretch in (0, 1]; 1 is NTK-fixed, towards 0 is interpolation.
    """

    name: ClassVar[str] = "ntk-mixed"
    title: ClassVar[str] = "NTK-mixed"
    rescaling: ClassVar[str] = "ntk-mixed"
    power: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        _real("power", self.power, 0, strict=True)
        if self.power > 1:
            raise ValueError(f"power must be in (0, 1], got {self.power}")


@dataclass(frozen=True)
class YaRN(FrequencyMethod):
    """YaRN: fast pairs kept, slow pairs interpolated, logits sharpened. Source: archive 9948; arXiv:2309.00071.

    The ramp is linear in the number of turns a pair makes within the trained length, as in the paper.

    Args:
        factor: as in ``FrequencyMethod``.
        turns: pairs that turn more often than this are kept; above 1.
    """

    name: ClassVar[str] = "yarn"
    title: ClassVar[str] = "YaRN"
    rescaling: ClassVar[str] = "yarn-turns"
    turns: float = 32.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _real("turns", self.turns, 1, strict=True)


# --- attention patterns -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pattern(Method):
    """Changes which keys a query sees, or at which distance."""

    role: ClassVar[str] = "pattern"


@dataclass(frozen=True)
class ReRoPE(Pattern):
    """Exact distances below ``window``, the distance ``window`` beyond. Source: archive 9708.

    Args:
        window: tokens with exact positions, in 1..trained length - 1. ``None``: half of the trained length.
    """

    name: ClassVar[str] = "rerope"
    title: ClassVar[str] = "ReRoPE"
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None:
            _whole("window", self.window, 1)

    @property
    def stride(self) -> float:
        """Tokens per unit of distance beyond the window: infinite here, finite for the leaky form."""
        return math.inf

    def resolve(self, trained_length: int, target_length: int | None = None) -> ReRoPE:
        """Fill in the window; refuse one that reaches the trained length, where every score becomes untrained."""
        window = max(1, trained_length // 2) if self.window is None else self.window
        if window >= trained_length:
            raise ValueError(
                f"window must be in 1..{trained_length - 1} for a model trained on {trained_length} tokens, "
                f"got {window}; "
                f"{max(1, trained_length // 4)} to {max(1, trained_length // 2)} work best"
            )
        return replace(self, window=window)


@dataclass(frozen=True)
class LeakyReRoPE(ReRoPE):
    """Exact distances below ``window``, one unit for every ``stride`` tokens beyond. Source: archive 9708, 9728.

    Args:
        window: tokens with exact positions. ``None``: a quarter of the trained length.
        stride: above 1 compresses distances (inference); 1 is plain RoPE; below 1 stretches them, for training a model
            that is then used with plain RoPE at ``1 / (2 * stride)`` times its trained length.
    """

    name: ClassVar[str] = "leaky"
    title: ClassVar[str] = "Leaky ReRoPE"
    stride: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _real("stride", self.stride, 0, strict=True)

    def resolve(self, trained_length: int, target_length: int | None = None) -> ReRoPE:
        """Fill in the window."""
        filled = replace(self, window=max(1, trained_length // 4)) if self.window is None else self
        return ReRoPE.resolve(filled, trained_length)


@dataclass(frozen=True)
class Window(Pattern):
    """Sliding window: each token sees the last ``window`` tokens, itself included. The baseline of every table.

    Args:
        window: tokens that are seen. ``None``: the trained length.
        sinks: first tokens that stay visible at any distance; 4 gives the Lambda mask. Source: archive 9431, 9948.
    """

    name: ClassVar[str] = "window"
    title: ClassVar[str] = "sliding window"
    window: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.window is not None:
            _whole("window", self.window, 1)
        _whole("sinks", self.sinks, 0)

    def resolve(self, trained_length: int, target_length: int | None = None) -> Window:
        """Fill in the window."""
        return self if self.window is not None else replace(self, window=trained_length)


@dataclass(frozen=True)
class DynamicPattern(Pattern):
    """Rescales each row's frequencies by the number of tokens it sees, exactly, with or without a cache.

    The factor of row i is the smallest power of ``growth`` that covers i + 1 tokens. A step function keeps a rotated
    key valid until the next step, so that decoding re-rotates each key a logarithmic number of times, and a row's
    result depends neither on later tokens nor on its neighbours in the batch.

    Args:
        growth: ratio of neighbouring factors, at least 1.01.
    """

    rescaling: ClassVar[str]
    growth: float = 2.0

    def __post_init__(self) -> None:
        _real("growth", self.growth, 1.01)

    def options(self) -> dict[str, Any]:
        """Options of ``danlu.positions.scaling.rescaled`` beside factor and trained length."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "growth"}


@dataclass(frozen=True)
class DynamicNTK(DynamicPattern):
    """NTK-aware scaling with a factor per row. Source: archive 9706."""

    name: ClassVar[str] = "dynamic-ntk"
    title: ClassVar[str] = "dynamic NTK"
    rescaling: ClassVar[str] = "ntk"


@dataclass(frozen=True)
class DynamicYaRN(DynamicPattern):
    """YaRN with a factor per row; inside the trained length the model is unchanged. Source: archive 9948."""

    name: ClassVar[str] = "dynamic-yarn"
    title: ClassVar[str] = "dynamic YaRN"
    rescaling: ClassVar[str] = "yarn-turns"
    turns: float = 32.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _real("turns", self.turns, 1, strict=True)


# --- query scale and key norm -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogN(Method):
    """Multiplies the query that sees n tokens by ln n / ln trained_length. Source: archive 8823, 9706.

    Args:
        trained_length: length at which the factor is 1. ``None``: the model's.
        clip: never below 1, the form for models trained without it. ``False`` is the form to train with.
    """

    name: ClassVar[str] = "logn"
    title: ClassVar[str] = "log n"
    role: ClassVar[str] = "query scale"
    trained_length: int | None = None
    clip: bool = True

    def __post_init__(self) -> None:
        if self.trained_length is not None:
            _whole("trained_length", self.trained_length, 2)
        if not isinstance(self.clip, bool):
            raise TypeError(f"clip must be True or False, got {self.clip!r}")

    def resolve(self, trained_length: int, target_length: int | None = None) -> LogN:
        """Fill in the trained length."""
        return self if self.trained_length is not None else replace(self, trained_length=trained_length)


@dataclass(frozen=True)
class KeyNorm(Method):
    """Gainless RMS norm of the keys: to train with, not a patch for a trained model. Source: archive 9859."""

    name: ClassVar[str] = "key-norm"
    title: ClassVar[str] = "KeyNorm"
    role: ClassVar[str] = "key norm"
