"""What a frozen backbone says about a data set, computed once, kept on disk, and read back in every epoch after."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from danlu.files import replacing, write_whole

logger = logging.getLogger("danlu.tuning")

FORMAT = 1
MANIFEST = "features.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_SAMPLED = 1024  # numbers of each tensor that go into a fingerprint


def fingerprint(model: nn.Module) -> str:
    """A digest of a model's weights: name, type, shape and about a thousand evenly spaced numbers of each tensor.

    It costs milliseconds, not a pass over all weights; training any layer changes it.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, value in sorted(model.state_dict().items()):
        tensors = [x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, Tensor)]
        for tensor in tensors:
            tensor = tensor.int_repr() if tensor.is_quantized else tensor
            flat = tensor.detach().flatten()
            flat = flat[:: max(1, flat.numel() // _SAMPLED)].cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


def data_fingerprint(dataset: Sequence[Mapping[str, Any]]) -> tuple[str, list[int]]:
    """A digest of everything in a data set that the backbone reads, and the length of each example."""
    digest, lengths = hashlib.sha256(), []
    for index in range(len(dataset)):
        example = dataset[index]
        if "input_ids" not in example:
            raise ValueError(f"dataset must hold input_ids, example {index} has {', '.join(example)}")
        lengths.append(len(example["input_ids"]))
        for name in INPUTS:
            if name in example:
                row = torch.as_tensor(example[name]).to(torch.int64).cpu()
                digest.update(name.encode() + row.numpy().tobytes())
    return digest.hexdigest(), lengths


@dataclass(frozen=True)
class Plan:
    """Which example goes to which file, and what the files belong to.

    Args:
        identity: digest of backbone, layers, data and dtype.
        lengths: tokens of each example.
        starts: first example of each shard.
        links: states kept for each token.
        hidden: width of a state.
        dtype: of the states.
    """

    identity: str
    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    links: int
    hidden: int
    dtype: str

    def shard(self, number: int) -> range:
        """The examples of a shard."""
        ends = (*self.starts[1:], len(self.lengths))
        return range(self.starts[number], ends[number])

    def write(self, folder: Path) -> None:
        """Write the manifest, or check that the one there is this one.

        Raises:
            ValueError: the folder holds the features of something else.
        """
        text = json.dumps({"format": FORMAT, **vars(self)}) + "\n"
        path = folder / MANIFEST
        if path.is_file():
            check_identity(read_plan(folder), self.identity, folder)
        else:
            write_whole(path, text)


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"features-{number:05d}.safetensors"


def read_plan(folder: Path) -> Plan:
    """Read the manifest of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: another format, or a damaged file.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no features: run precompute first")
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if (version := values.pop("format")) != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {version}")
        options: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return Plan(**options)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete the folder and run precompute again") from error


def check_identity(found: Plan, identity: str, folder: Path) -> None:
    """Refuse features of another backbone, other layers, other data or another dtype."""
    if found.identity != identity:
        raise ValueError(
            f"{folder} holds features of another backbone, other layers, other data or another dtype; delete it or "
            "choose another folder"
        )


def make_plan(
    dataset: Sequence[Mapping[str, Any]],
    backbone: nn.Module,
    what: str,
    links: int,
    hidden: int,
    dtype: str,
    shard_tokens: int,
) -> Plan:
    """Plan the files for a data set.

    Args:
        dataset: examples with ``input_ids`` of any length.
        backbone: whose states are kept.
        what: anything else the states depend on, in words.
        links: states for each token.
        hidden: width of a state.
        dtype: a key of ``DTYPES``.
        shard_tokens: a shard is closed once it holds so many tokens.

    Raises:
        ValueError: unknown dtype, no examples, an empty example, or a shard of no tokens.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be at least 1, got {shard_tokens}")
    data, lengths = data_fingerprint(dataset)
    if not lengths or min(lengths) < 1:
        raise ValueError(f"dataset must hold examples of at least one token, got lengths {lengths[:5]}")
    identity = hashlib.sha256(f"{fingerprint(backbone)} {what} {data} {dtype}".encode()).hexdigest()
    starts, held = [0], 0
    for index, length in enumerate(lengths[:-1]):
        held += length
        if held >= shard_tokens:
            starts.append(index + 1)
            held = 0
    return Plan(identity, tuple(lengths), tuple(starts), links, hidden, dtype)


def write_shards(
    plan: Plan,
    folder: Path,
    states_of: Callable[[list[int]], list[Tensor]],
    batch_size: int,
    progress: Callable[[int, int, str], None] | None,
) -> None:
    """Write every shard that is not there yet; each appears whole or not at all.

    Args:
        plan: from :func:`make_plan`.
        folder: where the files go.
        states_of: indices of examples to their states, each (links, length, hidden).
        batch_size: examples at a time.
        progress: called with (done, total, what), counting examples.

    Raises:
        ValueError: a state that the dtype cannot hold.
    """
    from safetensors.torch import save_file

    plan.write(folder)
    for number in range(len(plan.starts)):
        path = shard_path(folder, number)
        if path.is_file():
            continue
        tensors, examples = {}, list(plan.shard(number))
        for first in range(0, len(examples), batch_size):
            part = examples[first : first + batch_size]
            if progress is not None:
                progress(part[0], len(plan.lengths), "features")
            for index, states in zip(part, states_of(part), strict=True):
                stored = states.to("cpu", DTYPES[plan.dtype])
                if not torch.isfinite(stored).all():
                    raise ValueError(
                        f"states of example {index} do not fit into {plan.dtype} (largest is "
                        f"{states.abs().max():.3g}); use dtype='bfloat16' or 'float32'"
                    )
                tensors[str(index)] = stored.contiguous()
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"identity": plan.identity})
        logger.debug("wrote %s", path)


class LadderFeatures(Dataset[dict[str, Any]]):
    """A data set with its examples' backbone states beside their own columns.

    Args:
        dataset: the examples that the features were computed from.
        folder: written by ``LadderModel.precompute``.
        plan: its manifest.

    Raises:
        ValueError: a shard that is missing or belongs to something else.
    """

    def __init__(self, dataset: Sequence[Mapping[str, Any]], folder: Path, plan: Plan) -> None:
        from safetensors import SafetensorError, safe_open

        self.dataset, self.folder, self.plan = dataset, folder, plan
        self._shard_of = [number for number in range(len(plan.starts)) for _ in plan.shard(number)]
        self._files: dict[int, Any] = {}
        for number in range(len(plan.starts)):
            path = shard_path(folder, number)
            try:
                with safe_open(path, framework="pt") as file:
                    mine = (file.metadata() or {}).get("identity") == plan.identity
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} is missing or damaged ({error}); run precompute again") from error
            if not mine:
                raise ValueError(f"{path} belongs to other features; delete the folder and run precompute again")

    def __len__(self) -> int:
        return len(self.plan.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The example's own columns and ``features`` (links, length, hidden)."""
        from safetensors import safe_open

        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}")
        index %= len(self)
        number = self._shard_of[index]
        if number not in self._files:
            self._files[number] = safe_open(shard_path(self.folder, number), framework="pt")
        return {**self.dataset[index], "features": self._files[number].get_tensor(str(index))}

    def __getstate__(self) -> dict[str, Any]:
        # open files do not travel to worker processes
        return {**self.__dict__, "_files": {}}


@dataclass(frozen=True)
class PadRight:
    """Collate examples of different lengths, with or without features, padding on the right.

    Args:
        pad_token_id: id for padded places.
    """

    pad_token_id: int = 0

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """One batch; an ``attention_mask`` is made where the examples have none."""
        rows = [{name: torch.as_tensor(value) for name, value in example.items()} for example in examples]
        for row in rows:
            row.setdefault("attention_mask", torch.ones(len(row["input_ids"]), dtype=torch.int64))
        width = max(len(row["input_ids"]) for row in rows)
        fills = {"input_ids": self.pad_token_id, "labels": -100}
        batch = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if values[0].ndim:  # the length is the last axis, or the one before the width of features
                axis = 1 if name == "features" else 0
                values = [_pad(value, axis, width, fills.get(name, 0)) for value in values]
            batch[name] = torch.stack(values)
        return batch


def _pad(value: Tensor, axis: int, width: int, fill: int) -> Tensor:
    missing = width - value.shape[axis]
    if not missing:
        return value
    shape = list(value.shape)
    shape[axis] = missing
    return torch.cat((value, value.new_full(shape, fill)), axis)
