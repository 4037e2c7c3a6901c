"""Figures and the static gallery page of the lab."""

from __future__ import annotations

import base64
import io
from collections import Counter
from pathlib import Path
from typing import Any

from danlu.files import write_whole
from danlu.lab.claim import VERDICTS, Record
from danlu.lab.runner import DIRECTORY, finished, write_results

#: Verdict to the CSS class of its badge.
_BADGES = dict(zip(VERDICTS, ("holds", "part", "fails"), strict=True))


def figure_path(name: str, directory: Path = DIRECTORY) -> Path:
    """Where the figure of a claim lies."""
    return directory / "figures" / f"{name}.png"


def draw(record: Record, directory: Path = DIRECTORY) -> Path | None:
    """Draw the plots of a record side by side into one PNG; None where it has no plots."""
    plots = record.evidence.plots
    if not plots:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(plots), 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for column, plot in enumerate(plots):
        axes = figure.add_subplot(1, len(plots), column + 1)
        for name, values in plot.lines.items():
            shown = [float("nan") if value is None else value for value in values]
            style = {"linestyle": "none", "markersize": 8, "alpha": 0.8} if plot.x_names else {"markersize": 4}
            axes.plot(plot.x, shown, marker="o" if len(shown) <= 20 else None, label=name, **style)
        if plot.x_names:
            lean: Any = {"rotation": 30, "ha": "right"} if sum(map(len, plot.x_names)) > 60 else {}
            axes.set_xticks(plot.x, plot.x_names, **lean)
            axes.set_xlim(min(plot.x) - 0.4, max(plot.x) + 0.4)
        if plot.log_x:
            axes.set_xscale("log", base=2)
            if len(plot.x) <= 10:
                axes.set_xticks(plot.x, [f"{value:g}" for value in plot.x])
                axes.minorticks_off()
        axes.set(title=plot.title, xlabel=plot.x_label, ylabel=plot.y_label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    buffer = io.BytesIO()
    # A fixed Software entry keeps the file the same from run to run.
    figure.savefig(buffer, format="png", metadata={"Software": "danlu"})
    path = figure_path(record.name, directory)
    write_whole(path, buffer.getvalue())
    return path


def render(records: list[Record], directory: Path = DIRECTORY) -> str:
    """The gallery as one HTML document without outside references: figures are inlined.

    Args:
        records: finished claims.
        directory: where the figures lie; a missing figure is drawn again from the record.

    Returns:
        HTML text.
    """
    import jinja2

    loader = jinja2.PackageLoader("danlu.lab", package_path="templates")
    pages = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.filters["cell"] = format_cell
    counts = Counter(record.verdict for record in records)
    entries: list[dict[str, Any]] = [
        {"record": record, "badge": _BADGES[record.verdict], "figure": _inline_figure(record, directory)}
        for record in records
    ]
    tally = [(verdict, counts[verdict], _BADGES[verdict]) for verdict in VERDICTS]
    return pages.get_template("gallery.html").render(entries=entries, tally=tally)


def write_gallery(directory: Path = DIRECTORY) -> Path:
    """Write ``index.html`` and ``results.json`` from the finished records."""
    write_results(directory)
    path = directory / "index.html"
    write_whole(path, render(finished(directory), directory))
    return path


def format_cell(value: object) -> str:
    """A table cell as text: floats with four significant digits, a missing number as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if 1e-3 <= abs(value) < 1e3 or value == 0 else f"{value:.4g}"
    return str(value)


def _inline_figure(record: Record, directory: Path) -> str | None:
    path = figure_path(record.name, directory)
    if not path.is_file() and draw(record, directory) is None:
        return None
    return base64.b64encode(path.read_bytes()).decode("ascii")
