"""Registry, runner and result files of the lab."""

from __future__ import annotations

import importlib
import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from danlu.files import write_whole
from danlu.lab.claim import Claim, Context, Evidence, Record, environment

logger = logging.getLogger("danlu.lab")

#: Where results go unless the caller says otherwise.
DIRECTORY = Path("build/lab")
#: One module per method family; importing it registers its claims. The order is the order of the gallery.
FAMILIES = (
    "positions",
    "rerope",
    "robustness",
    "scale",
    "concentration",
    "compression",
    "segmentation",
    "optimisers",
    "low_rank",
    "multitask",
    "emo",
    "ladder",
    "growth",
    "deepnorm",
    "masks",
    "latent",
    "conversion",
    "linear",
    "recurrent",
    "encoders",
    "naive_bayes",
    "diffusion",
    "ode",
    "amed",
    "flow",
    "quantizers",
    "qb_heat",
    "continuous",
    "papers_ingest",
    "papers_search",
    "papers_answer",
)

_CLAIMS: dict[str, Claim] = {}


class UnknownClaim(ValueError):
    """No claim has this name."""


def claim(**words: Any) -> Callable[[Callable[[Context], Evidence]], Claim]:
    """Decorator that turns an experiment into a registered ``Claim``.

    Args:
        words: the fields of ``Claim`` but ``experiment``.

    Raises:
        ValueError: the name is taken.
    """

    def register(experiment: Callable[[Context], Evidence]) -> Claim:
        made = Claim(experiment=experiment, **words)
        if made.name in _CLAIMS:
            raise ValueError(f"name must be new, got {made.name!r}, which {_CLAIMS[made.name].title!r} has")
        _CLAIMS[made.name] = made
        return made

    return register


def claims() -> dict[str, Claim]:
    """All claims by name, in the order of their families."""
    for family in FAMILIES:
        importlib.import_module(f"danlu.lab.{family}")
    return dict(_CLAIMS)


def find(name: str) -> Claim:
    """The claim of this name.

    Raises:
        UnknownClaim: there is none; the message names the nearest.
    """
    known = claims()
    if name in known:
        return known[name]
    near = get_close_matches(name, known, n=1, cutoff=0.0)
    raise UnknownClaim(f"no claim is named {name!r}; the nearest is {near[0]!r} (all: {', '.join(known)})")


def record_path(name: str, directory: Path = DIRECTORY) -> Path:
    """Where the record of a claim lies."""
    return directory / f"{name}.json"


def load(name: str, directory: Path = DIRECTORY) -> Record | None:
    """The finished record of a claim, or None where there is none.

    Raises:
        ValueError: the file is there but is no record of this format.
    """
    path = record_path(name, directory)
    if not path.is_file():
        return None
    try:
        return Record.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def run(
    subject: Claim,
    *,
    directory: Path = DIRECTORY,
    seeds: tuple[int, ...] | None = None,
    model: Path | None = None,
    force: bool = False,
    track: Callable[..., Iterable[Any]] | None = None,
) -> Record:
    """Run a claim, write its record and figure, and return the record; a finished claim is not run again.

    Args:
        subject: the claim.
        directory: where records, figures and cached weights go.
        seeds: seeds in place of the claim's own.
        model: folder of the language model for claims that read text; None is the bundled one.
        force: run also when a record exists.
        track: progress bar factory, see ``Context``.

    Returns:
        The record, new or found.

    Raises:
        ValueError: a record exists that cannot be read, and ``force`` is off.
    """
    if not force and (found := load(subject.name, directory)) is not None:
        logger.info("%s is finished; force runs it again", subject.name)
        return found
    context = Context(seeds=seeds or subject.seeds, cache=directory / "cache", model=model)
    if track is not None:
        context = replace(context, track=track)
    begin = time.perf_counter()
    evidence = subject.experiment(context)
    record = Record(
        name=subject.name,
        title=subject.title,
        source=subject.source,
        statement=subject.statement,
        measurement=subject.measurement,
        seeds=context.seeds,
        evidence=evidence,
        environment=environment(time.perf_counter() - begin),
    )
    from danlu.lab.gallery import draw

    draw(record, directory)
    write_whole(record_path(subject.name, directory), record.to_json())
    write_results(directory)
    return record


def finished(directory: Path = DIRECTORY) -> list[Record]:
    """All finished records, in the order of the claims."""
    return [record for name in claims() if (record := load(name, directory)) is not None]


def write_results(directory: Path = DIRECTORY) -> Path:
    """Write ``results.json``: one short entry per finished claim, for the documentation and the README."""
    entries = [
        {
            "name": record.name,
            "title": record.title,
            "source": record.source,
            "statement": record.statement,
            "verdict": record.verdict,
            "summary": record.evidence.summary,
            "seconds": record.environment["seconds"],
            "figure": f"figures/{record.name}.png" if record.evidence.plots else None,
        }
        for record in finished(directory)
    ]
    path = directory / "results.json"
    write_whole(path, json.dumps({"claims": entries}, indent=2, ensure_ascii=False) + "\n")
    return path
