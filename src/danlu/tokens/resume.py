"""A folder of finished shards, from which an interrupted training goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from danlu.files import replacing, write_whole
from danlu.tokens.mapping import Arrays

_FORMAT = "danlu.tokens.training"
_VERSION = 1


class Work:
    """Results of shards in a folder, each written whole.

    Args:
        folder: made if missing.
        settings: everything that the results depend on; JSON values.

    Raises:
        ValueError: the folder holds the results of other settings, or is not such a folder.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self._folder = folder
        manifest = folder / "manifest.json"
        wanted = {"format": _FORMAT, "version": _VERSION, **settings}
        if not manifest.exists():
            if folder.is_dir() and any(folder.glob("*.safetensors")):
                raise ValueError(f"work_dir {folder} has results but no manifest.json: choose an empty folder")
            write_whole(manifest, json.dumps(wanted, indent=2) + "\n")
            return
        try:
            found = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"work_dir {folder} has a manifest.json that is not readable: choose an empty folder")
        for name, value in wanted.items():
            if found.get(name) != value:
                raise ValueError(
                    f"work_dir {folder} belongs to another training: {name} is {found.get(name)!r} there and {value!r} "
                    "now; choose an empty folder, or train with the same corpus and options"
                )

    def _path(self, what: str, index: int) -> Path:
        return self._folder / f"{what}-{index:06d}.safetensors"

    def load(self, what: str, index: int) -> Arrays | None:
        """The result of a shard, or None where there is none yet."""
        path = self._path(what, index)
        return load_file(path) if path.exists() else None

    def save(self, what: str, index: int, arrays: Arrays) -> None:
        """Keep the result of a shard."""
        with replacing(self._path(what, index)) as temporary:
            save_file(arrays, temporary)
