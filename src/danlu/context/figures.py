"""Plots of a ``LengthReport``: loss, needles and cost by length. No global matplotlib state is touched."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

if TYPE_CHECKING:
    from danlu.context.report import LengthReport, Measurement

# Okabe and Ito's eight colours, which stay apart for colour-blind readers, less the yellow that vanishes on white.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F", "#8B5A2B", "#6A3D9A")
MARKERS = "osD^v<>ph*"


def overview(report: LengthReport) -> Figure:
    """Loss, needles (when tried) and prefill speed, side by side with one legend."""
    panels = [draw_loss, *([draw_needles] if report.needles else []), draw_speed]
    figure = Figure(figsize=(4.6 * len(panels), 4.4), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, report)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False)
    return figure


def single(report: LengthReport, draw: Callable[[Axes, LengthReport], None]) -> Figure:
    """One panel with its legend at the right."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    draw(axes, report)
    axes.set_title("")  # the page's heading says it
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def draw_loss(axes: Axes, report: LengthReport) -> None:
    """Loss by length; the dotted line is the plain model at the shortest length, when it was measured."""
    _draw_lines(axes, report, lambda row: row.loss)
    first = report.at(report.stacks[0], report.lengths[0]).loss
    axes.axhline(first, color="0.6", linestyle=":", linewidth=1, zorder=0)
    axes.set_title("Loss of the same tokens")
    axes.set_ylabel("nats per token")


def draw_needles(axes: Axes, report: LengthReport) -> None:
    """Share of the needles' tokens that are right, by length, over all depths."""

    def score(row: Measurement) -> float:
        found = report.needle_accuracy(row.stack, row.length)
        return math.nan if found is None else found[1]

    _draw_lines(axes, report, score)
    highest = max((row.token_accuracy for row in report.needles), default=0)
    axes.set_ylim(-0.02, 1.02 if highest > 0.4 else 0.5)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title("Needle tokens right")


def draw_speed(axes: Axes, report: LengthReport) -> None:
    """Prefill speed by length."""
    _draw_lines(axes, report, lambda row: row.prefill_tokens_per_second)
    axes.set_ylim(bottom=0)
    axes.set_title("Prefill speed")
    axes.set_ylabel("tokens per second")


def draw_memory(axes: Axes, report: LengthReport) -> None:
    """Peak memory by length, in MiB."""
    _draw_lines(axes, report, lambda row: math.nan if row.peak_bytes is None else row.peak_bytes / 2**20)
    axes.set_ylim(bottom=0)
    axes.set_title("Peak memory of a prefill")
    axes.set_ylabel("MiB above the level before")


def draw_depths(axes: Axes, report: LengthReport, stack: str) -> None:
    """Share of needle tokens right by depth (down) and length (across) under one stack."""
    rows = [row for row in report.needles if row.stack == stack]
    depths = sorted({row.depth for row in rows})
    lengths = sorted({row.length for row in rows})
    found = {(row.depth, row.length): row.token_accuracy for row in rows}
    grid = [[found[depth, length] for length in lengths] for depth in depths]
    axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            axes.text(
                x, y, f"{value:.0%}", ha="center", va="center", color="black" if value > 0.6 else "white", fontsize=7
            )
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=7)
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=7)
    axes.set_title(stack, fontsize=9)


def depth_maps(report: LengthReport) -> Figure:
    """One depth-by-length map for each stack."""
    columns = min(3, len(report.stacks))
    lines = math.ceil(len(report.stacks) / columns)
    figure = Figure(figsize=(3.3 * columns, 2.1 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes, stack in zip(grid, report.stacks, strict=False):
        draw_depths(axes, report, stack)
    for axes in list(grid)[len(report.stacks) :]:
        axes.set_visible(False)
    figure.supxlabel("length in tokens", fontsize=8)
    figure.supylabel("depth of the needle", fontsize=8)
    return figure


def _draw_lines(axes: Axes, report: LengthReport, value: Callable[[Measurement], float]) -> None:
    best = report.best()
    for index, stack in enumerate(report.stacks):
        axes.plot(
            report.lengths,
            [value(report.at(stack, length)) for length in report.lengths],
            label=stack,
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            linestyle="--" if stack in ("plain", "window") else "-",
            linewidth=2.4 if stack == best else 1.3,
            markersize=4,
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(report.lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length:g}"))
    axes.axvline(report.trained_length, color="0.6", linewidth=1, zorder=0)
    axes.set_xlabel("context length in tokens (grey: trained length)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
