"""Low-rank changes as PEFT LoRA adapters, written and read without PEFT."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from danlu.files import replacing, write_whole
from danlu.optim.low_rank_schemes import Factors
from danlu.optim.low_rank_sites import Layout, Site, Use, convolves, layout_of, select_sites, unwrapped

if TYPE_CHECKING:
    from danlu.optim.low_rank import LowRankOptimizer

logger = logging.getLogger("danlu.low_rank")

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_adapter(optimizer: LowRankOptimizer, path: str | Path) -> Path:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, which ``PeftModel.from_pretrained`` loads.

    The rank is r for ``lora`` and 2r for the other schemes, whose change is a sum of two products. A tied weight is
    written for each of its places.

    Args:
        optimizer: built from a model.
        path: folder, made if need be.

    Returns:
        The folder.

    Raises:
        ValueError: no model, a restart in the past, or a weight that PEFT cannot adapt exactly.
    """
    from safetensors.torch import save_file

    if optimizer.change.restarts:
        raise ValueError(
            f"the change must be one pair of factors to be an adapter, got {optimizer.change.restarts} restarts; save "
            "the model itself, whose weights hold everything"
        )
    if optimizer.model is None:
        raise ValueError("the optimiser must be built from a model to name its modules, got one built from parameters")
    places = [(site, place) for site in optimizer.sites for place in _places(optimizer.sites, site)]
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for site, place in places:
        A, B = optimizer.change.scheme.export(site.factors, site.fixed)
        ranks[place.target], alphas[place.target] = A.shape[-2], site.scale * A.shape[-2]
        for name, factor in zip(place.keys, _as_modules(A, B, site, place), strict=True):
            tensors[name] = factor.to("cpu", copy=True).contiguous()
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(optimizer.model, "name_or_path", None) or None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": all(place.layout is Layout.CONV1D for _, place in places),
        "target_modules": [place.target for _, place in places if not place.bare],
        "target_parameters": [place.target for _, place in places if place.bare] or None,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    path = Path(path)
    with replacing(path / _WEIGHTS) as part:
        save_file(tensors, str(part), metadata={"format": "pt"})
    write_whole(path / _CONFIG, json.dumps(config, indent=2) + "\n")
    return path


def read_adapter(
    cls: type[LowRankOptimizer], model: nn.Module, path: str | Path, options: Mapping[str, Any]
) -> LowRankOptimizer:
    """An optimiser that goes on from an adapter: its factors, with new moments, and the weights at W0 plus the change.

    Args:
        cls: the optimiser's class.
        model: the model that the adapter was made for, without the adapter.
        path: folder of the adapter.
        options: of the optimiser, but scheme, rank, alpha and target_modules, which the adapter gives.

    Raises:
        ValueError: an adapter that is more than plain LoRA, or that names matrices which the model has not.
    """
    from safetensors.torch import load_file

    if given := {"rank", "alpha", "scheme", "target_modules"} & set(options):
        raise ValueError(f"options must not hold {sorted(given)[0]!r}: the adapter gives it")
    path = Path(path)
    config = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
    _check_config(config)
    tensors = load_file(path / _WEIGHTS)
    inner = unwrapped(model)
    named = set(config.get("target_parameters") or ())
    candidates = [site for site in select_sites(inner, ".+") if site.weight.ndim > 1]
    banks = [site for site in candidates if any(f".{use.name}".endswith(f".{n}") for use in site.uses for n in named)]
    found: dict[str, list[_Place]] = {}
    for site in candidates:
        places = [p for p in _places(banks, site) if p.keys[0] in tensors and (site in banks or not p.bare)]
        if places and len(places) < len(site.uses):
            raise ValueError(f"{path} must adapt {site.name} in all its tied places, got {places[0].target} alone")
        if places:
            found[site.name] = places
    known = {key for places in found.values() for place in places for key in place.keys}
    if unknown := set(tensors) - known:
        raise ValueError(f"{path} must hold LoRA factors of this model's weights alone, got {sorted(unknown)[0]!r}")
    options = {**options, "scheme": "lora", "rank": config["r"]}
    optimizer = cls(model, target_modules="|".join(map(re.escape, found)), **options)
    for site in optimizer.sites:
        pairs = []
        for place in found[site.name]:
            A, B = _from_modules(tensors[place.keys[0]], tensors[place.keys[1]], site, place)
            pairs.append(Factors(A.to(site.A), B.to(site.B)))
        if any(not torch.equal(pair.A, pairs[0].A) or not torch.equal(pair.B, pairs[0].B) for pair in pairs):
            raise ValueError(f"{path} must change the tied places of {site.name} alike, got different factors")
        rank = pairs[0].A.shape[-2]
        patterns = (config.get("alpha_pattern") or {}).items()
        target = found[site.name][0].target
        alpha = next((a for name, a in patterns if re.match(rf"(.*\.)?({name})$", target)), config["lora_alpha"])
        site.A.data, site.B.data = pairs[0]
        site.scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    optimizer.change.attach()
    return optimizer


@dataclass(frozen=True)
class _Place:
    """One use of a weight as PEFT knows it: its name as a target and the keys of its two tensors."""

    use: Use
    layout: Layout
    bare: bool
    target: str
    keys: tuple[str, str]


def _places(adapted: Sequence[Site], site: Site) -> list[_Place]:
    """The uses of a weight. PEFT nests its wrappers where it adapts several parameters of one module."""
    places = []
    for use in site.uses:
        layout = layout_of(use.module, site.weight)
        bare = not (isinstance(use.module, nn.Linear | nn.Embedding) or layout in (Layout.CONV1D, Layout.CONVOLUTION))
        path = use.module_name
        if bare and use.module is not None:
            weights = {id(other.weight) for other in adapted}
            beside = [name for name, p in use.module.named_parameters(recurse=False) if id(p) in weights]
            if use.parameter_name in beside:
                path += ".base_layer" * (len(beside) - 1 - beside.index(use.parameter_name))
        names = ("lora_A.weight", "lora_B.weight")
        if layout is Layout.EMBEDDING:
            names = ("lora_embedding_A", "lora_embedding_B")
        keys = (f"base_model.model.{path}.{names[0]}", f"base_model.model.{path}.{names[1]}")
        places.append(_Place(use, layout, bare, use.name if bare else use.module_name, keys))
    return places


def _as_modules(A: Tensor, B: Tensor, site: Site, place: _Place) -> tuple[Tensor, Tensor]:
    """Factors (..., r, in) and (..., out, r) in the shapes of PEFT's modules."""
    module: Any = place.use.module
    if (place.layout is Layout.EMBEDDING) != (site.layout is Layout.EMBEDDING):
        A, B = B.mT, A.mT
    if place.layout is Layout.CONVOLUTION:
        if not convolves(module) or module.groups > 1:
            raise ValueError(f"{site.name} must be an ungrouped convolution for PEFT, got {type(module).__name__}")
        return A.unflatten(1, site.weight.shape[1:]), B[(..., *[None] * (site.weight.ndim - 2))]
    if A.ndim == 3:
        return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    return A, B


def _from_modules(A: Tensor, B: Tensor, site: Site, place: _Place) -> tuple[Tensor, Tensor]:
    """The inverse of ``_as_modules``."""
    if place.layout is Layout.CONVOLUTION:
        A, B = A.flatten(1), B.flatten(1)
    elif len(site.shape) == 3:
        experts = site.shape[0]
        A, B = A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).permute(2, 0, 1)
    if (place.layout is Layout.EMBEDDING) != (site.layout is Layout.EMBEDDING):
        A, B = B.mT, A.mT
    return A, B


def _check_config(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type must be 'LORA', got {config.get('peft_type')!r}")
    for name, plain in (("use_dora", False), ("bias", "none"), ("modules_to_save", None), ("lora_bias", False)):
        if config.get(name, plain) != plain:
            raise ValueError(f"the adapter must be plain LoRA, got {name}={config[name]!r}")
    if config.get("lora_dropout"):
        logger.warning("the adapter was trained with lora_dropout %s; here it goes on without", config["lora_dropout"])
