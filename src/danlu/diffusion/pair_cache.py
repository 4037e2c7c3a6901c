"""Pairs of a flow's start and end, made once, kept on disk, and made further where a run was stopped.

Making them costs far more than training on them: the number of pairs times the calls of the solver. They lie in
shards of safetensors beside a manifest that says which weights they belong to; every shard appears whole or not at all.

Source: Scientific Spaces archive 9497; arXiv:2209.03003.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from danlu.diffusion.couplings import Pairs
from danlu.diffusion.flow import RK4, VelocityModel, predict
from danlu.diffusion.processes import RectifiedFlow
from danlu.diffusion.solvers import find_solver, sample
from danlu.diffusion.steps import Solver, draw_noise, home_of
from danlu.diffusion.targets import Denoiser
from danlu.files import replacing, write_whole
from danlu.progress import watched

logger = logging.getLogger("danlu.diffusion")

FORMAT = 1
MANIFEST = "pairs.json"

#: Called as ``prior(shape, generator)``; returns samples of this shape on the CPU.
Prior = Callable[[tuple[int, ...], torch.Generator], Tensor]


def weights_hash(model: nn.Module) -> str:
    """Digest of all weights and buffers of a model: names, types, shapes and every byte.

    Wrappers that put ``module.`` or ``_orig_mod.`` before the names do not change it.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            plain = name.replace("_orig_mod.", "").removeprefix("module.")
            digest.update(f"{plain} {value.dtype} {tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


class PairCache(Dataset[tuple[Any, ...]]):
    """The finished pairs of a folder as a data set of ``(x0, x1)``, or ``(x0, x1, condition)`` if they have conditions.

    Files are read as they are asked for, also from the workers of a loader.

    Args:
        folder: written by `generate_pairs`.
        model: the flow that they must come from, or its identity; None takes any.

    Raises:
        FileNotFoundError: no manifest there.
        ValueError: another format, pairs of another model, or shards that are missing.
    """

    def __init__(self, folder: str | os.PathLike[str], model: VelocityModel | Denoiser | str | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        if model is not None:
            _compare({"model": model if isinstance(model, str) else _identity(model, None)}, self.manifest, self.folder)
        missing = [number for number in range(self._shards) if not _shard(self.folder, number).is_file()]
        if missing:
            raise ValueError(
                f"{self.folder} misses {len(missing)} of {self._shards} shards: run generate_pairs with the same "
                "arguments again, which makes the rest"
            )
        self._open: dict[int, Any] = {}

    @property
    def _shards(self) -> int:
        return -(-self.manifest["count"] // self.manifest["shard_size"])

    def __len__(self) -> int:
        return self.manifest["count"]

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}")
        number, place = divmod(index % len(self), self.manifest["shard_size"])
        if number not in self._open:
            self._open[number] = safe_open(_shard(self.folder, number), framework="pt")
        file = self._open[number]
        pair = tuple(file.get_slice(name)[place] for name in ("x0", "x1"))
        names = self.manifest["conditions"]
        return (*pair, {name: file.get_slice(f"condition.{name}")[place] for name in names}) if names else pair

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def load(self) -> Pairs:
        """All pairs in memory, without conditions."""
        shards = [load_file(_shard(self.folder, number)) for number in range(self._shards)]
        return Pairs(torch.cat([part["x0"] for part in shards]), torch.cat([part["x1"] for part in shards]))


def generate_pairs(
    model: VelocityModel | Denoiser,
    folder: str | os.PathLike[str],
    count: int,
    shape: Sequence[int],
    *,
    seed: int,
    steps: int = 50,
    solver: str | Solver | None = None,
    prior: Prior | None = None,
    condition: Mapping[str, Tensor] | None = None,
    batch_size: int = 256,
    shard_size: int = 4096,
    identity: str | None = None,
    accelerator: Any = None,
) -> PairCache:
    """Run a flow from samples of the prior and keep start and end of each.

    Run it again after a stop, with the same arguments: shards that are there are kept, the rest is made, and the
    pairs are those of a run without a stop. Take the weights' moving average for the model, and an accurate solver:
    what the pairs get wrong, the next flow learns.

    Args:
        model: velocities ``model(x, t, **condition)`` with t in 0..1, see `FlowNetwork` for networks of diffusers; or a
            `Denoiser` of any process, to straighten a diffusion model. A module is in evaluation mode meanwhile.
        folder: of the cache.
        count: how many pairs; authors advise a million for small pictures.
        shape: of one sample.
        seed: of the prior, at least 0; each shard has its own stream.
        steps: intervals of the solver, as accurate as the pairs have to be.
        solver: a name of ``SOLVERS`` or a solver; `RK4`, with four calls in each interval, unless given.
        prior: draws the starts; standard Gaussian unless given. Its name goes into the manifest.
        condition: keyword arguments of the model, tensors (count, ...), such as ``{"class_labels": labels}``; kept.
        batch_size: pairs at a time.
        shard_size: pairs in each file.
        identity: what the pairs belong to, in place of the digest of the weights; needed if the model is no module.
        accelerator: an ``accelerate.Accelerator``: its processes share the shards.

    Returns:
        The finished cache.

    Raises:
        ValueError: numbers out of range, conditions of another length, no identity, or a folder that holds pairs of
            another model or of other settings.
        FloatingPointError: the model gave a value that is not finite.

    Source: Scientific Spaces archive 9497; arXiv:2209.03003.
    """
    for name, value, least in (
        ("count", count, 1), ("steps", steps, 1), ("batch_size", batch_size, 1), ("shard_size", shard_size, 1),
        ("seed", seed, 0),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    condition = dict(condition or {})
    for name, tensor in condition.items():
        if len(tensor) != count:
            raise ValueError(f"condition {name!r} must have one entry for each of the {count} pairs, got {len(tensor)}")
    chosen = find_solver(RK4() if solver is None else solver)
    folder = Path(folder)
    manifest = {
        "format": FORMAT,
        "model": _identity(model, identity),
        "count": count,
        "shape": list(shape),
        "seed": seed,
        "steps": steps,
        "solver": repr(chosen),
        "prior": "gaussian" if prior is None else getattr(prior, "__qualname__", type(prior).__name__),
        "conditions": {name: _digest(tensor) for name, tensor in sorted(condition.items())},
        "shard_size": shard_size,
    }
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    if rank == 0 and not (folder / MANIFEST).is_file():
        write_whole(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    if accelerator is not None:
        accelerator.wait_for_everyone()
    _compare(manifest, _read_manifest(folder), folder)
    shards = [number for number in range(-(-count // shard_size)) if not _shard(folder, number).is_file()]
    module = model.model if isinstance(model, Denoiser) else model
    modes = {part: part.training for part in module.modules()} if isinstance(module, nn.Module) else {}
    for part in modes:
        part.training = False
    try:
        # The share of a process does not depend on what is left: two that look at different moments share all the same.
        for number in watched([number for number in shards if number % world == rank], "pairs"):
            first, last = number * shard_size, min(count, (number + 1) * shard_size)
            given = {name: tensor[first:last] for name, tensor in condition.items()}
            x1 = _starts(prior, (last - first, *shape), seed, number)
            x0 = [
                _end(
                    model,
                    x1[at : at + batch_size],
                    {k: v[at : at + batch_size] for k, v in given.items()},
                    chosen,
                    steps,
                )
                for at in range(0, len(x1), batch_size)
            ]
            tensors = {"x0": torch.cat(x0), "x1": x1, **{f"condition.{name}": value for name, value in given.items()}}
            with replacing(_shard(folder, number)) as temporary:
                save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
    finally:
        for part, mode in modes.items():
            part.training = mode
    if accelerator is not None:
        accelerator.wait_for_everyone()
    logger.debug("%d pairs in %s", count, folder)
    return PairCache(folder)


def _end(
    model: VelocityModel | Denoiser, x1: Tensor, condition: dict[str, Tensor], solver: Solver, steps: int
) -> Tensor:
    """Where the flow carries these starts."""
    given = model if isinstance(model, Denoiser) else Denoiser(model, RectifiedFlow(), "velocity")
    home = home_of(given.model)
    device = torch.device("cpu") if home is None else home[0]
    there = {name: value.to(device) for name, value in condition.items()}
    denoiser = Denoiser(lambda x, t: predict(given.model, x, t, there), given.process, given.prediction)
    output = sample(denoiser, solver=solver, steps=steps, noise=x1.to(device), progress=None)
    return output.samples.cpu()


def _starts(prior: Prior | None, shape: tuple[int, ...], seed: int, number: int) -> Tensor:
    # The generator of torch takes 32 bits of a seed; for one seed, all shards differ.
    generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + number) % 2**32)
    if prior is None:
        return draw_noise(shape, generator, torch.float32, torch.device("cpu"))
    x1 = prior(shape, generator)
    if tuple(x1.shape) != shape or not x1.is_floating_point():
        raise ValueError(f"prior must return floating-point samples of shape {shape}, got {x1.dtype} {tuple(x1.shape)}")
    return x1


def _identity(model: VelocityModel | Denoiser, identity: str | None) -> str:
    if identity is not None:
        return identity
    module = model.model if isinstance(model, Denoiser) else model
    if not isinstance(module, nn.Module):
        raise ValueError(f"identity must be given for a model that is no module, got a {type(module).__name__}")
    return weights_hash(module)


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(
        f"{tensor.dtype} {tuple(tensor.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes()
    ).hexdigest()


def _shard(folder: Path, number: int) -> Path:
    return folder / f"pairs-{number:06d}.safetensors"


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {MANIFEST}: generate_pairs writes one")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} must have format {FORMAT}, got {manifest.get('format')}: make the pairs again")
    return manifest


def _compare(wanted: Mapping[str, Any], found: Mapping[str, Any], folder: Path) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            whose = "weights of another model" if name == "model" else f"{name} = {found.get(name)!r}, not {value!r}"
            raise ValueError(f"the pairs in {folder} were made with {whose}: give another folder, or delete this one")
