"""The matrices that are trained in low rank: which they are in a model, and how each is read as (out, in)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from danlu.kernels.rounding import stochastic_round_
from danlu.optim.low_rank_schemes import Factors, Product

logger = logging.getLogger("danlu.low_rank")

#: Elements of a weight that are in a wider type at one time.
_BLOCK = 1 << 22


class Layout(StrEnum):
    """How a weight holds its matrix: as it is, with inputs first, with a kernel behind, or as a bank of experts."""

    LINEAR = "linear"  # (out, in)
    CONV1D = "conv1d"  # (in, out), GPT-2's
    CONVOLUTION = "convolution"  # (out, in, *kernel)
    EMBEDDING = "embedding"  # (rows, width), which PEFT reads as inputs and outputs
    BANK = "bank"  # (experts, out, in)
    TURNED_BANK = "turned bank"  # (experts, in, out)


_TURNED = (Layout.CONV1D, Layout.EMBEDDING, Layout.TURNED_BANK)


@dataclass(frozen=True)
class Use:
    """One place of the model that holds the weight; a tied weight has several."""

    module_name: str
    module: nn.Module | None
    parameter_name: str

    @property
    def name(self) -> str:
        """Name of the parameter as the model gives it."""
        return f"{self.module_name}.{self.parameter_name}" if self.module_name else self.parameter_name


@dataclass(eq=False)
class Site:
    """One trained matrix with its factors.

    Args:
        weight: the parameter.
        uses: where it is, the first gives its name.
        layout: how it is read.
    """

    weight: nn.Parameter
    uses: tuple[Use, ...]
    layout: Layout
    scale: float = 1.0
    #: Place among all sites; draws depend on it and not on names.
    index: int = 0
    A: nn.Parameter = field(init=False)
    B: nn.Parameter = field(init=False)
    fixed: Factors = field(init=False)
    #: A copy of W0, in the host's memory when only re-synchronisation reads it, or none.
    kept: Tensor | None = None

    @property
    def name(self) -> str:
        """Name of the first use."""
        return self.uses[0].name

    @property
    def shape(self) -> torch.Size:
        """(..., out, in)."""
        shape = self.weight.shape
        if self.layout is Layout.CONVOLUTION:
            return torch.Size((shape[0], shape[1:].numel()))
        return torch.Size((*shape[:-2], shape[-1], shape[-2])) if self.layout in _TURNED else shape

    @property
    def factors(self) -> Factors:
        """The pair as it is now, without gradients."""
        return Factors(self.A.detach(), self.B.detach())

    @property
    def wide(self) -> torch.dtype:
        """Type of the factors and of all sums: float32 for a half-precision weight, else the weight's own."""
        return self.weight.dtype if self.weight.dtype in (torch.float32, torch.float64) else torch.float32

    def rows(self) -> Iterator[slice]:
        """Ranges of output rows of at most ``_BLOCK`` elements (one row at least)."""
        out = self.shape[-2]
        step = max(1, _BLOCK * out // max(1, self.weight.numel()))
        return (slice(start, start + step) for start in range(0, out, step))

    def block(self, tensor: Tensor, rows: slice) -> Tensor:
        """A view of the rows of a tensor shaped like the weight, in the weight's own dimensions."""
        if self.layout is Layout.CONVOLUTION:
            return tensor[rows]
        return (tensor.mT if self.layout in _TURNED else tensor)[..., rows, :]

    def matrix(self, tensor: Tensor, rows: slice) -> Tensor:
        """The same rows as (..., rows, in) in the wide type."""
        block = self.block(tensor, rows)
        return (block.flatten(1) if self.layout is Layout.CONVOLUTION else block).to(self.wide)

    @torch.no_grad()
    def add(self, target: Tensor, source: Any, change: Product, seed: int | None = None) -> None:
        """Write source + scale * left @ right into the target, a few rows at a time.

        Args:
            target: shaped like the weight, written in place.
            source: the same shape, may be the target.
            change: the two matrices in the wide type.
            seed: round half precision stochastically with it; to nearest without.
        """
        multiply = torch.baddbmm if len(self.shape) == 3 else torch.addmm
        generator = None
        if seed is not None and target.element_size() == 2:
            generator = torch.Generator(target.device).manual_seed(seed)
        for rows in self.rows():
            start = self.matrix(source.detach(), rows).to(change.left.device)
            value = multiply(start, change.left[..., rows, :], change.right, alpha=self.scale)
            place = self.block(target.detach(), rows)
            if generator is None:
                place.copy_(value.reshape(place.shape))
            else:
                stochastic_round_(place, value.reshape(place.shape), generator)

    def unmatrix(self, matrix: Tensor) -> Tensor:
        """A whole (..., out, in) matrix in the weight's shape."""
        return (matrix.mT if self.layout in _TURNED else matrix).reshape(self.weight.shape)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of data parallelism and compilation."""
    inner: Any = model
    while True:
        if isinstance(inner, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        else:
            return inner


def select_sites(model: nn.Module, target_modules: str | Sequence[str] | None) -> list[Site]:
    """The matrices of a model that the targets name, a tied one once.

    Args:
        model: the host model.
        target_modules: None or "all-linear" takes linear maps, convolutions and banks of experts, but not the output
            head, as PEFT does. A string is a regular expression for a whole name, a list holds names or their last
            parts. Names are those of modules or of parameters.

    Returns:
        Sites in the order of the model.

    Raises:
        ValueError: a target that matches nothing or only vectors, or no matrix at all.
    """
    every = target_modules is None or target_modules == "all-linear"
    regular = isinstance(target_modules, str)
    patterns = [target_modules] if isinstance(target_modules, str) else list(target_modules or ())
    unused = {} if every else dict.fromkeys(patterns, "matches nothing")
    chosen = []
    for weight, uses in uses_of(model).items():
        if every:
            if _mixes(model, uses, weight):
                chosen.append(_site(weight, uses))
            continue
        found = [pattern for pattern in patterns if any(_matches(pattern, use, regular) for use in uses)]
        for pattern in found:
            if weight.ndim > 1:
                unused.pop(pattern, None)
            elif pattern in unused:
                unused[pattern] = f"matches {uses[0].name}, which has ndim {weight.ndim} and no rank to lower"
        if found and weight.ndim > 1:
            first = next(use for use in uses if any(_matches(pattern, use, regular) for pattern in found))
            chosen.append(_site(weight, (first, *(use for use in uses if use is not first))))
    if unused:
        pattern, reason = next(iter(unused.items()))
        raise ValueError(f"target_modules must name matrices of the model, got {pattern!r}, which {reason}")
    if not chosen:
        raise ValueError(f"the model must have matrices to train, got {type(model).__name__}; name target_modules")
    return chosen


def located_sites(model: nn.Module | None, parameters: Sequence[tuple[str, Tensor]]) -> list[Site]:
    """Sites of given parameters; without the model, three dimensions are a bank of experts and more a convolution.

    Args:
        model: where to look for their modules, or none.
        parameters: names for those that are not found there, and the parameters.

    Raises:
        TypeError: a tensor that is no ``nn.Parameter``.
    """
    known = {} if model is None else uses_of(model)
    sites = []
    for name, weight in parameters:
        if not isinstance(weight, nn.Parameter):
            raise TypeError(f"a low-rank group must hold nn.Parameter, got {type(weight).__name__} for {name}")
        sites.append(_site(weight, known.get(weight, (Use("", None, name),))))
    return sites


def check_weight(site: Site, rank: int) -> None:
    """Refuse a weight that has no full gradient or cannot be rewritten.

    Raises:
        TypeError: quantised, complex or sharded.
        ValueError: frozen, on the meta device, or with fewer than two dimensions.
    """
    weight, name = site.weight, site.name
    if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16) or hasattr(
        weight, "quant_state"
    ):
        raise TypeError(
            f"{name} must hold float64, float32, bfloat16 or float16, got {weight.dtype} ({type(weight).__name__}): a "
            "quantised weight has no gradient to project; use PEFT's LoRA, which adds a branch beside it"
        )
    if torch.distributed.is_available():
        from torch.distributed.tensor import DTensor

        if isinstance(weight, DTensor):
            raise TypeError(
                f"{name} must be a plain tensor, got a DTensor: a shard does not see the rows and columns that its "
                "factors need; use DDP, or leave sharding (FSDP, tensor parallelism) off"
            )
    if weight.ndim < 2:
        raise ValueError(
            f"{name} must have at least 2 dimensions, got ndim {weight.ndim}; put it into a group with low_rank=False"
        )
    if weight.device.type == "meta":
        raise ValueError(f"{name} must hold numbers, got the meta device; load the weights first")
    if not weight.requires_grad:
        raise ValueError(
            f"{name} must require gradients, got requires_grad=False; unfreeze it, or leave it out with target_modules"
        )
    *_, out, inp = site.shape
    if rank > min(out, inp):
        logger.warning("rank %d exceeds what %s %s can have: fewer numbers would do", rank, name, (out, inp))


def uses_of(model: nn.Module) -> dict[nn.Parameter, tuple[Use, ...]]:
    """Every parameter with all its places, in the order of the model."""
    uses: dict[nn.Parameter, tuple[Use, ...]] = {}
    for module_name, module in model.named_modules():
        for local, parameter in module.named_parameters(recurse=False):
            uses[parameter] = (*uses.get(parameter, ()), Use(module_name, module, local))
    return uses


def _site(weight: nn.Parameter, uses: tuple[Use, ...]) -> Site:
    return Site(weight, uses, layout_of(uses[0].module, weight))


def layout_of(module: nn.Module | None, weight: Tensor) -> Layout:
    """How a module reads a weight of at least two dimensions."""
    if isinstance(module, nn.Embedding):
        return Layout.EMBEDDING
    if type(module).__name__ == "Conv1D":
        return Layout.CONV1D
    if convolves(module) or weight.ndim > 3:
        return Layout.CONVOLUTION
    if weight.ndim == 3:
        return Layout.TURNED_BANK if getattr(module, "is_transposed", False) else Layout.BANK
    return Layout.LINEAR


def convolves(module: nn.Module | None) -> bool:
    """Whether a module is a convolution, not a transposed one."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _mixes(model: nn.Module, uses: Sequence[Use], weight: Tensor) -> bool:
    """Whether all uses are inside the network: a tied table is an embedding or a head somewhere."""
    host: Any = model
    head = host.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return all(use.module is not head and _maps(use, weight) for use in uses)


def _maps(use: Use, weight: Tensor) -> bool:
    kind = type(use.module).__name__
    if isinstance(use.module, nn.Linear) or convolves(use.module) or kind == "Conv1D":
        return use.parameter_name == "weight"
    return "Expert" in kind and weight.ndim == 3


def _matches(pattern: str, use: Use, regular: bool) -> bool:
    # The name of a module means its weights; a bank of biases has to be named itself.
    names = (use.name,) if "bias" in use.parameter_name else (use.module_name, use.name)
    if regular:
        return any(re.fullmatch(pattern, name) for name in names)
    return any(name == pattern or name.endswith(f".{pattern}") for name in names)
