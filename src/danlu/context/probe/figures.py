"""Plots of an ``AttentionReport``: heat maps by layer and head, effective tokens by position; and its page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from danlu.context.page import as_png, as_svg, fill
from danlu.context.probe.report import AttentionReport, HeadReport, grid
from danlu.files import write_whole

SUFFIXES = (".html", ".png", ".json")


def overview(report: AttentionReport) -> Figure:
    """Five heat maps and effective tokens by position."""
    maps: list[tuple[str, Callable[[HeadReport], float], bool]] = [
        ("Effective tokens", lambda row: row.effective_tokens, False),
        ("Share of visible keys in use", lambda row: row.effective_share, True),
        (f"Mass on the first {report.sinks} tokens", lambda row: row.sink_mass, True),
        (f"Mass on keys nearer than {report.local}", lambda row: row.local_mass, True),
        ("Best scale over present scale", lambda row: row.best_alpha / row.alpha if row.alpha else float("nan"), False),
    ]
    lines = min(max(len(report.layers), 6), 40)
    figure = Figure(figsize=(12.5, 2 * (1.6 + 0.16 * lines)), layout="constrained")
    *panels, last = figure.subplots(2, 3).flat
    for axes, (title, value, is_share) in zip(panels, maps, strict=True):
        draw_map(axes, report, title, value, is_share)
    draw_positions(last, report)
    return figure


def draw_map(
    axes: Axes, report: AttentionReport, title: str, value: Callable[[HeadReport], float], is_share: bool
) -> None:
    """One number by layer (down) and head (across); shares are drawn from 0 to 1."""
    low, high = (0, 1) if is_share else (None, None)
    image = axes.imshow(
        grid(report, value), cmap="viridis", aspect="auto", interpolation="nearest", vmin=low, vmax=high
    )
    axes.figure.colorbar(image, ax=axes, shrink=0.85).ax.tick_params(labelsize=7)
    layers = report.indices()
    step = max(1, len(layers) // 16)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=7)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("head", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)


def draw_positions(axes: Axes, report: AttentionReport) -> None:
    """Effective tokens by position, a line per layer; the dotted line is one that uses every key."""
    layers = report.indices()
    colours = colormaps["viridis"].resampled(max(len(layers), 2))
    middles = [(3 * (first + 1) - 1) / 2 for first in report.positions]  # a bin holds first + 1 .. 2 first + 1, 1-based
    for index, layer in enumerate(layers):
        values = report.by_position[str(layer)]
        label = f"layer {layer}" if index in (0, len(layers) - 1) else None
        axes.plot(middles, values, color=colours(index), marker="o", markersize=3, label=label)
    axes.plot(middles, middles, color="0.6", linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_title("Effective tokens by position", fontsize=9)
    axes.set_xlabel("position of the query, 1-based", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False)
    axes.grid(alpha=0.25)


def write_probe(report: AttentionReport, path: str | Path) -> Path:
    """Write a report as ``.html`` (one page that fetches nothing), ``.png`` (the figure) or ``.json``.

    Args:
        report: what to show.
        path: its suffix says which of the three.

    Returns:
        The path.

    Raises:
        ValueError: another suffix.
    """
    path = Path(path)
    if path.suffix == ".json":
        return report.save(path)
    if path.suffix == ".png":
        return write_whole(path, as_png(report.figure()))
    if path.suffix == ".html":
        return write_whole(path, render(report))
    raise ValueError(f"the file must end in {', '.join(SUFFIXES)}, got {path}")


def render(report: AttentionReport) -> str:
    """The page as text. Names and notes are escaped; only our own plot is inserted as markup."""
    from markupsafe import Markup

    title = "Attention by layer and head"
    picture = Markup(as_svg(report.figure(), title))
    template = Path(__file__).parents[1] / "templates" / "probe.html"
    return fill(template, report=report, title=title, picture=picture)
