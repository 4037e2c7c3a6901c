"""A claim of a source, the evidence that a run measured for it here, and the verdict that follows by a written rule."""

from __future__ import annotations

import datetime
import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

FORMAT = 1
HOLDS, HOLDS_IN_PART, DOES_NOT_HOLD = "holds", "holds in part", "does not hold here"
VERDICTS = (HOLDS, HOLDS_IN_PART, DOES_NOT_HOLD)

Cell = str | float | int | None
T = TypeVar("T")


@dataclass(frozen=True)
class Check:
    """One yes-or-no part of a criterion: the threshold in words, what was measured, and whether it was met."""

    description: str
    met: bool
    measured: str = ""

    def __post_init__(self) -> None:
        # A comparison of tensors or NumPy scalars gives its own kind of bool, which JSON refuses.
        object.__setattr__(self, "met", bool(self.met))


@dataclass(frozen=True)
class Table:
    """Measured numbers: one header, rows of equal width."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "rows", tuple(tuple(_plain(cell) for cell in row) for row in self.rows))
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"every row of table {self.title!r} must have {len(self.columns)} cells, got {len(row)}: {row}"
                )


@dataclass(frozen=True)
class Plot:
    """Lines over one axis, kept as numbers so that a figure can be drawn again without a new run.

    With ``x_names`` the axis has kinds instead of numbers, and there are points without lines.
    """

    title: str
    x_label: str
    y_label: str
    x: tuple[float, ...]
    lines: Mapping[str, tuple[float | None, ...]]
    log_x: bool = False
    x_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "x_names", tuple(self.x_names))
        if len(self.x_names) not in (0, len(self.x)):
            raise ValueError(f"x_names must name all {len(self.x)} points, got {len(self.x_names)}")
        object.__setattr__(self, "x", tuple(_plain(value) for value in self.x))
        lines = {name: tuple(_plain(value) for value in values) for name, values in self.lines.items()}
        object.__setattr__(self, "lines", lines)
        for name, values in lines.items():
            if len(values) != len(self.x):
                raise ValueError(f"line {name!r} must have {len(self.x)} points, got {len(values)}")


@dataclass(frozen=True)
class Evidence:
    """What one run of a claim measured.

    Args:
        summary: one sentence with the numbers that decide.
        checks: the criterion, at least one check.
        tables: the measured numbers.
        plots: at least one line plot; the runner draws them into one figure.
        notes: departures from the source's setting, one sentence each.
    """

    summary: str
    checks: tuple[Check, ...]
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("checks", "tables", "plots", "notes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.checks:
            raise ValueError("checks must hold at least one check: a verdict needs a criterion, got none")

    @property
    def verdict(self) -> str:
        """The verdict that the checks give."""
        return verdict(self.checks)


@dataclass(frozen=True)
class Context:
    """What the runner hands to a claim.

    Args:
        seeds: seeds to repeat a training over; the first alone where one is enough.
        cache: folder for trained toy weights.
        model: folder of the language model for the claims that read text.
        track: wraps an iterable in a progress bar (or in nothing): ``track(iterable, description, total)``.
    """

    seeds: tuple[int, ...]
    cache: Path
    model: Path | None = None
    track: Callable[..., Iterable[Any]] = field(default=lambda items, description="", total=None: items)


@dataclass(frozen=True)
class Claim:
    """A source's statement and the experiment that tests it.

    Args:
        name: lower-case words joined by hyphens; also the file name of the result.
        title: a short heading.
        source: archive numbers and papers.
        statement: what the source says, in one sentence.
        measurement: what is measured here, and how.
        experiment: takes a ``Context``, returns ``Evidence``.
        seeds: seeds of the default run.
        budget: expected seconds on one core.
    """

    name: str
    title: str
    source: str
    statement: str
    measurement: str
    experiment: Callable[[Context], Evidence]
    seeds: tuple[int, ...] = (0,)
    budget: float = 120.0


@dataclass(frozen=True)
class Record:
    """A finished run: the claim in words, its evidence, and where and when it was measured."""

    name: str
    title: str
    source: str
    statement: str
    measurement: str
    seeds: tuple[int, ...]
    evidence: Evidence
    environment: dict[str, Any]

    @property
    def verdict(self) -> str:
        """The verdict of the evidence."""
        return self.evidence.verdict

    def to_json(self) -> str:
        """The record as a JSON document with its format number."""
        document = {"format": FORMAT, **asdict(self), "verdict": self.verdict}
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Read a record back.

        Raises:
            ValueError: not a record, another format, or a verdict that the checks do not give.
        """
        try:
            document = json.loads(text)
            version = document["format"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"not a lab record: {error}; run the claim again with --force") from error
        if version != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {version}; run the claim again with --force")
        raw = document["evidence"]
        evidence = Evidence(
            summary=raw["summary"],
            checks=tuple(Check(**check) for check in raw["checks"]),
            tables=tuple(Table(**table) for table in raw["tables"]),
            plots=tuple(Plot(**plot) for plot in raw["plots"]),
            notes=tuple(raw["notes"]),
        )
        words = {key: document[key] for key in ("name", "title", "source", "statement", "measurement", "environment")}
        record = cls(**words, seeds=tuple(document["seeds"]), evidence=evidence)
        if document["verdict"] != record.verdict:
            raise ValueError(
                f"verdict must be {record.verdict!r} by the checks of {record.name!r}, got {document['verdict']!r}; "
                "run the claim again with --force"
            )
        return record


def verdict(checks: Sequence[Check]) -> str:
    """All checks met: holds; some: holds in part; none: does not hold here.

    Args:
        checks: the criterion, at least one check.

    Returns:
        One of ``VERDICTS``.

    Raises:
        ValueError: no checks.
    """
    if not checks:
        raise ValueError("checks must hold at least one check, got none")
    met = sum(check.met for check in checks)
    if met == len(checks):
        return HOLDS
    return HOLDS_IN_PART if met else DOES_NOT_HOLD


def environment(seconds: float) -> dict[str, Any]:
    """Versions, date, seconds and threads, for the record of a run."""
    import torch
    import transformers

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }


def _plain(value: Any) -> Any:
    """A JSON scalar: tensor and NumPy scalars become Python numbers, non-finite numbers None."""
    if value is None or isinstance(value, str | bool | int):
        return value
    number = value.item() if hasattr(value, "item") else value
    return None if isinstance(number, float) and not math.isfinite(number) else number
