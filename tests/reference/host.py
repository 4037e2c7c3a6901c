"""Dense float64 attention of every method inside a host model, by the definitions, sharing no code with danlu.

Queries and keys arrive turned by the host. They are turned back and anew by the host's own ``apply_rotary_pos_emb``
with cosines and sines of the host's own rotary module, at real and negative positions, so that layouts, partial
rotation and scalings are the host's business. Scores of all (query, key) pairs are then chosen with ``where`` by the
definition.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "dense-reference"


class Wide(TorchFunctionMode):
    """Turns all requests for float32 (angles, norms, softmax) into float64, so that exact things compare exactly.

    Host models round angles and normed activations to float32 whatever their own type is. Without this the comparison
    of two right computations would stop at about 1e-6.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        widened = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*(torch.float64 if a is torch.float32 else a for a in args), **widened)


@dataclass(frozen=True)
class Spec:
    """One method, or a stack of them, in plain numbers.

    Attributes:
        window: exact distances below it, for ReRoPE and its leaky form; None for neither.
        stride: tokens per unit of distance beyond the window.
        band: visible keys of a sliding window; None for all.
        sinks: first keys that the sliding window keeps.
        rescale: name in ``stretched`` for a fixed rescaling of the frequencies.
        factor: stretch of the fixed rescaling.
        dynamic: name in ``stretched`` for a rescaling per row.
        growth: ratio of the per-row factors.
        log_n: length at which the query scale is 1; None for no query scale.
        clip: whether the query scale is at least 1.
    """

    window: int | None = None
    stride: float = math.inf
    band: int | None = None
    sinks: int = 0
    rescale: str | None = None
    factor: float = 1.0
    dynamic: str | None = None
    growth: float = 2.0
    log_n: int | None = None
    clip: bool = True


def stretched(theta: list[float], name: str, s: float, trained: int) -> tuple[list[float], float]:
    """Frequencies theta_i after a stretch by s, and the factor on cosine and sine."""
    d = 2 * len(theta)
    match name:
        case "pi":
            g = [1 / s for _ in theta]
        case "ntk-old":
            g = [s ** (-2 * i / d) for i in range(len(theta))]
        case "ntk":
            g = [s ** (-2 * i / (d - 2)) for i in range(len(theta))]
        case "ntk-fixed":
            g = [s ** (-2 * (i + 1) / d) for i in range(len(theta))]
        case "ntk-mixed":
            a = math.log(s) / (d / 2) ** 0.75
            g = [math.exp(-a * (i + 1) ** 0.75) for i in range(len(theta))]
        case "yarn":
            turns = [t * trained / (2 * math.pi) for t in theta]
            kept = [min(1.0, max(0.0, (r - 1) / 31)) for r in turns]
            g = [k + (1 - k) / s for k in kept]
        case _:
            raise ValueError(name)
    return [t * x for t, x in zip(theta, g, strict=True)], 1 + 0.1 * math.log(s) if name == "yarn" else 1.0


@dataclass
class Turning:
    """The host's own rotation of one attention module, at any real positions."""

    rotary: nn.Module
    apply: Callable[..., tuple[Tensor, Tensor]]
    layer_type: str | None
    from_end: bool

    def attribute(self, name: str) -> str:
        return name if self.layer_type is None else f"{self.layer_type}_{name}"

    @property
    def inv_freq(self) -> Tensor:
        return getattr(self.rotary, self.attribute("inv_freq"))

    def back(self, x: Tensor) -> Tensor:
        """Unturned rows of x (batch, heads, length, dim), which the host turned at 0, 1, 2, ..."""
        scaling = getattr(self.rotary, self.attribute("attention_scaling"))
        return self.turn(x, -torch.arange(x.shape[2], dtype=torch.float64), 1 / scaling**2)

    def turn(self, x: Tensor, positions: Tensor, divide: float = 1.0) -> Tensor:
        """x turned to real positions (length,) and scaled as the host scales; turned dims times ``divide``."""
        layer = () if self.layer_type is None else (self.layer_type,)
        cos, sin = self.rotary(x, positions[None], *layer)
        width = 2 * self.inv_freq.numel()
        first = x.shape[-1] - width if self.from_end else 0
        inner = x[..., first : first + width]
        inner, _ = self.apply(inner, inner, cos * divide, sin * divide)
        return torch.cat([x[..., :first], inner, x[..., first + width :]], -1)

    @contextmanager
    def frequencies(self, name: str, s: float, trained: int) -> Iterator[None]:
        """The rotary module with stretched frequencies."""
        before, scaling = self.inv_freq, getattr(self.rotary, self.attribute("attention_scaling"))
        theta, m = stretched(before.double().tolist(), name, s, trained)
        setattr(self.rotary, self.attribute("inv_freq"), torch.tensor(theta, dtype=torch.float64))
        setattr(self.rotary, self.attribute("attention_scaling"), scaling * m)
        try:
            yield
        finally:
            setattr(self.rotary, self.attribute("inv_freq"), before)
            setattr(self.rotary, self.attribute("attention_scaling"), scaling)


def turnings(model: nn.Module, rotates: Callable[[nn.Module], bool], from_end: bool) -> dict[nn.Module, Turning | None]:
    """The rotation of each attention module; None where there are no positions."""
    (rotary,) = (m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding"))
    found: dict[nn.Module, Turning | None] = {}
    for module in model.modules():
        if not (type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx")):
            continue
        several = not hasattr(rotary, "inv_freq")
        kind = model.config.layer_types[module.layer_idx] if several else None
        apply = sys.modules[type(module).__module__].apply_rotary_pos_emb
        found[module] = Turning(rotary, apply, kind, from_end) if rotates(module) else None
    return found


def scores(spec: Spec, turning: Turning, q: Tensor, k: Tensor, seen: Tensor, trained: int) -> Tensor:
    """Scores (batch, heads, length, length) of unturned q and k, before scaling; ``seen`` (length,) keys per row."""
    at = torch.arange(q.shape[2], dtype=torch.float64)
    distance = at[:, None] - at
    if spec.dynamic:
        total = torch.zeros_like(q @ k.mT)
        done = torch.zeros_like(seen, dtype=torch.bool)
        s = 1.0
        while not done.all():
            rows = (seen <= trained * s) & ~done
            with turning.frequencies(spec.dynamic, s, trained):
                part = turning.turn(q, at) @ turning.turn(k, at).mT
            total = torch.where(rows[:, None], part, total)
            done, s = done | rows, s * spec.growth
        return total
    near = turning.turn(q, at) @ turning.turn(k, at).mT
    if spec.window is None:
        return near
    w, stride = spec.window, spec.stride
    if math.isinf(stride):
        far = turning.turn(q, torch.full_like(at, w)) @ turning.turn(k, torch.zeros_like(at)).mT
    else:
        far = turning.turn(q, (at - w) / stride + w) @ turning.turn(k, at / stride).mT
    return torch.where(distance < w, near, far)


@contextmanager
def reference(
    model: Any,
    spec: Spec,
    trained: int,
    *,
    rotates: Callable[[nn.Module], bool] = lambda module: True,
    from_end: bool = False,
) -> Iterator[None]:
    """The plain model with dense attention by definition; forward passes must be whole and unpadded."""
    of = turnings(model, rotates, from_end)

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        scaling: float,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        at = torch.arange(query.shape[2])
        visible = attention_mask[0, 0] > -1e4
        is_extended = sliding_window is None or sliding_window > trained
        if spec.band is not None and is_extended:
            visible = visible & ((at[:, None] - at < spec.band) | (at < spec.sinks))
        seen = visible.sum(-1)
        turning = of[module]
        if turning is None or not is_extended or not (spec.window or spec.dynamic):
            s = query @ key.mT
        else:
            s = scores(spec, turning, turning.back(query), turning.back(key), seen, trained)
        if spec.log_n is not None and is_extended:
            factor = seen.double().log() / math.log(spec.log_n)
            s = s * (factor.clamp(min=1) if spec.clip else factor)[:, None]
        s = s * scaling
        if softcap is not None:
            s = torch.tanh(s / softcap) * softcap
        s = s.masked_fill(~visible, -math.inf)
        if s_aux is not None:
            s = torch.cat([s, s_aux.to(s).view(1, -1, 1, 1).expand(*s.shape[:3], 1)], -1)
        weights = torch.softmax(s, -1)[..., : key.shape[2]]
        return (weights @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        if spec.rescale:
            sites = {t.attribute("inv_freq"): t for m, t in of.items() if t is not None and _wide(m, model, trained)}
            with _all([site.frequencies(spec.rescale, spec.factor, trained) for site in sites.values()]):
                yield
        else:
            yield
    finally:
        model.set_attn_implementation(before)


def _wide(module: nn.Module, model: Any, trained: int) -> bool:
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None and kinds[module.layer_idx] != "sliding_attention":
        return True
    window = getattr(model.config, "sliding_window", None)
    return window is None or window > trained


@contextmanager
def _all(managers: list[Any]) -> Iterator[None]:
    if not managers:
        yield
        return
    with managers[0], _all(managers[1:]):
        yield
