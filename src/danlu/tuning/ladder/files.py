"""A ladder's own weights and configuration on disk; the backbone is never written."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from danlu.files import replacing, write_whole
from danlu.tuning.ladder.cache import fingerprint
from danlu.tuning.ladder.config import FORMAT, LadderConfig

WEIGHTS = "model.safetensors"  # the name by which the host's Trainer finds weights when it resumes
CONFIG = "ladder_config.json"
FROZEN = "backbone."
_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


def identity(base: nn.Module, config: Any) -> dict[str, Any]:
    """What a ladder remembers of its backbone: shape and a fingerprint of the weights."""
    return {**{key: getattr(config, key, None) for key in _SHAPE}, "fingerprint": fingerprint(base)}


def write_ladder(folder: Path, config: LadderConfig, backbone: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Write configuration and weights, leaving out the backbone's."""
    from safetensors.torch import save_file

    own = {name: w.detach().contiguous().cpu() for name, w in weights.items() if not name.startswith(FROZEN)}
    with replacing(folder / WEIGHTS) as temporary:
        save_file(own, temporary, metadata={"format": "pt"})
    document = {"format": FORMAT, "ladder": asdict(config), "backbone": backbone}
    write_whole(folder / CONFIG, json.dumps(document, indent=2) + "\n")


def read_ladder(folder: Path, backbone: Any) -> tuple[LadderConfig, dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`write_ladder` wrote, for a backbone of the same shape.

    Returns:
        Configuration, the identity of the backbone that it was trained on, and the weights.

    Raises:
        FileNotFoundError: no ladder there.
        ValueError: a damaged file, another format, or a backbone of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} holds no ladder: {CONFIG} and {WEIGHTS} must be there")
    try:
        document = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {document['format']}")
        config = LadderConfig.from_json(json.dumps(document["ladder"]))
        saved: dict[str, Any] = document["backbone"]
        weights: dict[str, Tensor] = load_file(folder / WEIGHTS)
        expected = {key: saved[key] for key in _SHAPE}
    except (json.JSONDecodeError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder} holds a damaged ladder: {error!r}") from error
    shape = {key: getattr(backbone.config, key, None) for key in _SHAPE}
    if shape != expected:
        raise ValueError(f"backbone must be of the shape that the ladder was trained on, {expected}, got {shape}")
    return config, saved, weights
