"""What a run came to: curves, a table, and one HTML page that opens anywhere and fetches nothing."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danlu.context.figures import COLOURS
from danlu.context.memory import readable
from danlu.context.page import as_svg, fill
from danlu.files import write_whole
from danlu.training.tables import Recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

FORMAT = 1


@dataclass(frozen=True)
class TrainingReport:
    """One run, also of several sittings.

    Args:
        name: of the recipe.
        recipe: its values.
        rows: points of the curves by step; a key is there where it was measured.
        parameters: of the model, tied ones once.
        trainable: those that were trained.
        seconds: of the last sitting.
        processes: that trained together.
        versions: of the libraries.
    """

    name: str
    recipe: dict[str, Any]
    rows: tuple[dict[str, float], ...]
    parameters: int
    trainable: int
    seconds: float
    processes: int = 1
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def gather(cls, recipe: Recipe, folder: Path, model: Any, seconds: float, processes: int) -> TrainingReport:
        """The report of a run from its folder and its model."""
        import torch
        import transformers

        from danlu.training.metrics import read_rows

        parameters = list(model.parameters())
        return cls(
            name=recipe.name,
            recipe=recipe.model_dump(mode="json", exclude_none=True),
            rows=tuple(read_rows(folder / "metrics.jsonl")),
            parameters=sum(parameter.numel() for parameter in parameters),
            trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            seconds=seconds,
            processes=processes,
            versions={"torch": torch.__version__, "transformers": transformers.__version__},
        )

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one measured quantity, such as ``loss`` or ``validation_loss``."""
        points = [(row["step"], row[key]) for row in self.rows if key in row]
        return [step for step, _ in points], [value for _, value in points]

    def last(self, key: str) -> float | None:
        """The last value of a quantity, if it was measured."""
        values = self.curve(key)[1]
        return values[-1] if values else None

    def summary(self) -> list[tuple[str, str]]:
        """The run in a few lines: name and value."""
        speeds = sorted(self.curve("tokens_per_second")[1])
        losses = self.curve("loss")[1]
        lines = [("steps", f"{self.rows[-1]['step']:,.0f}" if self.rows else "0")]
        lines.append(("parameters", f"{self.parameters:,}" + (
            f", {self.trainable:,} trained" if self.trainable < self.parameters else "")))  # fmt: skip
        if losses:
            lines.append(("training loss", f"{losses[0]:.3f} → {losses[-1]:.3f} nats per token"))
        if (held := self.last("validation_loss")) is not None:
            lines.append(("validation loss", f"{held:.3f} nats per token, perplexity {math.exp(min(held, 700)):.1f}"))
        if speeds:
            lines.append(("speed", f"{speeds[len(speeds) // 2]:,.0f} tokens per second"))
        if (peak := self.last("peak_bytes")) is not None:
            lines.append(("peak memory", readable(peak)))
        if self.processes > 1:
            lines.append(("processes", str(self.processes)))
        lines.append(("time", f"{self.seconds:,.0f} s"))
        return lines

    def table(self) -> Table:
        """The summary as a ``rich`` table."""
        from rich.table import Table

        table = Table(title=self.name, show_header=False)
        for name, value in self.summary():
            table.add_row(name, value)
        return table

    def figures(self) -> list[tuple[str, Figure]]:
        """A plot for each of loss, speed, memory and learning rate."""
        from matplotlib.figure import Figure

        made = []
        for title, unit, pattern, scale in _PANELS:
            keys = tuple(name for name in self._names() if re.fullmatch(pattern, name))
            if keys:
                figure = Figure(figsize=(8, 3.6), layout="constrained")
                self._draw(figure.subplots(), unit, keys, scale)
                made.append((title, figure))
        return made

    def _names(self) -> list[str]:
        """Everything that was measured, in the order of its first point."""
        return list(dict.fromkeys(key for row in self.rows for key in row))

    def _draw(self, axes: Axes, unit: str, keys: tuple[str, ...], scale: float) -> None:
        for key, colour in zip(keys, COLOURS[4:] + COLOURS, strict=False):
            steps, values = self.curve(key)
            marker = "o" if len(steps) < 40 else None
            axes.plot(steps, [value / scale for value in values], label=key.replace("_", " "), color=colour,
                      marker=marker, markersize=3, linewidth=1.4)  # fmt: skip
        if len(keys) > 1:
            axes.legend(frameon=False)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)

    def to_json(self) -> str:
        """The report as a JSON document."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainingReport:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: not a report of this format.
        """
        values = json.loads(text)
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ValueError(f"not a training report of format {FORMAT}")
        return cls(**{**values, "rows": tuple(values["rows"])})

    def render(self) -> str:
        """The HTML page; names and values are escaped, only our own plots are markup."""
        from markupsafe import Markup

        plots = [(title, Markup(as_svg(figure, title))) for title, figure in self.figures()]
        return fill(
            Path(__file__).parent / "templates" / "report.html",
            report=self,
            plots=plots,
            recipe=json.dumps(self.recipe, indent=1, ensure_ascii=False),
        )

    def write(self, folder: Path) -> None:
        """Write ``report.html`` and ``report.json``; all is rendered before a file is touched."""
        page, document = self.render(), self.to_json()
        write_whole(folder / "report.html", page)
        write_whole(folder / "report.json", document)


#: Title, unit, which measured quantities share the axes, and what values are divided by.
_PANELS = (
    ("Loss", "nats per token", r".*loss", 1.0),
    ("Speed", "tokens per second", "tokens_per_second", 1.0),
    ("Peak memory", "MiB", "peak_bytes", float(1 << 20)),
    ("Learning rate", "learning rate", "learning_rate", 1.0),
    ("Gradient norm", "norm before clipping", "grad_norm", 1.0),
    ("Weights of the tasks", "weight", ".*_weight", 1.0),
    ("Gradients of the tasks", "cosine with the main task's", ".*_cosine", 1.0),
)
