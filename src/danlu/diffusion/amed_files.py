"""A trained AMED solver on disk: one JSON document, and safetensors for the weights of a predictor. No pickles."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from danlu.diffusion import processes
from danlu.diffusion.amed import AMED
from danlu.diffusion.amed_predictor import AMEDPredictor, Features
from danlu.diffusion.amed_table import AMEDTable
from danlu.diffusion.process import Process
from danlu.files import replacing_folder, write_whole

FORMAT = 1
CONFIG, WEIGHTS = "amed_config.json", "amed.safetensors"


def write_amed(amed: AMED, folder: str | Path) -> Path:
    """Write a solver; what was in the folder is replaced.

    Raises:
        ValueError: the folder holds files of something else.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    others = sorted({path.name for path in folder.glob("*")} - {CONFIG, WEIGHTS}) if folder.is_dir() else []
    if others:
        raise ValueError(f"folder must be new or hold a solver alone, but {folder} holds {', '.join(others[:3])}")
    predictor = amed.coefficients if isinstance(amed.coefficients, AMEDPredictor) else None
    table = amed.average if isinstance(amed.coefficients, AMEDPredictor) else amed.coefficients
    document = {
        "format": FORMAT,
        "process": _described(amed.process),
        "times": amed.times.tolist(),
        "ratios": amed.ratios.tolist(),
        "base": amed.base,
        "order": amed.order,
        "afs": amed.afs,
        "features": amed.features if isinstance(amed.features, str) else "callable",
        "shape": None if amed.shape is None else list(amed.shape),
        "predictor": None if predictor is None else _shape_of(predictor),
        "table": None if table is None else {name: list(values) for name, values in asdict(table).items()},
        "errors": dict(amed.errors),
    }
    with replacing_folder(folder) as new:
        write_whole(new / CONFIG, json.dumps(document, indent=2, allow_nan=False) + "\n")
        if predictor is not None:
            weights = {name: weight.detach().cpu().contiguous() for name, weight in predictor.state_dict().items()}
            save_file(weights, new / WEIGHTS, metadata={"format": "pt"})
    return folder


def read_amed(folder: str | Path, process: Process | None, features: str | Features | None) -> AMED:
    """Read a solver; see `AMED.load`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no AMED solver: {CONFIG} is missing")
    try:
        document = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {document['format']}")
        process = _checked(process, document)
        predictor, table = document["predictor"], document["table"]
        average = None if table is None else AMEDTable(**{name: tuple(values) for name, values in table.items()})
        coefficients: AMEDTable | AMEDPredictor | None = average
        if predictor is not None:
            coefficients = AMEDPredictor(**predictor)
            coefficients.load_state_dict(load_file(folder / WEIGHTS))
            coefficients.eval().requires_grad_(False)
        if coefficients is None:
            raise ValueError("neither a predictor nor a table")
        kind = document["features"] if features is None else features
        if kind == "callable":
            raise ValueError(f"features must be given: the predictor in {folder} was trained with a callable")
        return AMED(
            process,
            torch.tensor(document["times"], dtype=torch.float64),
            coefficients,
            document["base"],
            document["order"],
            document["afs"],
            kind,
            None if document["shape"] is None else tuple(document["shape"]),
            average if predictor is not None else None,
            document["errors"],
        )
    except (json.JSONDecodeError, KeyError, TypeError, RuntimeError, OSError, SafetensorError) as error:
        raise ValueError(f"{folder} holds a damaged AMED solver: {error!r}") from error


def _shape_of(predictor: AMEDPredictor) -> dict[str, Any]:
    r = None if predictor.intervals is None else [0.5] * predictor.intervals
    return {"r": r, "scale_c": predictor.scale_c, "scale_a": predictor.scale_a}


def _described(process: Process) -> dict[str, Any]:
    """Name and numbers of a process; no numbers for one that is more than a few of them."""
    names = getattr(process, "__dataclass_fields__", None)
    values = None if names is None else {name: getattr(process, name) for name in names}
    if values is not None and not all(isinstance(value, int | float | str) for value in values.values()):
        values = None
    return {"name": type(process).__name__, "parameters": values}


def _checked(process: Process | None, document: dict[str, Any]) -> Process:
    """The process of a document, or the one given once it is known to have the same noise ratios."""
    name, parameters = document["process"]["name"], document["process"]["parameters"]
    kind = getattr(processes, name, None)
    if process is None:
        if parameters is None or not (isinstance(kind, type) and issubclass(kind, Process)):
            raise ValueError(f"process must be given: a {name} is more than its name and a few numbers")
        return kind(**parameters)
    times = torch.tensor(document["times"], dtype=torch.float64)
    expected = torch.tensor(document["ratios"], dtype=torch.float64)
    inside = bool(((times >= process.t_min - 1e-6) & (times <= process.t_max + 1e-6)).all())
    if not inside or not torch.allclose(process.noise_ratio(times), expected, rtol=1e-4, atol=0):
        raise ValueError(
            f"process must be the one that the solver was trained for, {name} {parameters}, got {process!r}"
        )
    return process
