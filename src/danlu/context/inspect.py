"""Finding where a host model rotates, by looking at what it does rather than at what it is called.

``probe`` runs the model twice on a few tokens with a recording attention function, once as it is and once with its
rotary modules silenced. The two sets of queries tell, layer by layer, whether the layer has positions at all, which
dimensions turn, in which layout, and whether our own rotation reproduces the host's. A family that we have never seen
is thus either understood or refused with the reason, and no table of families is needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from danlu.positions.rotary import Rotary

PROBE = "danlu-probe"
_PROBE_TOKENS = 6


@dataclass(frozen=True)
class Site:
    """One set of rotary frequencies: a module, and the layer type where a module keeps several."""

    module: nn.Module = field(repr=False)
    layer_type: str | None = None

    def _name(self, suffix: str) -> str:
        return suffix if self.layer_type is None else f"{self.layer_type}_{suffix}"

    @property
    def inv_freq(self) -> Tensor:
        """Frequencies in radians per token, shape (rotated dims / 2,)."""
        return getattr(self.module, self._name("inv_freq"))

    @property
    def scaling(self) -> float:
        """Factor that the host multiplies into cos and sin."""
        return float(getattr(self.module, self._name("attention_scaling"), 1.0))

    def set(self, inv_freq: Tensor, scaling: float) -> None:
        """Replace frequencies and scaling in place of the host's buffers."""
        setattr(self.module, self._name("inv_freq"), inv_freq.to(self.inv_freq))
        setattr(self.module, self._name("attention_scaling"), scaling)


@dataclass(frozen=True)
class Layer:
    """What the probe learnt of one attention module.

    Attributes:
        module: the host's attention module.
        site: where its rotation comes from; ``None`` for a layer without positions.
        rotary: our rotation, equal to the host's; ``None`` for a layer without positions.
        sliding_window: the host's own window in tokens; ``None`` for full attention.
    """

    module: nn.Module = field(repr=False)
    site: Site | None
    rotary: Rotary | None
    sliding_window: int | None

    def turning_by_its_site(self) -> Layer:
        """The layer with the frequencies that its site has now, in the dims and layout that it was found to use."""
        if self.site is None or self.rotary is None:
            return self
        return replace(self, rotary=Rotary(self.site.inv_freq, self.rotary.layout, self.rotary.start))


def host_model(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside ``model``, which may be compiled or wrapped by peft.

    Raises:
        TypeError: there is none.
    """
    inner = getattr(model, "_orig_mod", model)
    for module in inner.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"model must be a Hugging Face causal language model, got {type(model).__name__}")


def trained_length(model: nn.Module) -> int:
    """Tokens the model was trained on, by its configuration.

    Raises:
        ValueError: the configuration does not say.
    """
    config = host_model(model).config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int):
        raise ValueError(f"{type(config).__name__} has no max_position_embeddings: pass trained_length=...")
    return length


def find_sites(model: PreTrainedModel) -> list[Site]:
    """All rotary frequencies of the model.

    Raises:
        ValueError: the model has none, or its frequencies depend on the length or on several axes.
    """
    sites = []
    for module in model.modules():
        if "position_ids" not in inspect.signature(module.forward).parameters:
            continue
        for name, _ in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
                sites.append(Site(module, name.removesuffix("inv_freq").removesuffix("_") or None))
    name = type(model).__name__
    if not sites:
        raise ValueError(f"{name} has no rotary positions to change (no module with inv_freq that takes position_ids)")
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    for entry in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        kind = str(entry.get("rope_type", "default"))
        if "dynamic" in kind or kind == "longrope":
            raise ValueError(
                f"{name} uses rope_type {kind!r}, which changes with the length: load it with a fixed rope_type"
            )
        if "mrope_section" in entry:
            raise ValueError(f"{name} rotates along several axes (mrope_section), which danlu does not extend")
    return sites


class Recorder:
    """Attention function that keeps queries and answers zeros, so that deeper layers see the same input each time."""

    def __init__(self) -> None:
        self.calls: dict[nn.Module, dict[str, Any]] = {}

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        """Record one call; the output has the shape that the host expects."""
        window = kwargs.get("sliding_window")
        self.calls[module] = {"query": query.detach(), "key": key.detach(), "window": window}
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def rotary_argument(name: str, args: tuple, kwargs: dict) -> Any:
    """An argument of a host rotary module's ``forward(x, position_ids, layer_type)``, however it was passed."""
    return kwargs[name] if name in kwargs else args[("x", "position_ids", "layer_type").index(name)]


class Silence:
    """Forward hook of a rotary module: no rotation, only the host's scaling of cos and sin."""

    def __init__(self, sites: list[Site]):
        self.scalings = {site.layer_type: site.scaling for site in sites}

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Replace (cos, sin) by (scaling, 0)."""
        layer_type = None if None in self.scalings else rotary_argument("layer_type", args, kwargs)
        if layer_type not in self.scalings:
            return output
        if not (isinstance(output, tuple) and len(output) == 2):
            raise ValueError(f"{type(module).__name__} does not return (cos, sin): its rotation cannot be moved")
        cos, sin = output
        return torch.full_like(cos, self.scalings[layer_type]), torch.zeros_like(sin)


def silence(sites: list[Site]) -> list[Any]:
    """Silence rotary modules; returns the handles whose ``remove`` undoes it."""
    modules = {site.module: None for site in sites}
    return [
        module.register_forward_hook(Silence([s for s in sites if s.module is module]), with_kwargs=True)
        for module in modules
    ]


@contextmanager
def _recording(model: PreTrainedModel) -> Iterator[Recorder]:
    recorder = Recorder()
    AttentionInterface.register(PROBE, recorder)
    AttentionMaskInterface.register(PROBE, lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    modes = {module: module.training for module in model.modules()}
    model.eval()
    model.set_attn_implementation(PROBE)
    try:
        yield recorder
    finally:
        model.set_attn_implementation(before)
        for module, mode in modes.items():
            module.training = mode


def _run(model: PreTrainedModel) -> None:
    device = model.get_input_embeddings().weight.device
    tokens = torch.arange(_PROBE_TOKENS, device=device)[None]
    positions = tokens * 1 + 3
    model(input_ids=tokens, attention_mask=torch.ones_like(tokens), position_ids=positions, use_cache=False)


def probe(model: PreTrainedModel) -> list[Layer]:
    """Learn each attention layer's rotation by running the model on a few tokens.

    Raises:
        ValueError: attention does not go through the host's attention-function registry, or a layer turns its queries
            in a way that danlu cannot reproduce.
    """
    name = type(model).__name__
    sites = find_sites(model)
    if not model._can_set_attn_implementation():
        raise ValueError(f"{name} does not call attention through the host's registry (AttentionInterface)")
    with _recording(model) as recorder, torch.no_grad():
        _run(model)
        turned, recorder.calls = recorder.calls, {}
        owners: dict[nn.Module, tuple[Site, dict[str, Any]]] = {}
        for site in sites:  # silenced one at a time, to see which layers each of them turns
            handles = silence([site])
            try:
                _run(model)
            finally:
                for handle in handles:
                    handle.remove()
            for module, call in recorder.calls.items():
                if not torch.equal(call["query"], turned[module]["query"]):
                    owners[module] = (site, call)
            recorder.calls = {}
    if not turned:
        raise ValueError(f"{name} does not call attention through the host's registry (AttentionInterface)")
    layers = []
    for module, call in turned.items():
        if module in owners:
            site, raw = owners[module]
            layers.append(Layer(module, site, _match(name, module, site, raw, call), call["window"]))
        else:
            layers.append(Layer(module, None, None, call["window"]))
    if all(layer.rotary is None for layer in layers):
        raise ValueError(f"{name} has rotary modules, but none of its attention layers turns with them")
    return layers


def _match(name: str, module: nn.Module, site: Site, raw: dict[str, Tensor], turned: dict[str, Tensor]) -> Rotary:
    """The rotation that takes raw queries and keys to turned ones."""
    head_dim, inv_freq = raw["query"].shape[-1], site.inv_freq.detach().to("cpu", torch.float64)
    positions = torch.arange(3, 3 + _PROBE_TOKENS, device=raw["query"].device)
    # the host builds cos and sin in float32 at best, whatever the model's dtype
    tolerance = 64 * max(torch.finfo(raw["query"].dtype).eps, torch.finfo(torch.float32).eps)
    for start in dict.fromkeys((0, head_dim - 2 * len(inv_freq))):
        for layout in ("half", "interleaved"):
            rotary = Rotary(inv_freq, layout=layout, start=start)
            if all(_close(rotary.rotate(raw[x], positions), turned[x], tolerance) for x in ("query", "key")):
                return rotary
    raise ValueError(
        f"{type(module).__name__} of {name} turns its queries in a way that danlu does not know "
        f"({2 * len(inv_freq)} of {head_dim} dims, neither half nor interleaved layout)"
    )


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())
